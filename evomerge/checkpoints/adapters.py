"""PEFT adapters on a source: which tensors they change, and how these changes are folded into the weights.

The effect of each kind is in ``adapter_changes``, the format of its files in ``adapter_kinds``. Factors remain in their
memory-mapped files; folding is done on every read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evomerge.checkpoints.adapter_changes import Change, LowRank, Rotation, Rows, Scaled, Shift, Started, Vector, View
from evomerge.checkpoints.adapter_kinds import TENSORS, TOKENS, Held, changes_of, changes_of_parameter
from evomerge.checkpoints.adapter_settings import AGAIN as _AGAIN
from evomerge.checkpoints.adapter_settings import CONFIG, AdapterSettings
from evomerge.checkpoints.adapter_settings import FOLD as _FOLD
from evomerge.checkpoints.buffers import Buffers
from evomerge.checkpoints.expert_files import holds_experts, of_expert, with_one_rank
from evomerge.checkpoints.folder import check_files, has, load_json
from evomerge.checkpoints.headers import TORCH_DTYPES, TensorEntry, map_file, read_header, view_entry
from evomerge.checkpoints.parts import Part
from evomerge.errors import InputError

WEIGHTS = "adapter_model.safetensors"

_WRAPPED = ".base_layer"

_TENSOR = re.compile(
    rf"(?P<module>.+)\.(?P<kind>{'|'.join(TENSORS)})(\.(?P<adapter>(?!(weight|bias)$)[^.]+))?(\.(?P<field>weight|bias))?"
)
_UNTRAINED = re.compile(r"(.*\.)?original_module\..+")
"""The untrained copy of a module, which peft writes in addition to the trained one."""

_WHOLE, _SHARED = "base_model", ("vera_A", "vera_B")
"""The module whose tensors are shared by all others, and the names of these tensors."""

_buffers = Buffers()


@dataclass(frozen=True)
class Adapter:
    """One adapter, matched to the tensors of its base.

    Attributes:
        folder: the folder of its files.
        changes: its changes to tensors, by their names in the source.
        replaced: tensors that it replaces completely (``modules_to_save``), by the same names.
        files: its own files.
        base: the base that it names, or "".
    """

    folder: Path
    changes: Mapping[str, Change]
    replaced: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    base: str


@dataclass(frozen=True)
class Base:
    """What an adapter needs to know about the model it is applied to.

    Attributes:
        tensors: the source's tensors, by name.
        pieces: for each tensor of the model, by its name there, the source's tensors that make it up and their position
            in it.
        find: maps names of tensors, as they follow from the model's modules, to the source's names; None if unknown.
        transposed: names of weights stored as inputs by outputs.
        tied: names of tensors that serve both as embedding and as head.
    """

    tensors: Mapping[str, TensorEntry]
    pieces: Mapping[str, Sequence[tuple[str, Part]]]
    find: Callable[[Sequence[str]], Mapping[str, str | None]]
    transposed: frozenset[str]
    tied: frozenset[str]


def fold(stored: torch.Tensor, changes: Sequence[Change], view: View) -> torch.Tensor:
    """A stored tensor with changes folded in, in order: float32, on the CPU, in newly allocated memory.

    Args:
        view: returns the tensor of an entry.
    """
    weight = _buffers.empty(stored.shape).copy_(stored)
    for number, change in enumerate(changes):
        change.apply(weight, stored, view, first=number == 0)
    return weight


def open_adapter(folder: Path, base: Base, place: str, expert: int | None = None) -> Adapter:
    """Open an adapter's folder and match all of it to its base, reading only headers.

    Args:
        expert: the index of the expert, in a folder that holds several (``expert_files``).

    Raises:
        InputError: it is broken, of a kind that cannot be folded, or made for another model.
    """
    check_files(folder, place)
    if not has(folder, CONFIG):
        raise InputError(
            place, f"{folder} is not an adapter: it has no {CONFIG}", "Name models separately; a plus adds adapters."
        )
    config = with_one_rank(load_json(folder / CONFIG, place))
    settings = AdapterSettings(config, place)
    settings.check()
    if not has(folder, WEIGHTS):
        held = (
            "pickled weights (adapter_model.bin), which can run code" if any(folder.glob("*.bin")) else f"no {WEIGHTS}"
        )
        raise InputError(place, f"the adapter {folder} holds {held}", _AGAIN)
    stored = read_header(folder / WEIGHTS, place)
    for name, entry in stored.items():
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(place, f"the adapter's {name} is stored as {entry.dtype}; use one in floating point")
    if not stored:
        raise InputError(place, f"the adapter {folder} holds no tensors", _AGAIN)
    routers: Mapping[str, TensorEntry] = {}
    if expert is not None or holds_experts(stored):
        stored, routers = of_expert(stored, expert, folder, place)
    rows = {_plain(name): (entry, expert or 0) for name, entry in routers.items()}
    reader = _Reader(folder, settings, base, rows)
    changes, replaced = reader.read(stored)
    dora = any(isinstance(change, LowRank) and change.magnitude is not None for change in changes.values())
    if config.get("use_dora") and not dora:
        raise InputError(place, f"{CONFIG}: use_dora is true, but the adapter holds no lora_magnitude_vector", _AGAIN)
    named = config.get("base_model_name_or_path")
    return Adapter(
        folder, changes, replaced, (folder / CONFIG, folder / WEIGHTS), named if isinstance(named, str) else ""
    )


@dataclass(frozen=True)
class _Reader:
    """Sorts an adapter's tensors by the tensor of the base that they change, and how."""

    folder: Path
    settings: AdapterSettings
    base: Base
    routers: Mapping[str, tuple[TensorEntry, int]]

    @property
    def place(self) -> str:
        """The place, for error messages."""
        return self.settings.place

    def read(self, stored: Mapping[str, TensorEntry]) -> tuple[dict[str, Change], dict[str, TensorEntry]]:
        modules, whole = self._sorted(stored)
        shared = {name: entry for name, entry in modules.pop(_WHOLE, {}).items() if name in _SHARED}
        plain = {module: tensors for module, tensors in modules.items() if not self._is_of_parameter(module)}
        weights, biases = ([f"{m.removesuffix(TOKENS)}.{field}" for m in plain] for field in ("weight", "bias"))
        names = self.base.find([*weights, *biases, *whole])
        changes: dict[str, Change] = {}
        for module, tensors in plain.items():
            held = Held(module, {**shared, **tensors}, names[f"{module.removesuffix(TOKENS)}.bias"] is not None)
            for target, change in changes_of(held, self.settings, self.routers.get(module)):
                changes[self._known(names, target)] = change
        for name, change in self._of_parameters({m: t for m, t in modules.items() if m not in plain}):
            changes[name] = change
        self._check_shapes(changes)
        replaced = {self._known(names, name): entry for name, entry in whole.items()}
        for name, entry in replaced.items():
            if entry.shape != tuple(self.base.tensors[name].shape):
                raise self._misfit(name, entry.shape)
        self._check_tied(changes, whole, names)
        return changes, replaced

    def _is_of_parameter(self, module: str) -> bool:
        """Whether a module in a file is one of those that PEFT wraps around a parameter (``target_parameters``)."""
        targets = self.settings.config.get("target_parameters") or ()
        inside = module.replace(_WRAPPED, "")
        owned = [tensor for tensor in self.base.pieces if tensor.rpartition(".")[0] == inside]
        return any(tensor == target or tensor.endswith(f".{target}") for tensor in owned for target in targets)

    def _of_parameters(self, modules: Mapping[str, Mapping[str, TensorEntry]]) -> Iterator[tuple[str, Change]]:
        """Changes of parameters that are not a layer's weight; the innermost of a module is its first parameter."""
        targets = self.settings.config.get("target_parameters") or ()
        depths: dict[str, dict[int, str]] = defaultdict(dict)
        for module in modules:
            depths[module.replace(_WRAPPED, "")][module.count(_WRAPPED)] = module
        for owner, by_depth in depths.items():
            meant = [
                tensor
                for tensor in self.base.pieces
                if tensor.rpartition(".")[0] == owner and any(tensor.endswith(f".{t}") or tensor == t for t in targets)
            ]
            if sorted(by_depth) != list(range(len(meant))):
                problem = (
                    f"{CONFIG}: target_parameters has {len(meant)} parameters of {owner}, the file {len(by_depth)}"
                )
                raise InputError(self.place, problem, _AGAIN)
            for number, tensor in enumerate(meant):
                tensors = modules[by_depth[len(meant) - 1 - number]]
                yield from changes_of_parameter(tensor, tensors, self.base.pieces[tensor], self.base, self.settings)

    def _sorted(
        self, stored: Mapping[str, TensorEntry]
    ) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
        """The factors of each module by kind, and the tensors that are stored in full, by name."""
        plain = {_plain(name): entry for name, entry in stored.items()}
        if len(plain) < len(stored):
            raise InputError(self.place, f"the adapter {self.folder} holds a tensor under two names", _AGAIN)
        matches = {name: _TENSOR.fullmatch(name) for name in plain}
        adapters = {match["adapter"] for match in matches.values() if match} or {"default"}
        if len(adapters) > 1:
            problem = f"{self.folder} holds several adapters: {', '.join(sorted(str(name) for name in adapters)[:3])}"
            raise InputError(self.place, problem, "Save each alone.")
        saved = re.compile(rf"\b(modules_to_save\.({re.escape(str(adapters.pop()))}\.)?|base_layer\.)")
        modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
        whole: dict[str, TensorEntry] = {}
        for name, entry in plain.items():
            if match := matches[name]:
                modules[match["module"]][match["kind"] + (".bias" if match["field"] == "bias" else "")] = entry
            elif not _UNTRAINED.fullmatch(name):
                target = saved.sub("", name)
                if target in whole and not torch.equal(_view(whole[target]), _view(entry)):
                    raise InputError(self.place, f"the adapter {self.folder} holds {target} twice, and they differ")
                whole[target] = entry
        return modules, whole

    def _known(self, names: Mapping[str, str | None], target: str) -> str:
        name = names[target]
        if name is None:
            raise InputError(
                self.place, f"the adapter {self.folder} changes {target}, which the model does not have",
                "Name the base that it was trained on.",
            )  # fmt: skip
        return name

    def _check_shapes(self, changes: dict[str, Change]) -> None:
        for name, change in changes.items():
            wanted = tuple(self.base.tensors[name].shape)
            transposed = name in self.base.transposed
            if isinstance(change, LowRank):
                change = replace(change, transposed=change.transposed or transposed)
                if isinstance(change, Scaled) and change.size is not None:  # the factors are shared by all modules
                    inputs = wanted[0] if change.transposed else wanted[1]
                    change = replace(change, size=(change.size[0], min(inputs, change.size[1])))
                if isinstance(change, Started):
                    change = replace(change, weight=self.base.tensors[name])
                self._check_factors(name, change, wanted)
            elif isinstance(change, Vector):
                change = replace(change, transposed=transposed)
                length = math.prod(change.by.shape)
                made = (*wanted[:-1], length) if change.of_columns else (length, *wanted[1:])
                if made != wanted:
                    raise self._misfit(name, made)
            elif isinstance(change, Shift) and change.by.shape != wanted:
                raise self._misfit(name, change.by.shape)
            elif isinstance(change, Rotation | Rows):
                self._check_whole(name, change, wanted, transposed=transposed)
            changes[name] = change

    def _check_factors(self, name: str, change: LowRank, wanted: tuple[int, ...]) -> None:
        made = change.made[::-1] if change.transposed else change.made
        if change.misfit or made != wanted:
            raise self._misfit(name, made)
        if change.magnitude is not None and math.prod(change.magnitude.shape) != change.made[0]:
            raise self._misfit(name, change.magnitude.shape)

    def _check_whole(self, name: str, change: Rotation | Rows, wanted: tuple[int, ...], *, transposed: bool) -> None:
        if isinstance(change, Rows):
            if change.by.shape != (len(change.tokens), *wanted[1:]) or max(change.tokens, default=0) >= wanted[0]:
                raise self._misfit(name, (max(change.tokens, default=0) + 1, *change.by.shape[1:]))
            return
        if transposed:
            raise InputError(self.place, f"rotates the inputs of {name}, which is stored as inputs by outputs", _FOLD)
        inputs = change.block * change.blocks if change.blocks > 1 else wanted[1]
        outputs = wanted[0] if change.outputs is None else math.prod(change.outputs.shape)
        if (outputs, inputs) != wanted or wanted[1] % change.block:
            raise self._misfit(name, (outputs, inputs))

    def _misfit(self, name: str, shape: Sequence[int]) -> InputError:
        wanted = list(self.base.tensors[name].shape)
        hint = "Name the base that it was trained on."
        if list(shape[1:]) == wanted[1:]:
            hint += f" If it adds tokens to the vocabulary: {_FOLD}"
        problem = f"the adapter {self.folder} is for a model whose {name} has shape {list(shape)}; here it is {wanted}"
        return InputError(self.place, problem, hint)

    def _check_tied(
        self, changes: Mapping[str, Change], whole: Mapping[str, TensorEntry], names: Mapping[str, str | None]
    ) -> None:
        """Check that a tensor that is both embedding and head changes in the same way as both."""
        for name in self.base.tied:
            held = [_view(entry) for target, entry in whole.items() if names[target] == name]
            equal = len(held) == 2 and torch.equal(*held)  # if both were trained, both are stored
            alone = name in changes and not isinstance(changes[name], Rows)  # PEFT applies trained rows to both
            if alone or (held and not equal):
                raise InputError(
                    self.place,
                    f"the adapter {self.folder} changes {name} as embedding or as head, but in this model it is both",
                    "Untie the base first: save it with tie_word_embeddings false and the embedding again as the head.",
                )


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _view(entry: TensorEntry) -> torch.Tensor:
    return view_entry(entry, map_file(entry.file))
