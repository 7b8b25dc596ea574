"""What a search would need and take on GPUs that people have: arithmetic from data sheets, measured on none of them.

A roofline (Williams, Waterman & Patterson 2009): reading a prompt is bound by arithmetic, writing an answer by memory,
for each new token reads all weights once. Times are of one worker alone on its GPU, with every answer as long as it may
be, to a factor of about two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.merging.device import Residency, choose_place

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
    # NVIDIA's data sheets: A100 (2021), H100 SXM (2022), H200 SXM (2023), L40S (2023), Ada architecture (2023).
    Gpu("A100-40", 40960 * _MIB, 1555e9, 312e12, _PCIE_4),
    Gpu("A100-80", 81920 * _MIB, 2039e9, 312e12, _PCIE_4),
    Gpu("H100-80", 81559 * _MIB, 3350e9, 989e12, _PCIE_5),
    Gpu("H200-141", 143771 * _MIB, 4800e9, 989e12, _PCIE_5),
    Gpu("L40S-48", 46068 * _MIB, 864e9, 362e12, _PCIE_4),
    Gpu("RTX 4090-24", 24564 * _MIB, 1008e9, 165e12, _PCIE_4),
)

# Shares of a data sheet's figures that programs usually see: large copies and matrix products.
_OF_BANDWIDTH, _OF_FLOPS, _OF_BUS = 0.7, 0.5, 0.75
_MAPPED = 0.5  # of the bus: the processor copies before it does
# A step of decoding takes this long for each layer, however small the model: launching its kernels one by one from
# Python, or replaying a recorded graph of them.
_LAUNCH_S: Mapping[Engine, float] = {"transformers": 0.7e-3, "vllm": 0.05e-3}
_CONTEXT = 1 << 30  # bytes of a process on a GPU: CUDA itself, its libraries, the allocator's slack
_PROCESS = 600_000_000  # bytes of a process that has imported torch, transformers and lm-eval
_BATCH = 750_000_000  # bytes of a batch on a processor at most: logits of whole prompts are computed in parts
_LOGIT = 6  # bytes of each logit where a whole prompt is scored: bfloat16, and the float32 of its log-softmax
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 256, 256  # tokens, where nothing says how many; the latter is lm-eval's own default
AUTO_BATCH = 64  # prompts at once where the batch size is chosen by what fits


@dataclass(frozen=True)
class ModelShape:
    """What a merged model takes.

    ``weights`` are bytes of the live model, ``sources`` those of all sources together; ``cache`` is bytes of keys and
    values for each token.
    """

    weights: int
    sources: int
    layers: int
    cache: int
    vocabulary: int
    width: int = 2

    @property
    def parameters(self) -> float:
        return self.weights / self.width


@dataclass(frozen=True)
class Work:
    """What one evaluator asks of a candidate: prompts of so many tokens, answers of at most so many; 0 answers none."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Estimate:
    """What a GPU would do: ``need`` in bytes of one worker, seconds for a candidate, how many workers it has room for.

    With no room for one, ``residency`` is None and ``seconds`` is infinite.
    """

    gpu: str
    need: int
    workers: int
    residency: Residency | None
    seconds: float


def model_shape(config: Mapping[str, Any], weights: int, sources: int, layers: int, width: int) -> ModelShape:
    """From a model's config.json, with the bytes of the live model and of all sources.

    Args:
        layers: as many as a candidate may have; a path may have more than the configuration says.
        width: bytes of a weight, and of a key or value.
    """
    text = config.get("text_config", config)  # models that see as well keep their language model's part apart
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    size = text.get("head_dim") or (text.get("hidden_size") or text.get("n_embd") or 0) // heads
    cache = 2 * layers * (text.get("num_key_value_heads") or heads) * size * width
    return ModelShape(weights, sources, layers, cache, text["vocab_size"], width)


def work_of(settings: Any, metrics: Sequence[str], items: int) -> Work:
    """What an evaluator asks for, as far as its settings say; the rest is taken to be typical."""
    answer = getattr(settings, "max_new_tokens", 0)
    if (generation := getattr(settings, "generation", None)) is not None and (
        generation or any(metric.startswith("exact_match") for metric in metrics)
    ):
        answer = int(generation.get("max_gen_toks", _TYPICAL_ANSWER))
    batch = getattr(settings, "batch_size", AUTO_BATCH)
    return Work(items, _TYPICAL_PROMPT, answer, batch if isinstance(batch, int) else AUTO_BATCH)


