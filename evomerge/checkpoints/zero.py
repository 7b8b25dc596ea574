"""Consolidates DeepSpeed ZeRO checkpoints, without DeepSpeed and without running any code in them.

Each of W ranks stores a share of the float32 weights in ``*_optim_states.pt``; ``*_model_states.pt`` describe them:

- ZeRO 1 and 2: the parameters of a group, one after another, each followed by its ``param_alignment_paddings``, form
  one vector, which is padded and cut into W equal runs; rank r stores run r of all groups
  (``single_partition_of_fp32_groups``).
- ZeRO 3: every parameter separately is padded and cut into W equal runs; rank r stores run r of all parameters one
  after another, spread over vectors of some length (``fp32_flat_groups``).
- Frozen parameters are stored whole in the model states (ZeRO 1 has them only in ``module``), or cut as in ZeRO 3, one
  run per file.
- ``param_shapes`` gives names and shapes by group in this order, ``shared_params`` further names of the same weights.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.config import check_config, first_line
from evomerge.checkpoints.folder import check_files, check_tokenizer, companion_files, load_config, zero_folder
from evomerge.checkpoints.layout import checkpoint_parts, locate
from evomerge.checkpoints.parts import Part, holders
from evomerge.checkpoints.structure import empty_model, parse_config, stored_tensors
from evomerge.checkpoints.writer import FolderWriter
from evomerge.errors import InputError

_SHARD = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<split>\d+)_(?P<kind>optim|model)_states\.pt"
)
_WHOLE = "mp_rank_00_model_states.pt"


class _Inert:
    """Replaces DeepSpeed's own objects, which are irrelevant to the weights."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_STAND_INS = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.zero.config.ZeroStageEnum", "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler", "utils.tensor_fragment.fragment_address",
    )
]  # fmt: skip


@dataclass(frozen=True)
class _Parameter:
    """A parameter in pieces: its elements are those of the runs, one after another, followed by padding."""

    shape: tuple[int, ...]
    runs: Sequence[torch.Tensor]

    def gather(self) -> torch.Tensor:
        flat = torch.cat([run.reshape(-1) for run in self.runs])
        return flat[: math.prod(self.shape)].float().reshape(self.shape)


