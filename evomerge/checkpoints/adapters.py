"""Adapters (PEFT's LoRA and its kin, and (IA)3) on a source: what they change, and the fold of it into the weights.

With stored weight W, factors A and B of rank r and scaling s = alpha / r (rsLoRA: alpha / sqrt(r)), or a vector l:

    LoRA   W + s B A                                                     (Hu et al. 2021, arXiv:2106.09685, section 4.1)
    DoRA   m (W + s B A) / ||W + s B A||, the norm of each output's row  (Liu et al. 2024, arXiv:2402.09353, equation 5)
    (IA)3  diag(l) W, or W diag(l) in the last map of an mlp            (Liu et al. 2022, arXiv 2205.05638, section 3.3)

Everything is computed in float32. The factors stay in their mapped files; a fold is made each time it is read.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
import torch

from evomerge.checkpoints.buffers import Buffers
from evomerge.checkpoints.expert_files import holds_experts, of_expert, with_one_rank
from evomerge.checkpoints.folder import check_files, has, load_json
from evomerge.checkpoints.headers import TORCH_DTYPES, TensorEntry, map_file, read_header, view_entry
from evomerge.errors import InputError
from evomerge.printable import printable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_FOLD = "Fold it with peft's `merge_and_unload` and name the folder that you save."
_AGAIN = "Save it again with peft's `save_pretrained`."
_UNSUPPORTED = (
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "target_parameters", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_PLAIN_STARTS = {"True", "False", "None", "gaussian", "eva", "orthogonal"}
"""Values of init_lora_weights that leave the base as it was; PiSSA and others train against a base they changed."""

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.(?P<adapter>(?!(weight|bias)$)[^.]+))?(\.(?P<field>weight|bias))?"
)
_UNTRAINED = re.compile(r"(.*\.)?original_module\..+")
"""The copy of a module that training left alone, which peft writes beside the trained one."""

_MOST_SCALE = 1e9  # of alpha and rank
_MOST_PATTERNS = 10_000
_PATTERN_SECONDS = 2.0  # for one pattern on one module, and of the CPU for all of them


@dataclass(frozen=True)
class LowRank:
    """A LoRA or DoRA of one weight.

    Attributes:
        down, up: the factors A (rank by inputs) and B (outputs by rank).
        scale: s above.
        turned: the weight is stored as inputs by outputs: embeddings, and GPT-2's Conv1D.
        magnitude: DoRA's m, one number an output.
        router: of one of several experts in a folder: the router [experts, inputs] that was trained with them, and
            which row of it is its own.
    """

    down: TensorEntry
    up: TensorEntry
    scale: float
    turned: bool
    magnitude: TensorEntry | None = None
    router: tuple[TensorEntry, int] | None = None

    def factors(self, view: Callable[[TensorEntry], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """L [rows, rank] and R [rank, columns] of the weight as it is stored, to which s L R is added: float32.

        Args:
            view: gives the tensor of an entry.
        """
        up, down = view(self.up).float(), view(self.down).float()
        return (down.T, up.T) if self.turned else (up, down)

    def apply(
        self, weight: torch.Tensor, stored: torch.Tensor, view: Callable[[TensorEntry], torch.Tensor], *, first: bool
    ) -> None:
        """Put it on a weight in place.

        Args:
            weight: float32, as the adapters before left it.
            stored: the weight without any adapter.
            view: gives the tensor of an entry.
            first: there are no adapters before.
        """
        left, right = self.factors(view)
        weight.addmm_(left, right, alpha=self.scale)
        if self.magnitude is None:
            return
        # Of several DoRA each was trained beside the others' base, so the norm is that of the stored weight.
        alone = weight if first else torch.addmm(stored.float(), left, right, alpha=self.scale)
        norm = torch.linalg.vector_norm(alone, dim=0 if self.turned else 1, keepdim=True)
        weight.mul_(view(self.magnitude).float().reshape(norm.shape) / norm)


@dataclass(frozen=True)
class Shift:
    """A bias of B (``lora_bias``), which moves the layer's own by s times it."""

    by: TensorEntry
    scale: float

    def apply(
        self, weight: torch.Tensor, stored: torch.Tensor, view: Callable[[TensorEntry], torch.Tensor], *, first: bool
    ) -> None:
        """Put it on a bias in place; arguments as of ``LowRank``."""
        weight.add_(self.scale * view(self.by).float())


