"""Estimates of memory and time of a search on common GPUs: computed from data sheets, not measured.

A roofline model (Williams, Waterman & Patterson 2009): prefill is bound by arithmetic and decoding by memory bandwidth,
because each new token reads all weights once. Times are for a single worker on its GPUs, with answers of maximum
length, and accurate to a factor of about two.

A worker may have several GPUs (``checkpoints.placement``, ``checkpoints.sharding``): transformers computes on one after
the other, vLLM on all at once. The fullest GPU is then what counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.checkpoints.placement import device_bytes, place_buffers
from evomerge.checkpoints.sharding import Heads, heads_of, hidden_size, shard_bytes, sharding_problem, text_config
from evomerge.inference.proxy import MAX_TOKENS, SHARE_OF_FREE, kept_bytes
from evomerge.merging.arithmetic.device import Residency, choose_residency
from evomerge.search.settings.layouts import LAYOUTS

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    ``memory`` is in bytes, as shown by nvidia-smi; the memory's ``bandwidth`` and the ``bus`` to the host are in bytes
    per second, and ``flops`` in bfloat16 operations per second without sparsity.
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

# The shares of a data sheet's figures that programs usually reach in large copies and matrix products.
_OF_BANDWIDTH, _OF_FLOPS, _OF_BUS = 0.7, 0.5, 0.75
_MAPPED = 0.5  # of the bus, because the processor must copy first
# The minimum time of a decoding step for each layer, however small the model: launching its kernels one by one from
# Python, or replaying a recorded graph of them.
_LAUNCH_S: Mapping[Engine, float] = {"transformers": 0.7e-3, "vllm": 0.05e-3}
_CONTEXT = 1 << 30  # bytes of a process on a GPU: CUDA, its libraries, and allocator overhead
_PEER = 500_000_000  # the same for each process of vLLM, all of which read the weights of every GPU
_PROCESS = 600_000_000  # bytes of a process that has imported torch, transformers and lm-eval
_BATCH = 750_000_000  # the maximum bytes of a batch on a processor: logits of whole prompts are computed in chunks
_LOGIT = 6  # bytes per logit if a whole prompt is scored: bfloat16, and the float32 of its log-softmax
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 256, 256  # tokens, if unknown; the latter is lm-eval's own default
AUTO_BATCH = 64  # prompts per batch if the batch size is chosen automatically


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a merged model.

    Attributes:
        weights: bytes of the live model.
        sources: bytes of all sources together.
        layers: the maximum number of layers of a candidate.
        cache: bytes of keys and values per token.
        vocabulary: the number of tokens.
        width: bytes per weight, and per key or value.
        layer_weights: bytes of each layer of the model itself, which further layers repeat in turn; equal shares of the
            weights if empty.
        config: the config.json, which determines how the model can be divided.
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
        """The device of each layer if several share them."""
        own = self.layer_weights or tuple(self.sizes)
        return place_buffers(self.weights - sum(self.sizes), own, self.layers, devices)


@dataclass(frozen=True)
class Work:
    """The work of one evaluator per candidate: prompts, their tokens, and the maximum tokens of answers (0: none)."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class GpuEstimate:
    """The estimate for a GPU: the ``need`` of one worker in bytes, seconds per candidate, and the workers that fit.

    If not even one fits, ``residency`` is None and ``seconds`` is infinite.
    """

    gpu: str
    need: int
    workers: int
    residency: Residency | None
    seconds: float


def model_shape(
    config: Mapping[str, Any], weights: int, sources: int, layers: int, width: int, layer_weights: Sequence[int] = ()
) -> ModelShape:
    """The shape of a model from its config.json, the bytes of the live model, and those of all sources.

    Args:
        layers: the maximum number of layers of a candidate; a path may have more than the configuration says.
        width: bytes per weight, and per key or value.
        layer_weights: bytes of each layer of the model itself; equal shares of the weights if empty.
    """
    heads = heads_of(config)
    cache = 2 * layers * heads.keys * heads.size * width
    vocabulary = text_config(config)["vocab_size"]
    return ModelShape(weights, sources, layers, cache, vocabulary, width, tuple(layer_weights), config)


def work_of(settings: Any, metrics: Sequence[str], items: int, prompt: int | None = None) -> Work:
    """The work of an evaluator by its settings, with typical values for what they do not say.

    Args:
        prompt: the number of tokens of a prompt, if known. Each beam of a beam search counts as a prompt.
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
    """Bytes besides the weights while a batch runs: keys and values, and logits of one token or of whole prompts."""
    return _scratch(shape, work, 1)


def _scratch(shape: ModelShape, work: Work, share: float, has_head: bool = True) -> int:
    """The same on a device with a share of the keys and values, with or without the head."""
    batch = min(work.batch_size, work.prompts)
    cache = batch * (work.prompt_tokens + work.new_tokens) * round(shape.cache * share)
    positions = 1 if work.new_tokens else work.prompt_tokens
    return cache + has_head * batch * positions * shape.vocabulary * _LOGIT


def worker_bytes(shape: ModelShape, works: Sequence[Work], engine: Engine, devices: int = 1) -> int:
    """The minimum bytes of a worker on the fullest of its devices; sources on the device come in addition."""
    return max(need.total for need in needs(shape, works, engine, devices))


@dataclass(frozen=True)
class Need:
    """The minimum bytes of a worker on one of its devices.

    Attributes:
        weights: of the live model.
        scratch: keys, values and logits of a batch.
        served: of vLLM, which takes half of the remaining memory for a copy of the weights and its cache.
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
    """The minimum bytes of a worker on each of its devices."""
    placed = shape.placed(devices)
    weights = device_bytes(shape.weights - sum(shape.sizes), shape.sizes, placed, devices)
    if _serves(works, engine):
        scratch = max(_scratch(shape, work, max(1 / devices, 1 / shape.heads.keys)) for work in works)
        shard = shard_bytes(shape.config, shape.weights, shape.layers, shape.width, devices)
        context = _CONTEXT + (devices * _PEER if devices > 1 else 0)
        return [Need(held, served=2 * (shard + scratch), context=context) for held in weights]
    shares = [placed.count(device) / len(placed) for device in range(devices)]
    heads = [device == 0 for device in range(devices)]  # it also computes the logits
    scratch_of = [
        max((_scratch(shape, work, share, has_head) for work in works), default=0)
        for share, has_head in zip(shares, heads, strict=True)
    ]
    return [Need(held, scratch) for held, scratch in zip(weights, scratch_of, strict=True)]