def consolidate_zero(
    folder: Path, out: Path, model: Path, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Write the float32 weights of a DeepSpeed ZeRO checkpoint as a plain model folder.

    Memory holds one parameter at a time; the shards are memory-mapped.

    Args:
        folder: the checkpoint, which has a file ``latest`` and folders ``global_step*``, or one of these.
        out: the folder to create.
        model: a folder with the model's config.json, tokenizer and generation settings: the one that training started
            from, or the checkpoint itself if it has them.
        progress: called with the number of tensors written and the total.

    Raises:
        InputError: the checkpoint is incomplete, contains objects that are not known to be harmless, or belongs to
            another model than ``model``; or ``out`` cannot be written.
    """
    check_files(model, str(model))
    config = load_config(model, str(model))
    check_config(config, str(model))
    check_tokenizer(model, str(model))
    empty = empty_model(parse_config(config, str(model)), str(model))
    place = str(folder)
    if not folder.is_dir() or (step := zero_folder(folder)) is None:
        raise InputError(place, "is not a DeepSpeed ZeRO checkpoint", "Name the folder with `latest` and global_step*.")
    check_files(step, place)
    parameters = _parameters(step, place)
    held = _match(empty, {name: parameter.shape for name, parameter in parameters.items()}, model, place)
    layout = [(name, shape, torch.float32) for name, (_, _, shape) in held.items()]
    with FolderWriter(out, layout, sources=[model, folder]) as writer:
        gathered: tuple[str, torch.Tensor] = "", torch.empty(0)
        for done, (name, (holder, part, _)) in enumerate(held.items(), start=1):
            if gathered[0] != holder:  # the experts of a layer are consecutive
                gathered = holder, parameters[holder].gather()
            writer.write(name, part.of(gathered[1]))
            progress(done, len(layout))
        config = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype")}
        writer.add_text("config.json", json.dumps({**config, "dtype": "float32"}, indent=2, ensure_ascii=False) + "\n")
        for file in companion_files(model):
            writer.add_file(file, file.relative_to(model).as_posix())


def _match(
    empty: Any, shapes: Mapping[str, tuple[int, ...]], model: Path, place: str
) -> dict[str, tuple[str, Part, torch.Size]]:
    """For every tensor to write: the parameter that contains it, which part of it, and its shape."""
    parts, stored = checkpoint_parts(empty), stored_tensors(empty)
    held = {}
    for name, holder, part in holders(parts, locate(empty, shapes, place)):
        shape = parts[name].of(stored[parts[name].tensor]).shape
        wanted = stored[part.tensor].shape if part.cuts else shape
        if shapes[holder] != tuple(wanted):
            raise InputError(
                place,
                f"{holder} has shape {list(shapes[holder])}; {model} asks for {list(wanted)}",
                "Name the model that was trained, with its vocabulary.",
            )
        held[name] = (holder, part, shape)
    if missing := [name for name in parts if name not in held]:
        raise InputError(place, f"has no {missing[0]}, which {model} requires", "Name the model that was trained.")
    return held


def _parameters(step: Path, place: str) -> dict[str, _Parameter]:
    """Every tensor of the model in a checkpoint, by its name there."""
    optimizers = [_field(_load(f, place), "optimizer_state_dict", dict, place) for f in _files(step, "optim", place)]
    three = "fp32_flat_groups" in optimizers[0]
    key = "fp32_flat_groups" if three else "single_partition_of_fp32_groups"
    ranks = [_vectors(_field(state, key, list | tuple, place), key, place) for state in optimizers]
    _check_count(optimizers[0].get("partition_count"), len(ranks), place)
    files = _files(step, "model", place) if three else [step / _WHOLE]
    states = [_load(file, place) for file in files]
    if three and len(states) != len(ranks):
        raise InputError(place, f"has {len(states)} model states for {len(ranks)} optimizer states", _AGAIN)
    first = states[0]
    groups = _field(first, "param_shapes", list | dict, place)
    groups = [_shapes(group, place) for group in (groups if isinstance(groups, list) else [groups])]
    module, buffers = _field(first, "module", dict, place), first.get("buffer_names") or ()
    whole = {name: module[name] for name in buffers if isinstance(module.get(name), torch.Tensor)}
    parameters = {name: _Parameter(tuple(tensor.shape), [tensor]) for name, tensor in whole.items()}
    for name, shape in _shapes(first.get("frozen_param_shapes") or {}, place).items():
        fragments = [_field(state, "frozen_param_fragments", dict, place) for state in states]
        parameters[name] = _Parameter(shape, [_field(by_name, name, torch.Tensor, place) for by_name in fragments])
    if three:
        parameters |= _cut_singly(groups, ranks, place)
    else:
        parameters |= _cut_by_group(groups, ranks, _paddings(optimizers[0], groups, place), place)
    for name, parameter in parameters.items():
        if sum(run.numel() for run in parameter.runs) < math.prod(parameter.shape):
            raise InputError(place, f"holds too little of {name}", _AGAIN)
    for name, same in (first.get("shared_params") or {}).items():
        if same in parameters:
            parameters[name] = parameters[same]
    if not three:
        whole = {name: tensor for name, tensor in module.items() if isinstance(tensor, torch.Tensor)}
        parameters = {name: _Parameter(tuple(tensor.shape), [tensor]) for name, tensor in whole.items()} | parameters
    return parameters


_AGAIN = "A rank did not finish saving, or an older checkpoint was written over; use another one."


def _paddings(optimizer: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], place: str) -> list[list[int]]:
    """The padding after each parameter of a group, in elements; older versions have none."""
    paddings = optimizer.get("param_alignment_paddings")
    if paddings is None:
        return [[0] * len(group) for group in groups]
    wanted = [len(group) for group in groups]
    if (
        not isinstance(paddings, list)
        or [len(counts) if isinstance(counts, list) else -1 for counts in paddings] != wanted
    ):
        raise InputError(place, "param_alignment_paddings do not fit param_shapes", _AGAIN)
    if not all(type(size) is int and size >= 0 for counts in paddings for size in counts):
        raise InputError(place, "param_alignment_paddings are not counts", "Do not use this file.")
    return paddings


def _cut_by_group(
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    ranks: Sequence[Sequence[torch.Tensor]],
    paddings: Sequence[Sequence[int]],
    place: str,
) -> dict[str, _Parameter]:
    parameters = {}
    if any(len(rank) != len(groups) for rank in ranks):
        raise InputError(place, f"param_shapes has {len(groups)} groups, the shards have {len(ranks[0])}", _AGAIN)
    for number, (shapes, behind) in enumerate(zip(groups, paddings, strict=True)):
        vector = [rank[number] for rank in ranks]
        start = 0
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            parameters[name] = _Parameter(shape, _runs(vector, start, start + math.prod(shape)))
            start += math.prod(shape) + padding
        # DeepSpeed pads to a multiple of two elements per rank, in one or two places.
        align = 2 * len(ranks)
        held = sum(part.numel() for part in vector)
        if math.ceil(start / align) != math.ceil(held / align):
            raise InputError(place, f"group {number} needs {start:,} elements, and its shards hold {held:,}", _AGAIN)
    return parameters


def _cut_singly(
    groups: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[torch.Tensor]], place: str
) -> dict[str, _Parameter]:
    parameters = {}
    start = 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        stop = start + math.ceil(math.prod(shape) / len(ranks))
        parameters[name] = _Parameter(shape, [run for rank in ranks for run in _runs(rank, start, stop)])
        start = stop
    for number, rank in enumerate(ranks):
        if (held := sum(vector.numel() for vector in rank)) != start:
            raise InputError(place, f"rank {number} holds {held:,} elements; its share is {start:,}", _AGAIN)
    return parameters


def _runs(vectors: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Elements from start to stop of the concatenated vectors: views, never empty ones."""
    runs = []
    for vector in vectors:
        size = vector.numel()
        if start < size and stop > 0 and (run := vector[max(start, 0) : stop]).numel():
            runs.append(run)
        start, stop = start - size, stop - size
    return runs


# ---- reading untrusted files ----


def _files(step: Path, kind: str, place: str) -> list[Path]:
    """The shards of a kind in the order of their ranks."""
    by_rank: dict[int, Path] = {}
    for file in sorted(step.iterdir()):
        if (match := _SHARD.fullmatch(file.name)) is None or match["kind"] != kind:
            continue
        if int(match["split"]):
            raise InputError(place, f"{file.name} shows tensor parallelism, which is not supported here")
        if (rank := int(match["rank"])) in by_rank:
            raise InputError(place, f"has rank {rank} twice: {by_rank[rank].name} and {file.name}", _AGAIN)
        by_rank[rank] = file
    if not by_rank:
        raise InputError(place, f"has no zero_pp_rank_*_{kind}_states.pt in {step}", "It was not saved with ZeRO.")
    if absent := set(range(max(by_rank) + 1)) - by_rank.keys():
        raise InputError(place, f"lacks the {kind} states of rank {min(absent)}", _AGAIN)
    return [by_rank[rank] for rank in sorted(by_rank)]


def _check_count(count: Any, ranks: int, place: str) -> None:
    counts = set(count) if isinstance(count, list | tuple) else {count}
    if len(counts) > 1:
        raise InputError(place, f"has groups cut into {sorted(counts)} parts, as DeepSpeed's own experts are")
    if counts != {ranks}:
        raise InputError(place, f"was saved by {counts.pop()} ranks, but {ranks} optimizer states are here", _AGAIN)


def _load(file: Path, place: str) -> dict[str, Any]:
    try:
        strange = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - {name for _, name in _STAND_INS}
        if strange:
            raise InputError(
                place, f"{file.name} needs {min(strange)} to be read, which could run code", "Do not use this file."
            )
        with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(place, f"has no {file.name}", _AGAIN) from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise InputError(place, f"{file.name} cannot be read safely ({first_line(error)})", "Save it again.") from None
    if not isinstance(state, dict):
        raise InputError(place, f"{file.name} holds no state of a training", "Name a DeepSpeed checkpoint.")
    return state


def _field(state: Mapping[str, Any], key: str, kind: Any, place: str) -> Any:
    value = state.get(key)
    if not isinstance(value, kind):
        hint = "Only checkpoints of ZeRO 1, 2 and 3 can be put together."
        raise InputError(place, f"a shard has no {key}, or in an unknown form", hint)
    return value


def _vectors(values: Sequence[Any], key: str, place: str) -> list[torch.Tensor]:
    if not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
        raise InputError(place, f"{key} holds something else than weights", "Do not use this file.")
    return [value.reshape(-1) for value in values]


def _shapes(group: Any, place: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(group, dict) or not all(isinstance(shape, tuple | list) for shape in group.values()):
        raise InputError(place, "param_shapes are not shapes by name", "Do not use this file.")
    shapes = {str(name): tuple(shape) for name, shape in group.items()}
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise InputError(place, "param_shapes are not shapes by name", "Do not use this file.")
    return shapes