@dataclass(frozen=True)
class Vector:
    """An (IA)3 of one weight: a number that multiplies each of its outputs, or of its inputs.

    Attributes:
        by: the vector, of any shape.
        inputs: it is of the inputs (a module of PEFT's ``feedforward_modules``), else of the outputs, bias and all.
        turned: the weight is stored as inputs by outputs.
    """

    by: TensorEntry
    inputs: bool
    turned: bool

    @property
    def of_columns(self) -> bool:
        """Whether it multiplies the columns of the weight as it is stored, else the rows."""
        return self.inputs != self.turned

    def vector(self, view: Callable[[TensorEntry], torch.Tensor]) -> torch.Tensor:
        """l: float32 [inputs] or [outputs].

        Args:
            view: gives the tensor of an entry.
        """
        return view(self.by).float().flatten()

    def apply(
        self, weight: torch.Tensor, stored: torch.Tensor, view: Callable[[TensorEntry], torch.Tensor], *, first: bool
    ) -> None:
        """Put it on a weight, or on the bias of a layer whose outputs it multiplies; arguments as of ``LowRank``."""
        vector = self.vector(view)
        weight.mul_(vector if self.of_columns or weight.dim() == 1 else vector[:, None])


Change = LowRank | Shift | Vector

_buffers = Buffers()