def host_bytes(shape: ModelShape, works: Sequence[Work], mapped: int, descent: int = 0) -> int:
    """The peak memory of a worker on a processor in bytes: the process, the live model, a batch or a descent (of
    ``descent_bytes``), and the mapped pages of source files (``mapped`` bytes, which the system reclaims when memory is
    short)."""
    scratch = max((descent, *(min(scratch_bytes(shape, work), _BATCH) for work in works)))
    return _PROCESS + mapped + shape.weights + scratch


def descent_bytes(shape: ModelShape, items: int, free: int) -> int:
    """Bytes that a step of a descent keeps of its forward pass if ``free`` bytes are free; measured on SmolLM2-135M."""
    tokens = min(items * _TYPICAL_PROMPT, MAX_TOKENS)
    return min(kept_bytes(tokens, hidden_size(shape.config), shape.layers, shape.width), round(SHARE_OF_FREE * free))


def _serves(works: Sequence[Work], engine: Engine) -> bool:
    """Whether vLLM has anything to answer, and therefore takes half of the free memory when it starts."""
    return engine == "vllm" and any(work.new_tokens for work in works)


def merge_seconds(shape: ModelShape, gpu: Gpu, residency: Residency, devices: int = 1) -> float:
    """The time to read every source once from where it is, and to write the model; several devices work in parallel."""
    reads = {"device": gpu.bandwidth * _OF_BANDWIDTH, "pinned": gpu.bus * _OF_BUS}
    reads["mapped"] = reads["pinned"] * _MAPPED
    return (shape.sources / reads[residency] + shape.weights / (gpu.bandwidth * _OF_BANDWIDTH)) / devices


def work_seconds(shape: ModelShape, gpu: Gpu, work: Work, engine: Engine, devices: int = 1) -> float:
    """The time to score the prompts of one evaluator.

    Prefill takes two operations per parameter and prompt token (attention itself, a few per cent at such lengths, is
    neglected). Each decoding step of a batch reads the weights once, and the keys and values so far, which are half an
    answer's on average. vLLM divides both among its devices; with transformers one computes after the other.
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
    """Whether a worker fits on this many GPUs, where its sources would be, and how long a candidate takes.

    Args:
        host_free: bytes of the host's memory available to each worker.
    """
    by_device = needs(shape, works, engine, devices)
    need = max(on_device.total for on_device in by_device)
    room = gpu.memory // need
    if devices > 1:
        room = min(room, 1)  # whole GPUs are not shared
    if not room:
        return GpuEstimate(gpu.name, need, 0, None, math.inf)
    fullest = max(on_device.weights for on_device in by_device)  # it also has the largest share of the sources
    free = gpu.memory - fullest - _CONTEXT
    sources = shape.sources * fullest // shape.weights
    choice = choose_residency(sources, free // 2 if _serves(works, engine) else free, gpu.memory, host_free // devices)
    seconds = merge_seconds(shape, gpu, choice.residency, devices)
    seconds += sum(work_seconds(shape, gpu, work, engine, devices) for work in works)
    return GpuEstimate(gpu.name, need, room, choice.residency, seconds)


def lines(shape: ModelShape, works: Sequence[Work], engine: Engine, host_free: int, devices: int = 1) -> list[str]:
    """One line for people per kind of GPU, for a worker on this many of them."""
    return [_line(estimate(gpu, shape, works, engine, host_free, devices), devices) for gpu in GPUS]


def _line(estimated: GpuEstimate, devices: int) -> str:
    gigabytes = f"{estimated.need / 1e9:.1f} GB " + ("a worker" if devices == 1 else f"on each of {devices} GPUs")
    if estimated.residency is None:
        return f"{estimated.gpu}: too small for a worker ({gigabytes})"
    time = f"{estimated.seconds:.2g} s" if estimated.seconds < 100 else f"{estimated.seconds / 60:.0f} min"
    most = f"room for {estimated.workers}" if estimated.workers > 1 else "room for one"
    return f"{estimated.gpu}: {gigabytes}, {most}, sources {estimated.residency}; up to {time} a candidate"


def layouts(shape: ModelShape, engine: Engine) -> tuple[int, ...]:
    """The usual numbers of GPUs over which such a model can be distributed."""
    if engine == "vllm":
        return tuple(devices for devices in LAYOUTS if not sharding_problem(shape.config, devices))
    return tuple(devices for devices in LAYOUTS if devices <= shape.layers)


def layout_lines(shape: ModelShape, works: Sequence[Work], host_free: int) -> list[str]:
    """Lines for people: what each layout needs, on which kinds of GPU it fits, and where the sources would be."""
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