def scratch_bytes(shape: ModelShape, work: Work) -> int:
    """Bytes beside the weights while a batch runs: keys and values, and logits of one token or of whole prompts."""
    batch = min(work.batch_size, work.prompts)
    cache = batch * (work.prompt_tokens + work.new_tokens) * shape.cache
    positions = 1 if work.new_tokens else work.prompt_tokens
    return cache + batch * positions * shape.vocabulary * _LOGIT


def worker_bytes(shape: ModelShape, works: Sequence[Work], engine: Engine) -> int:
    """Bytes on the device that a worker cannot do without; sources on the device come on top.

    vLLM takes half of what is free beside the live model, and puts a copy of the weights and its own cache there.
    """
    scratch = max((scratch_bytes(shape, work) for work in works), default=0)
    if _serves(works, engine):
        return shape.weights + 2 * (shape.weights + scratch) + _CONTEXT
    return shape.weights + scratch + _CONTEXT


def host_bytes(shape: ModelShape, works: Sequence[Work], mapped: int) -> int:
    """Bytes that a worker on a processor takes at its peak: the process, the live model, a batch, and the pages of the
    sources' files that it has read (``mapped`` bytes, which the system takes back when memory is short)."""
    scratch = max((min(scratch_bytes(shape, work), _BATCH) for work in works), default=0)
    return _PROCESS + mapped + shape.weights + scratch


def _serves(works: Sequence[Work], engine: Engine) -> bool:
    """Whether vLLM has anything to answer, and so takes half of what is free when it starts."""
    return engine == "vllm" and any(work.new_tokens for work in works)


def merge_seconds(shape: ModelShape, gpu: Gpu, residency: Residency) -> float:
    """Reading every source once from where it lies, and writing the model."""
    reads = {"device": gpu.bandwidth * _OF_BANDWIDTH, "pinned": gpu.bus * _OF_BUS}
    reads["mapped"] = reads["pinned"] * _MAPPED
    return shape.sources / reads[residency] + shape.weights / (gpu.bandwidth * _OF_BANDWIDTH)


def work_seconds(shape: ModelShape, gpu: Gpu, work: Work, engine: Engine) -> float:
    """Scoring the prompts of one evaluator.

    Two operations for each parameter and token of a prompt (attention itself, a few per cent at such lengths, is left
    out); for each new token of a batch the weights once, and the keys and values so far, which are half an answer's on
    average.
    """
    prefill = 2 * shape.parameters * work.prompts * work.prompt_tokens / (gpu.flops * _OF_FLOPS)
    rounds = math.ceil(work.prompts / work.batch_size)
    if not work.new_tokens:
        return prefill + rounds * shape.layers * _LAUNCH_S[engine]
    together = work.prompts / rounds
    held = together * (work.prompt_tokens + work.new_tokens / 2) * shape.cache
    step = max((shape.weights + held) / (gpu.bandwidth * _OF_BANDWIDTH), shape.layers * _LAUNCH_S[engine])
    return prefill + rounds * work.new_tokens * step


def estimate(gpu: Gpu, shape: ModelShape, works: Sequence[Work], engine: Engine, host_free: int) -> Estimate:
    """Whether a worker fits on a GPU, where its sources would lie, and how long a candidate takes.

    Args:
        host_free: bytes of the host's memory that are available to each worker.
    """
    need = worker_bytes(shape, works, engine)
    room = gpu.memory // need
    if not room:
        return Estimate(gpu.name, need, 0, None, math.inf)
    free = gpu.memory - shape.weights - _CONTEXT
    place = choose_place(shape.sources, free // 2 if _serves(works, engine) else free, gpu.memory, host_free)
    seconds = merge_seconds(shape, gpu, place.residency)
    seconds += sum(work_seconds(shape, gpu, work, engine) for work in works)
    return Estimate(gpu.name, need, room, place.residency, seconds)


def lines(shape: ModelShape, works: Sequence[Work], engine: Engine, host_free: int) -> list[str]:
    """One line for each GPU, for people."""
    return [_line(estimate(gpu, shape, works, engine, host_free)) for gpu in GPUS]


def _line(estimated: Estimate) -> str:
    gigabytes = f"{estimated.need / 1e9:.1f} GB a worker"
    if estimated.residency is None:
        return f"{estimated.gpu}: too small for a worker ({gigabytes})"
    time = f"{estimated.seconds:.2g} s" if estimated.seconds < 100 else f"{estimated.seconds / 60:.0f} min"
    most = f"room for {estimated.workers}" if estimated.workers > 1 else "room for one"
    return f"{estimated.gpu}: {gigabytes}, {most}, sources {estimated.residency}; up to {time} a candidate"
