"""Where and how a search's models are made: device, dtype and threads, according to its search file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from evomerge.checkpoints.live import LiveModel, ServingEngine
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import DType
from evomerge.search.settings.layouts import PLACE, is_here
from evomerge.search.workers.fitting import AnswersFit

if TYPE_CHECKING:
    from evomerge.search.settings.search_file import SearchFile


def choose_device(wanted: str | None) -> torch.device:
    """The requested device, or the first GPU, or the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a device without memory (meta) cannot be read
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if it was built without CUDA
        problem = f"{wanted!r} cannot be used here ({str(error).splitlines()[0]})"
        raise InputError("device", problem, "Take `cpu`, or `cuda:N` of a GPU that this machine has.") from None
    return device


def choose_devices(file: SearchFile) -> tuple[torch.device, ...]:
    """The devices of a worker in this process: one, unless the search file gives a worker several GPUs.

    Raises:
        InputError: this machine has no such device, or not enough GPUs.
    """
    count = file.cluster.devices
    if count == 1:
        return (choose_device(file.device),)
    if (there := torch.cuda.device_count()) < count:
        problem = f"is {count}, and this machine has {there} GPU{'s' * (there != 1)}: {count - there} are missing"
        raise InputError(PLACE, problem, "Name the cluster that has them as `cluster.address`, or lower it.")
    return tuple(torch.device("cuda", number) for number in range(count))


def check_devices(file: SearchFile) -> None:
    """Refuse devices that this machine does not have, if the workers run on it. Raises InputError."""
    if file.pool == "in_process" or (is_here(file) and file.cluster.devices > 1):
        choose_devices(file)


def torch_dtype(name: DType | None) -> torch.dtype | None:
    """The dtype of this name; None, which means that of the source, stays None."""
    return None if name is None else getattr(torch, name)


def build_context(
    file: SearchFile,
    sources: Mapping[str, Source],
    evidence: Evidence,
    layers: int | None = None,
    texts_digest: str | None = None,
    hops: int | None = None,
    fit_digest: str | None = None,
) -> BuildContext:
    """What a search's models are made from and for. Sets the number of threads of this process.

    Args:
        layers: the largest number of different layers in a recipe; None means that of a source.
        texts_digest: that of the calibration texts, if known: they are read only if evidence is missing.
        hops: the largest number of layers of a recipe, as for `layers`.
        fit_digest: as `texts_digest`, for the items that numbers are fitted to.
    """
    devices, dtype = computing(file)
    texts = file.calibration
    calibration = None if texts is None else texts.recorded(texts_digest) if texts_digest else texts.texts
    return BuildContext(
        sources=sources,
        tokenizer=file.tokenizer_source,
        evidence=evidence,
        devices=devices,
        dtype=dtype,
        layers=layers,
        calibration=calibration,
        fit=fit_of(file, fit_digest),
        residency=None if file.cluster.residency == "auto" else file.cluster.residency,
        engine=_vllm(sources[file.tokenizer_source], hops) if file.engine == "vllm" else None,
        base=file.base,
    )


def fit_of(file: SearchFile, digest: str | None = None) -> AnswersFit | None:
    """What a search fits numbers to; given the recorded digest, it is read only when needed."""
    split = file.fit_split if digest is None else file.recorded_fit(digest)
    return None if split is None else AnswersFit(split)


def computing(file: SearchFile) -> tuple[tuple[torch.device, ...], torch.dtype | None]:
    """The device and the dtype of a search's models. Sets the number of threads of this process.

    Raises:
        InputError: this machine has no such device, or too few.
    """
    # The same number in every pool and at export: another number adds in another order, and rounds differently.
    torch.set_num_threads(file.cluster.cpus_per_worker)
    return choose_devices(file), computing_dtype(file)


def computing_dtype(file: SearchFile) -> torch.dtype | None:
    """The dtype that a search's models are scored in; None for that of the tokenizer's source."""
    # Candidates scored together are never rounded below float32, and are exported as float32.
    return torch.float32 if file.together > 1 else torch_dtype(file.dtype)


def _vllm(source: Source, hops: int | None) -> Callable[[LiveModel], ServingEngine]:
    from evomerge.inference.vllm_engine import VllmEngine

    return lambda live: VllmEngine(source, live, hops)
