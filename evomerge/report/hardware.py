"""What a search would need and take on GPUs that people have: arithmetic from data sheets, measured on none of them.

A roofline (Williams, Waterman & Patterson 2009): reading a prompt is bound by arithmetic, writing an answer by memory,
for each new token reads all weights once. Times are of one worker alone on its GPUs, with every answer as long as it
may be, to a factor of about two.

A worker may have several GPUs (``checkpoints.placement``, ``checkpoints.sharding``): transformers computes on one after
the other, vLLM on all at once. What counts then is the fullest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.checkpoints.placement import device_bytes, place_buffers
from evomerge.checkpoints.sharding import Heads, heads_of, hidden_size, shard_bytes, sharding_problem, text_config
from evomerge.inference.proxy import MAX_TOKENS, SHARE_OF_FREE, kept_bytes
from evomerge.merging.arithmetic.device import Residency, choose_place
from evomerge.search.settings.layouts import LAYOUTS

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    ``memory`` is in bytes, as nvidia-smi shows it; ``bandwidth`` of that memory and ``bus`` to the host are in bytes a
    second, ``flops`` in bfloat16 operations a second without sparsity.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    bus: float


_MIB = 2**20
_PCIE_4, _PCIE_5 = 32e9, 64e9  # x16, one way

GPUS = (
    # NVIDIA's data sheets: A100 (2021), H100 SXM (2022), H200 SXM (2023), L40S (2023), Ada architecture (2023), HGX
    # B200 and B300 (2025).
    Gpu("A100-40", 40960 * _MIB, 1555e9, 312e12, _PCIE_4),
    Gpu("A100-80", 81920 * _MIB, 2039e9, 312e12, _PCIE_4),
    Gpu("H100-80", 81559 * _MIB, 3350e9, 989e12, _PCIE_5),
    Gpu("H200-141", 143771 * _MIB, 4800e9, 989e12, _PCIE_5),
    Gpu("L40S-48", 46068 * _MIB, 864e9, 362e12, _PCIE_4),
    Gpu("RTX 4090-24", 24564 * _MIB, 1008e9, 165e12, _PCIE_4),
    Gpu("B200-180", 183359 * _MIB, 8000e9, 2250e12, _PCIE_5),
    Gpu("B300-288", 275040 * _MIB, 8000e9, 2250e12, _PCIE_5),
)

# Shares of a data sheet's figures that programs usually see: large copies and matrix products.
_OF_BANDWIDTH, _OF_FLOPS, _OF_BUS = 0.7, 0.5, 0.75
_MAPPED = 0.5  # of the bus: the processor copies before it does
# A step of decoding takes this long for each layer, however small the model: launching its kernels one by one from
# Python, or replaying a recorded graph of them.
_LAUNCH_S: Mapping[Engine, float] = {"transformers": 0.7e-3, "vllm": 0.05e-3}
_CONTEXT = 1 << 30  # bytes of a process on a GPU: CUDA itself, its libraries, the allocator's slack
_PEER = 500_000_000  # bytes of the same of each process of vLLM, all of which read the weights of every GPU
_PROCESS = 600_000_000  # bytes of a process that has imported torch, transformers and lm-eval
_BATCH = 750_000_000  # bytes of a batch on a processor at most: logits of whole prompts are computed in parts
_LOGIT = 6  # bytes of each logit where a whole prompt is scored: bfloat16, and the float32 of its log-softmax
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 256, 256  # tokens, where nothing says how many; the latter is lm-eval's own default
AUTO_BATCH = 64  # prompts at once where the batch size is chosen by what fits


@dataclass(frozen=True)
class ModelShape:
    """What a merged model takes.

    Attributes:
        weights: bytes of the live model.
        sources: bytes of all sources together.
        layers: most layers that a candidate may have.
        cache: bytes of keys and values for each token.
        vocabulary: tokens.
        width: bytes of a weight, and of a key or value.
        layer_weights: bytes of each layer of the model itself, those beyond it being like these in turn; equal shares
            of the weights when empty.
        config: the config.json that says how the model may be divided.
    """

    weights: int
    sources: int
    layers: int
    cache: int
    vocabulary: int
    width: int = 2
    layer_weights: tuple[int, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> float:
        return self.weights / self.width

    @property
    def heads(self) -> Heads:
        return heads_of(self.config)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each layer that a candidate may have."""
        own = self.layer_weights or (self.weights // self.layers,) * self.layers
        return [own[number % len(own)] for number in range(self.layers)]

    def placed(self, devices: int) -> list[int]:
        """The device of each layer where several share them out."""
        own = self.layer_weights or tuple(self.sizes)
        return place_buffers(self.weights - sum(self.sizes), own, self.layers, devices)


@dataclass(frozen=True)
class Work:
    """What one evaluator asks of a candidate: prompts of so many tokens, answers of at most so many; 0 answers none."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class GpuEstimate:
    """What a GPU would do: ``need`` in bytes of one worker, seconds for a candidate, how many workers it has room for.

    With no room for one, ``residency`` is None and ``seconds`` is infinite.
    """

    gpu: str
    need: int
    workers: int
    residency: Residency | None
    seconds: float


def model_shape(
    config: Mapping[str, Any], weights: int, sources: int, layers: int, width: int, layer_weights: Sequence[int] = ()
) -> ModelShape:
    """From a model's config.json, with the bytes of the live model and of all sources.

    Args:
        layers: as many as a candidate may have; a path may have more than the configuration says.
        width: bytes of a weight, and of a key or value.
        layer_weights: bytes of each layer of the model itself; equal shares of the weights when empty.
    """
    heads = heads_of(config)
    cache = 2 * layers * heads.keys * heads.size * width
    vocabulary = text_config(config)["vocab_size"]
    return ModelShape(weights, sources, layers, cache, vocabulary, width, tuple(layer_weights), config)


def work_of(settings: Any, metrics: Sequence[str], items: int, prompt: int | None = None) -> Work:
    """What an evaluator asks for, as far as its settings say; the rest is taken to be typical.

    Args:
        prompt: how many tokens a prompt has, where that is known. Each beam of a search is a prompt of its own.
    """
    answer = getattr(settings, "max_new_tokens", 0)
    if (generation := getattr(settings, "generation", None)) is not None and (
        generation or any(metric.startswith("exact_match") for metric in metrics)
    ):
        answer = int(generation.get("max_gen_toks", _TYPICAL_ANSWER))
    batch = getattr(settings, "batch_size", AUTO_BATCH)
    beams, batch = getattr(settings, "num_beams", 1), batch if isinstance(batch, int) else AUTO_BATCH
    return Work(items * beams, prompt or _TYPICAL_PROMPT, answer, batch * beams)


def scratch_bytes(shape: ModelShape, work: Work) -> int:
    """Bytes beside the weights while a batch runs: keys and values, and logits of one token or of whole prompts."""
    return _scratch(shape, work, 1)


def _scratch(shape: ModelShape, work: Work, share: float, has_head: bool = True) -> int:
    """The same on a device that has a share of the keys and values, and the head or not."""
    batch = min(work.batch_size, work.prompts)
    cache = batch * (work.prompt_tokens + work.new_tokens) * round(shape.cache * share)
    positions = 1 if work.new_tokens else work.prompt_tokens
    return cache + has_head * batch * positions * shape.vocabulary * _LOGIT


def worker_bytes(shape: ModelShape, works: Sequence[Work], engine: Engine, devices: int = 1) -> int:
    """Bytes that a worker cannot do without on the fullest of its devices; sources on the device come on top."""
    return max(need.total for need in needs(shape, works, engine, devices))


@dataclass(frozen=True)
class Need:
    """Bytes that a worker cannot do without on one of its devices.

    Attributes:
        weights: of the live model.
        scratch: keys, values and logits of a batch.
        served: of vLLM, which takes half of what is free beside the live model for a copy of the weights and its cache.
        context: of the process itself.
    """

    weights: int
    scratch: int = 0
    served: int = 0
    context: int = _CONTEXT

    @property
    def total(self) -> int:
        return self.weights + self.scratch + self.served + self.context


def needs(shape: ModelShape, works: Sequence[Work], engine: Engine, devices: int) -> list[Need]:
    """What a worker cannot do without on each of its devices."""
    placed = shape.placed(devices)
    weights = device_bytes(shape.weights - sum(shape.sizes), shape.sizes, placed, devices)
    if _serves(works, engine):
        scratch = max(_scratch(shape, work, max(1 / devices, 1 / shape.heads.keys)) for work in works)
        shard = shard_bytes(shape.config, shape.weights, shape.layers, shape.width, devices)
        context = _CONTEXT + (devices * _PEER if devices > 1 else 0)
        return [Need(held, served=2 * (shard + scratch), context=context) for held in weights]
    shares = [placed.count(device) / len(placed) for device in range(devices)]
    heads = [device == 0 for device in range(devices)]  # what is outside the layers computes the logits
    scratch_of = [
        max((_scratch(shape, work, share, has_head) for work in works), default=0)
        for share, has_head in zip(shares, heads, strict=True)
    ]
    return [Need(held, scratch) for held, scratch in zip(weights, scratch_of, strict=True)]


def host_bytes(shape: ModelShape, works: Sequence[Work], mapped: int, descent: int = 0) -> int:
    """Bytes that a worker on a processor takes at its peak: the process, the live model, a batch or a descent (of
    ``descent_bytes``), and the pages of the sources' files that it has read (``mapped`` bytes, which the system takes
    back when memory is short)."""
    scratch = max((descent, *(min(scratch_bytes(shape, work), _BATCH) for work in works)))
    return _PROCESS + mapped + shape.weights + scratch


def descent_bytes(shape: ModelShape, items: int, free: int) -> int:
    """Bytes that a step of a descent keeps of its forward pass, where so many are free; measured on SmolLM2-135M."""
    tokens = min(items * _TYPICAL_PROMPT, MAX_TOKENS)
    return min(kept_bytes(tokens, hidden_size(shape.config), shape.layers, shape.width), round(SHARE_OF_FREE * free))


def _serves(works: Sequence[Work], engine: Engine) -> bool:
    """Whether vLLM has anything to answer, and so takes half of what is free when it starts."""
    return engine == "vllm" and any(work.new_tokens for work in works)


def merge_seconds(shape: ModelShape, gpu: Gpu, residency: Residency, devices: int = 1) -> float:
    """Reading every source once from where it lies, and writing the model; several devices do so side by side."""
    reads = {"device": gpu.bandwidth * _OF_BANDWIDTH, "pinned": gpu.bus * _OF_BUS}
    reads["mapped"] = reads["pinned"] * _MAPPED
    return (shape.sources / reads[residency] + shape.weights / (gpu.bandwidth * _OF_BANDWIDTH)) / devices


def work_seconds(shape: ModelShape, gpu: Gpu, work: Work, engine: Engine, devices: int = 1) -> float:
    """Scoring the prompts of one evaluator.

    Two operations for each parameter and token of a prompt (attention itself, a few per cent at such lengths, is left
    out); for each new token of a batch the weights once, and the keys and values so far, which are half an answer's on
    average. vLLM divides both among its devices; with transformers one computes after the other.
    """
    at_once = devices if engine == "vllm" and work.new_tokens else 1
    flops, bandwidth = at_once * gpu.flops * _OF_FLOPS, at_once * gpu.bandwidth * _OF_BANDWIDTH
    prefill = 2 * shape.parameters * work.prompts * work.prompt_tokens / flops
    rounds = math.ceil(work.prompts / work.batch_size)
    if not work.new_tokens:
        return prefill + rounds * shape.layers * _LAUNCH_S[engine]
    together = work.prompts / rounds
    held = together * (work.prompt_tokens + work.new_tokens / 2) * shape.cache
    step = max((shape.weights + held) / bandwidth, shape.layers * _LAUNCH_S[engine])
    return prefill + rounds * work.new_tokens * step


def estimate(
    gpu: Gpu, shape: ModelShape, works: Sequence[Work], engine: Engine, host_free: int, devices: int = 1
) -> GpuEstimate:
    """Whether a worker fits on so many GPUs, where its sources would lie, and how long a candidate takes.

    Args:
        host_free: bytes of the host's memory that are available to each worker.
    """
    by_device = needs(shape, works, engine, devices)
    need = max(on_device.total for on_device in by_device)
    room = gpu.memory // need
    if devices > 1:
        room = min(room, 1)  # whole GPUs are nobody else's
    if not room:
        return GpuEstimate(gpu.name, need, 0, None, math.inf)
    fullest = max(on_device.weights for on_device in by_device)  # its layers' sources are the most
    free = gpu.memory - fullest - _CONTEXT
    sources = shape.sources * fullest // shape.weights
    place = choose_place(sources, free // 2 if _serves(works, engine) else free, gpu.memory, host_free // devices)
    seconds = merge_seconds(shape, gpu, place.residency, devices)
    seconds += sum(work_seconds(shape, gpu, work, engine, devices) for work in works)
    return GpuEstimate(gpu.name, need, room, place.residency, seconds)


def lines(shape: ModelShape, works: Sequence[Work], engine: Engine, host_free: int, devices: int = 1) -> list[str]:
    """One line for each kind of GPU, of a worker on so many of them, for people."""
    return [_line(estimate(gpu, shape, works, engine, host_free, devices), devices) for gpu in GPUS]


def _line(estimated: GpuEstimate, devices: int) -> str:
    gigabytes = f"{estimated.need / 1e9:.1f} GB " + ("a worker" if devices == 1 else f"on each of {devices} GPUs")
    if estimated.residency is None:
        return f"{estimated.gpu}: too small for a worker ({gigabytes})"
    time = f"{estimated.seconds:.2g} s" if estimated.seconds < 100 else f"{estimated.seconds / 60:.0f} min"
    most = f"room for {estimated.workers}" if estimated.workers > 1 else "room for one"
    return f"{estimated.gpu}: {gigabytes}, {most}, sources {estimated.residency}; up to {time} a candidate"


def layouts(shape: ModelShape, engine: Engine) -> tuple[int, ...]:
    """On how many GPUs a worker can lay such a model, of the numbers that are usual."""
    if engine == "vllm":
        return tuple(devices for devices in LAYOUTS if not sharding_problem(shape.config, devices))
    return tuple(devices for devices in LAYOUTS if devices <= shape.layers)


def layout_lines(shape: ModelShape, works: Sequence[Work], host_free: int) -> list[str]:
    """What each layout needs, and on which kinds of GPU it fits, with where the sources would lie, for people."""
    engines: tuple[Engine, ...] = ("transformers", "vllm")
    needed = "; ".join(
        f"{engine} " + ", ".join(f"{worker_bytes(shape, works, engine, n) / 1e9:.1f} GB on {n}" for n in possible)
        for engine in engines
        if (possible := layouts(shape, engine))
    )
    return [f"on each GPU of a worker: {needed}", *(_fitting(gpu, shape, works, host_free) for gpu in GPUS)]


def _fitting(gpu: Gpu, shape: ModelShape, works: Sequence[Work], host_free: int) -> str:
    """A100-80: transformers on 2 (sources pinned), 4 (device) GPUs; vllm on 8 (device)."""
    engines: tuple[Engine, ...] = ("transformers", "vllm")
    parts = []
    for engine in engines:
        residencies = {n: estimate(gpu, shape, works, engine, host_free, n).residency for n in layouts(shape, engine)}
        fitting = ", ".join(f"{devices} ({residency})" for devices, residency in residencies.items() if residency)
        parts.append(f"{engine} on {fitting or 'none'}")
    return f"{gpu.name}: {'; '.join(parts)}"