@dataclass(frozen=True)
class Adapter:
    """One adapter, matched to the tensors of its base.

    Attributes:
        folder: where its files are.
        changes: what it does to tensors, by the names that the source has for them.
        replaced: tensors that it holds in full instead (``modules_to_save``), by the same names.
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
    """What an adapter must know of the model under it.

    Attributes:
        shapes: of the source's tensors, by name.
        find: gives for names of tensors, as modules of the model go by, the source's names; None where it has none.
        turned: names of weights stored as inputs by outputs.
        tied: names of tensors that serve twice, as embedding and as head.
    """

    shapes: Mapping[str, Sequence[int]]
    find: Callable[[Sequence[str]], Mapping[str, str | None]]
    turned: frozenset[str]
    tied: frozenset[str]


def fold(stored: torch.Tensor, changes: Sequence[Change], view: Callable[[TensorEntry], torch.Tensor]) -> torch.Tensor:
    """A stored tensor with changes folded in, in their order: float32, on the CPU, in memory of its own.

    Args:
        view: gives the tensor of an entry.
    """
    weight = _buffers.empty(stored.shape).copy_(stored)
    for number, change in enumerate(changes):
        change.apply(weight, stored, view, first=number == 0)
    return weight


def open_adapter(folder: Path, base: Base, place: str, expert: int | None = None) -> Adapter:
    """Open an adapter's folder and match all of it to its base, headers only.

    Args:
        expert: which one, of a folder that holds several (``expert_files``).

    Raises:
        InputError: it is broken, of a kind that cannot be folded, or made for another model.
    """
    check_files(folder, place)
    if not has(folder, CONFIG):
        raise InputError(
            place, f"{folder} is not an adapter: it has no {CONFIG}", "Name models separately; a plus adds adapters."
        )
    config = with_one_rank(load_json(folder / CONFIG, place))
    _check_config(config, place)
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
    reader = _Reader(folder, config, base, place, rows)
    changes, replaced = reader.read(stored)
    dora = any(isinstance(change, LowRank) and change.magnitude is not None for change in changes.values())
    if config.get("use_dora") and not dora:
        raise InputError(place, f"{CONFIG}: use_dora is true, but the adapter holds no lora_magnitude_vector", _AGAIN)
    named = config.get("base_model_name_or_path")
    return Adapter(
        folder, changes, replaced, (folder / CONFIG, folder / WEIGHTS), named if isinstance(named, str) else ""
    )


def _check_config(config: Mapping[str, Any], place: str) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        problem = f"{CONFIG}: peft_type is {kind!r}; only IA3, and LORA and its variants, can be folded"
        raise InputError(place, problem, _FOLD)
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InputError(place, f"{CONFIG}: {key} is not supported", _FOLD)
    if kind == "LORA":
        _check_lora(config, place)


def _check_lora(config: Mapping[str, Any], place: str) -> None:
    start = str(config.get("init_lora_weights"))
    if start not in _PLAIN_STARTS:
        raise InputError(
            place,
            f"{CONFIG}: init_lora_weights is {start!r}, so it was trained on a base that is not the model you name",
            "Save it with peft's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it.",
        )
    for key in ("r", "lora_alpha"):
        if not _positive(config.get(key)):
            wrong = printable(repr(config.get(key)), 100)
            problem = f"{CONFIG}: {key} is {wrong}; it must be a number above 0 and at most {_MOST_SCALE:g}"
            raise InputError(place, problem)
    for key in ("use_dora", "use_rslora"):
        if not isinstance(config.get(key), bool | None):
            raise InputError(place, f"{CONFIG}: {key} is {printable(repr(config[key]), 100)}; it must be true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_positive(value) for value in patterns.values()):
            raise InputError(place, f"{CONFIG}: {key} must give numbers by module")
        if len(patterns) > _MOST_PATTERNS:
            raise InputError(place, f"{CONFIG}: {key} has {len(patterns):,} patterns, which no adapter needs", _FOLD)
        for pattern in patterns:
            try:
                re.compile(_in_full(pattern))
            except (re.error, RecursionError, OverflowError) as error:
                shown = printable(repr(pattern), 100)
                raise InputError(place, f"{CONFIG}: {key} has a broken pattern {shown} ({error})", _FOLD) from None


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _MOST_SCALE


@functools.lru_cache(_MOST_PATTERNS)
def _compiled(pattern: str) -> Any:
    return regex.compile(_in_full(pattern))


def _in_full(pattern: str) -> str:
    """A pattern of PEFT for the ends of names, as it matches a whole name."""
    return rf"(.*\.)?({pattern})$"


@dataclass(frozen=True)
class _Reader:
    """Sorts an adapter's tensors by what they do to which tensor of the base."""

    folder: Path
    config: Mapping[str, Any]
    base: Base
    place: str
    routers: Mapping[str, tuple[TensorEntry, int]] = field(default_factory=dict)
    deadline: float = field(default_factory=lambda: time.thread_time() + _PATTERN_SECONDS)

    def read(self, stored: Mapping[str, TensorEntry]) -> tuple[dict[str, Change], dict[str, TensorEntry]]:
        modules, whole = self._sorted(stored)
        weights, biases = ([f"{m}.{field}" for m in modules] for field in ("weight", "bias"))
        names = self.base.find([*weights, *biases, *whole])
        changes: dict[str, Change] = {}
        for module, tensors in modules.items():
            if self.config.get("peft_type") == "IA3":
                found = self._vectors(module, tensors, has_bias=names[f"{module}.bias"] is not None)
            else:
                found = self._module(module, tensors)
            for target, change in found:
                changes[self._known(names, target)] = change
        self._check_shapes(changes)
        replaced = {self._known(names, name): entry for name, entry in whole.items()}
        for name, entry in replaced.items():
            if entry.shape != tuple(self.base.shapes[name]):
                raise self._misfit(name, entry.shape)
        self._check_tied(changes, whole, names)
        return changes, replaced

    def _sorted(
        self, stored: Mapping[str, TensorEntry]
    ) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
        """The factors of each module by their kind, and the tensors that are held in full, by their names."""
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

    def _vectors(
        self, module: str, tensors: Mapping[str, TensorEntry], *, has_bias: bool
    ) -> Iterator[tuple[str, Change]]:
        vector = tensors.get("ia3_l")
        if vector is None or len(tensors) > 1 or len(vector.shape) != 2 or 1 not in vector.shape:
            problem = f"the adapter's tensors for {module} are not a vector: {', '.join(tensors)}"
            raise InputError(self.place, problem, _FOLD)
        of_inputs = vector.shape[1] != 1
        yield f"{module}.weight", Vector(vector, of_inputs, turned=False)
        if has_bias and not of_inputs:
            yield f"{module}.bias", Vector(vector, of_inputs, turned=False)

    def _module(self, module: str, tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Change]]:
        embedded = "lora_embedding_A" in tensors
        infix = "lora_embedding_" if embedded else "lora_"
        down, up = tensors.get(infix + "A"), tensors.get(infix + "B")
        known = {infix + "A", infix + "B", infix + "B.bias", "lora_magnitude_vector"}
        if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or not tensors.keys() <= known:
            raise InputError(
                self.place,
                f"the adapter's tensors for {module} are not a pair of matrices: {', '.join(tensors)}",
                _FOLD,
            )
        scale = self._scale(module, down.shape[0])
        target = f"{module}.weight"
        magnitude, router = tensors.get("lora_magnitude_vector"), self.routers.get(module)
        if router is not None and (router[0].shape[1:] != down.shape[1:] or router[1] >= router[0].shape[0]):
            problem = f"the router of {module} has the shape {list(router[0].shape)}, which is none of expert "
            raise InputError(self.place, f"{problem}{router[1]} with {down.shape[1]} inputs", _AGAIN)
        yield target, LowRank(down, up, scale, embedded, magnitude, router)
        if (bias := tensors.get(infix + "B.bias")) is not None:
            yield f"{module}.bias", Shift(bias, scale)

    def _scale(self, module: str, rank: int) -> float:
        expected = self._of_pattern("rank_pattern", module, "r")
        if rank != expected:
            raise InputError(self.place, f"{CONFIG}: the rank of {module} is {expected}, but its tensors have {rank}")
        alpha = self._of_pattern("alpha_pattern", module, "lora_alpha")
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _of_pattern(self, key: str, module: str, otherwise: str) -> Any:
        for pattern, value in (self.config.get(key) or {}).items():
            try:
                if _compiled(pattern).match(module, timeout=_PATTERN_SECONDS):
                    return value
                if time.thread_time() > self.deadline:
                    raise TimeoutError
            except (TimeoutError, regex.error, RecursionError):
                shown = printable(repr(pattern), 100)
                problem = f"{CONFIG}: {key} has the pattern {shown}, which cannot be looked for in time"
                raise InputError(self.place, problem, _FOLD) from None
        return self.config[otherwise]

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
            wanted = tuple(self.base.shapes[name])
            if isinstance(change, Shift):
                if change.by.shape != wanted:
                    raise self._misfit(name, change.by.shape)
                continue
            if isinstance(change, Vector):
                changes[name] = self._vector_for(name, replace(change, turned=name in self.base.turned))
                continue
            turned = change.turned or name in self.base.turned
            changes[name] = replace(change, turned=turned)
            made = (change.up.shape[0], change.down.shape[1])
            if change.up.shape[1] != change.down.shape[0] or (made[::-1] if turned else made) != wanted:
                raise self._misfit(name, made[::-1] if turned else made)
            if change.magnitude is not None and math.prod(change.magnitude.shape) != made[0]:
                raise self._misfit(name, change.magnitude.shape)

    def _vector_for(self, name: str, change: Vector) -> Vector:
        wanted, length = tuple(self.base.shapes[name]), math.prod(change.by.shape)
        made = (*wanted[:-1], length) if change.of_columns else (length, *wanted[1:])
        if made != wanted:
            raise self._misfit(name, made)
        return change

    def _misfit(self, name: str, shape: Sequence[int]) -> InputError:
        wanted = list(self.base.shapes[name])
        hint = "Name the base that it was trained on."
        if list(shape[1:]) == wanted[1:]:
            hint += f" If it adds tokens to the vocabulary: {_FOLD}"
        problem = f"the adapter {self.folder} is for a model whose {name} has shape {list(shape)}; here it is {wanted}"
        return InputError(self.place, problem, hint)

    def _check_tied(
        self, changes: Mapping[str, Change], whole: Mapping[str, TensorEntry], names: Mapping[str, str | None]
    ) -> None:
        """A tensor that is embedding and head at once can only change as both."""
        for name in self.base.tied:
            held = [_view(entry) for target, entry in whole.items() if names[target] == name]
            equal = len(held) == 2 and torch.equal(*held)  # both are written when both were trained
            if name in changes or (held and not equal):
                raise InputError(
                    self.place,
                    f"the adapter {self.folder} changes {name} as embedding or as head, but in this model it is both",
                    "Untie the base first: save it with tie_word_embeddings false and the embedding again as the head.",
                )


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _view(entry: TensorEntry) -> torch.Tensor:
    return view_entry(entry, map_file(entry.file))
