"""Sources: model folders opened for merging; every header is checked completely before any weight is read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.adapter_changes import Change, LowRank, Started, Vector
from evomerge.checkpoints.adapter_settings import CONFIG as ADAPTER_CONFIG
from evomerge.checkpoints.adapters import Adapter, Base, fold, open_adapter
from evomerge.checkpoints.blueprint import Blueprint
from evomerge.checkpoints.config import check_config, check_lists
from evomerge.checkpoints.folder import (
    INDEX,
    check_files,
    check_tokenizer,
    find_tensors,
    has,
    load_config,
    load_json,
    processor_files,
    refuse_unreadable,
    tokenizer_files,
)
from evomerge.checkpoints.headers import STORED_DTYPES, TORCH_DTYPES, TensorEntry, map_file, release_pages, view_entry
from evomerge.checkpoints.kept_blueprints import blueprint
from evomerge.checkpoints.kinds import check_kind, headless
from evomerge.checkpoints.layered import LayerSetting, with_text_settings
from evomerge.checkpoints.parts import Fold, Part, check_shape, entries
from evomerge.checkpoints.places import find_folder, split_reference
from evomerge.checkpoints.prompts import SourcePrompt, open_prompt
from evomerge.checkpoints.references import refuse_adapter_alone
from evomerge.errors import InputError
from evomerge.files import split_expert
from evomerge.printable import printable
from evomerge.recipes.stack import Role, renumber

_MAX_NAME = 100  # characters of a tensor's name in a message


@dataclass
class Source:
    """An opened model folder: headers, configuration, and its tensors on demand.

    Attributes:
        name: its short name in the search file.
        reference: the folder or hub id as given, with its adapters.
        place: where the reference was given, for errors ("sources.maths").
        folder: the folder with the model's files.
        config: config.json as parsed JSON.
        settings, layered, computing, image_settings: its values as read by transformers, with defaults filled in; see
            ``Blueprint``.
        float32: names of the tensors that are float32 in a model of another dtype, by the name of that dtype.
        reordering_problem: why its layers cannot be moved to other positions; empty if they can.
        text_type: the model type of the part that processes text; for a text model, that of the whole model.
        tensors: every tensor of the model and its location, by the name that transformers writes it under, in the order
            of the model's modules. Tensors of a vision-language model that belong to its text model have their names in
            a plain text model; see ``written``. Surplus tensors in the files of a text model are ignored, and named in
            ``warnings``.
        written: for a vision-language model, the name of each tensor in its files.
        carried: surplus tensors in the files of such a model, by name: transformers ignores them, and a merge copies
            them unchanged.
        doubled: second copies of tied tensors in the files of such a model, with their name in ``tensors``.
        parts: the part of the transformers model that each tensor is: most are a whole tensor with the same name.
        roles: the role of each tensor. A tied head has no tensor of its own, so there is then no role "head".
        layers: the number of layers in the stack.
        tied: whether the head shares the embedding's tensor, and has none of its own.
        transposed: names of the weights that are stored as inputs by outputs, such as those of GPT-2's layers.
        folds, normed: how the scales of a path are folded into its tensors: see ``Blueprint``.
        files: all files that define the model: weights, index, configurations, tokenizer, adapters.
        warnings: warnings, as sentences.
        adapters: the folders of the adapters on it, in order.
        changes: the changes that adapters make to tensors, by name, in the order of the adapters.
        replaced: the tensors that adapters replace completely.
        tokenizer_texts: the files of the tokenizer, by name, if they replace those in the folder.
        prompt: the soft prompt or prefix that was named with it; its weights are only those of the model.
    """

    name: str
    reference: str
    place: str
    folder: Path
    config: dict[str, Any]
    settings: Mapping[str, Any]
    layered: Mapping[str, LayerSetting]
    computing: Mapping[str, str]
    image_settings: Mapping[str, str]
    reordering_problem: str
    text_type: str
    float32: Mapping[str, frozenset[str]]
    tensors: Mapping[str, TensorEntry]
    parts: Mapping[str, Part]
    roles: Mapping[str, Role]
    layers: int
    tied: bool
    transposed: frozenset[str]
    folds: Mapping[str, Fold]
    normed: bool
    files: tuple[Path, ...]
    warnings: tuple[str, ...]
    written: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, TensorEntry] = field(default_factory=dict)
    doubled: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Path, ...] = ()
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    tokenizer_texts: Mapping[str, str] = field(default_factory=dict)
    prompt: SourcePrompt | None = None
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # a pickled map would be all of the weights

    @property
    def is_table(self) -> bool:
        """Whether it is a table of tensors (``evomerge.raw.table``) and not a transformers model."""
        return not self.config

    @property
    def takes_images(self) -> bool:
        """Whether it reads images as well as text."""
        return bool(self.written)

    @property
    def described(self) -> dict[str, Any]:
        """Its config.json completed with the sizes of its text model, which a vision-language model may omit."""
        known = {key: value for key, value in self.settings.items() if value is not None and key != "depth"}
        return with_text_settings(self.config, known) if self.takes_images else self.config

    @cached_property
    def _written_in_layer(self) -> dict[str, str]:
        """The names in the files of tensors of any layer, with layer number 0 on both sides."""
        of_layers = ((name, role) for name, role in self.roles.items() if role.layer is not None)
        return {renumber(name, role, 0): renumber(self.written[name], role, 0) for name, role in of_layers}

    def written_as(self, name: str, role: Role) -> str:
        """The name in the files of a tensor of a model merged after the example of this one.

        Args:
            name: its name in ``tensors``, possibly with a layer number that this model does not have.
            role: its role, with the same layer number.
        """
        if not self.takes_images:
            return name
        if role.layer is None:
            return self.written[name]
        return renumber(self._written_in_layer[renumber(name, role, 0)], Role(role.kind, 0), role.layer)

    @property
    def names(self) -> dict[str, str]:
        """The name of each tensor in the transformers model; experts of a layer may share one."""
        return {name: part.tensor for name, part in self.parts.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its stored weights."""
        return _dominant_dtype(self.tensors)

    def dtype_of(self, name: str, dtype: torch.dtype | None, model: torch.dtype) -> torch.dtype:
        """A tensor's dtype in a model of dtype ``model``, given the stored dtype of weights, or None for its own."""
        if name in self.float32.get(str(model).removeprefix("torch."), ()):
            return torch.float32
        return dtype or TORCH_DTYPES[self.tensors[name].dtype]

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, which must never be written to.

        If no adapter changes it, it is a view of the mapped file in its stored dtype; otherwise it is float32, and
        folded again by every call.
        """
        stored = self._view(self.tensors[name])
        changes = self.changes.get(name)
        return fold(stored, changes, self._view) if changes else stored

    def is_mapped(self, name: str) -> bool:
        """Whether ``read`` returns a view of a mapped file, which is free to request again."""
        return name not in self.changes

    def read_stored(self, name: str) -> torch.Tensor:
        """A tensor as stored in the files, without the changes by adapters: a view, in its stored dtype."""
        return self._view(self.tensors[name])

    def low_rank(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """L, R and s of each adapter that adds s L R to a tensor; see ``LowRank.factors``. None has a magnitude."""
        changes = self.changes.get(name, ())
        return [(*change.factors(self._view), change.scale) for change in changes if isinstance(change, LowRank)]

    def vectors(self, name: str) -> list[tuple[torch.Tensor, bool]]:
        """Each (IA)3 vector on a weight or bias, float32 [n], and whether it multiplies the columns as stored."""
        changes = self.changes.get(name, ())
        return [(change.vector(self._view), change.of_columns) for change in changes if isinstance(change, Vector)]

    def release(self, name: str) -> None:
        """Let the system reclaim the memory of a tensor in the mapped files. It is read again when needed."""
        entry = self.tensors[name]
        if entry.file in self._maps:
            release_pages(self._maps[entry.file], entry.begin, entry.end)

    def release_files(self) -> None:
        """The same for all tensors in the mapped files."""
        for mapped in self._maps.values():
            release_pages(mapped, 0, len(mapped))

    def read_carried(self, name: str) -> torch.Tensor:
        """One of ``carried``, like ``read_stored``."""
        return self._view(self.carried[name])

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        if entry.file not in self._maps:
            self._maps[entry.file] = map_file(entry.file)
        return view_entry(entry, self._maps[entry.file])


def open_source(name: str, reference: str, *, place: str, root: Path | None = None, prompts: bool = False) -> Source:
    """Open a model folder and check all of it except the values of its weights.

    Args:
        name: the short name of the source.
        reference: a folder, or ``org/name`` with an optional ``@revision`` on the Hugging Face hub, followed by
            adapters, each after a plus; for a folder with several experts `folder#3`.
        place: where the reference was given, for errors.
        root: the folder that relative paths start from; the current folder if None.
        prompts: whether a soft prompt or a prefix is allowed in place of an adapter; not if weights are wanted.

    Raises:
        InputError: the model is unavailable, or anything about it is broken, unsafe or unsupported.
    """
    parts = split_reference(reference, root)
    folder, *adapters = (find_folder(part, place, root) for part in parts)
    experts = [split_expert(part, root)[1] for part in parts[1:]]
    try:
        source, plan = _open(name, reference, place, folder)
        if (prompted := _prompted(source, adapters)) is None:
            base, numbered = _base(source, plan), zip(adapters, experts, strict=True)
            return _adapted(source, [open_adapter(adapter, base, place, expert) for adapter, expert in numbered])
    except OSError as error:
        raise InputError(place, f"{error.filename or folder} cannot be read ({error.strerror})") from error
    if not prompts:
        refuse_prompt(prompted)
    return prompted


def refuse_prompt(source: Source) -> None:
    """Reject a source with a prompt if its weights are wanted. Raises InputError."""
    if source.prompt is not None:
        problem = f"{source.prompt.folder} is {source.prompt.facts.text}, which changes no weights"
        raise InputError(source.place, problem, "Search over prompts: `space: {kind: prompts}`.")


def _open(name: str, reference: str, place: str, folder: Path) -> tuple[Source, Blueprint]:
    """The model alone, and its blueprint, which says where transformers has its tensors."""
    linked = check_files(folder, place)
    if has(folder, ADAPTER_CONFIG):
        refuse_adapter_alone(folder, reference, place)
    refuse_unreadable(folder, place)
    config = load_config(folder, place)
    check_kind(config, place)
    check_config(config, place)
    if has(folder, "generation_config.json"):
        generation = load_json(folder / "generation_config.json", place)
        check_lists(generation, "generation_config.json", place)
    check_tokenizer(folder, place)
    stored = find_tensors(folder, place)
    plan = blueprint(config, {name: entry.shape for name, entry in stored.items()}, place)
    tensors = _tensors(stored, plan, config, place)
    _check_copies(stored, plan, place)
    used = set(plan.parts.values()) | {Part(part.tensor) for part in plan.parts.values()}
    extra = stored.keys() - {name for part, name in plan.located if part in used} - plan.copies.keys()
    written = _written(plan)
    if written:
        _check_explained({name: stored[name] for name in extra}, plan, place)
    source = Source(
        name=name,
        reference=reference,
        place=place,
        folder=folder,
        config=config,
        settings=plan.settings,
        layered=plan.layered,
        computing=plan.computing,
        image_settings=plan.image_settings,
        reordering_problem=plan.reordering_problem,
        text_type=plan.text_type,
        float32=plan.float32,
        tensors=tensors,
        parts=plan.parts,
        roles=plan.roles,
        layers=plan.layers,
        tied=bool(plan.tied),
        transposed=plan.transposed,
        folds=plan.folds,
        normed=plan.normed,
        files=_files(folder, stored, bool(written)),
        warnings=_warnings(tensors, plan.float32, [] if written else sorted(extra), linked),
        written=written,
        carried={name: stored[name] for name in sorted(extra)} if written else {},
        doubled={copy: name for copy, held in plan.copies.items() for name in written if written[name] == held},
    )
    return source, plan


def _written(plan: Blueprint) -> dict[str, str]:
    """The name of each tensor in the files of a vision-language model; empty for others.

    A tensor that the files store in pieces, or combined with others, has the name under which transformers writes it.
    """
    held = dict(plan.located)
    return {name: held.get(plan.parts[name], written) for name, written in plan.written.items()}


def _check_explained(extra: Mapping[str, TensorEntry], plan: Blueprint, place: str) -> None:
    """Reject unknown tensors of a vision-language model, and those that cannot be copied unchanged.

    Raises:
        InputError: naming them.
    """
    if unknown := sorted(name for name in extra if not plan.ignores(name)):
        problem = f"the files hold tensors that are no part of the model of config.json: {_few(unknown)}"
        raise InputError(place, problem, "See that config.json belongs to these weights; remove what is not the model.")
    if strange := sorted(name for name, entry in extra.items() if entry.dtype not in STORED_DTYPES):
        problem = f"{strange[0]}, which transformers ignores, is stored as {extra[strange[0]].dtype}"
        raise InputError(place, problem, f"It can be taken along as one of {', '.join(STORED_DTYPES)}.")


def _prompted(source: Source, adapters: Sequence[Path]) -> Source | None:
    """The source with the prompt given in place of an adapter; None if none of the adapters is a prompt."""
    opened = [open_prompt(folder, source.settings, source.layers, source.place) for folder in adapters]
    prompts = [prompt for prompt in opened if prompt is not None]
    if not prompts:
        return None
    if len(adapters) > 1:
        other = next((folder for folder in adapters if folder != prompts[0].folder), adapters[0])
        problem = f"{prompts[0].folder} is {prompts[0].facts.text}, and {other} is given with it"
        hint = "Name one prompt a source, on the model that it was trained on; a search puts several together."
        raise InputError(source.place, problem, hint)
    (prompt,) = prompts
    warnings = (*source.warnings, *_trained_elsewhere(prompt.folder, prompt.base, source.reference))
    return replace(source, prompt=prompt, files=(*source.files, *prompt.files), warnings=warnings)


def _trained_elsewhere(adapter: Path, base: str, reference: str) -> tuple[str, ...]:
    """A warning if an adapter names another base than the model that it is applied to."""
    model = reference.partition("+")[0]
    if not base or Path(base).name == Path(model.partition("@")[0]).name:
        return ()
    return (printable(f"the adapter {adapter} was trained on {base}; it is put on {model}"),)


def _base(source: Source, plan: Blueprint) -> Base:
    def find(names: Sequence[str]) -> dict[str, str | None]:
        # Imported only here, because importing transformers takes seconds and renames are not worth caching.
        from evomerge.checkpoints.layout import find_names
        from evomerge.checkpoints.structure import empty_model, parse_config

        model = empty_model(parse_config(source.config, source.place), source.place)
        return find_names(model, source.parts, names)

    pieces: dict[str, list[tuple[str, Part]]] = defaultdict(list)
    for name, part in source.parts.items():
        pieces[part.tensor].append((name, part))
    return Base(tensors=source.tensors, pieces=pieces, find=find, transposed=plan.transposed, tied=plan.tied)


def _adapted(source: Source, adapters: Sequence[Adapter]) -> Source:
    """The source with adapters on it, each applied on top of the previous ones."""
    tensors = dict(source.tensors)
    changes: dict[str, tuple[Change, ...]] = {}
    warnings = source.warnings
    for adapter in adapters:
        for name, entry in adapter.replaced.items():
            tensors[name] = entry
            changes.pop(name, None)
        for name, change in adapter.changes.items():
            changes[name] = (*changes.get(name, ()), change)
            if sum(isinstance(one, Started) for one in changes[name]) > 1:
                problem = f"{adapter.folder} and an adapter before it both began as a part of {name} (PiSSA, OLoRA)"
                raise InputError(source.place, problem, "Fold the first with peft's `merge_and_unload`.")
        warnings += _trained_elsewhere(adapter.folder, adapter.base, source.reference)
        warnings += _changes_seeing(adapter, source.roles)
    files = (*source.files, *(file for adapter in adapters for file in adapter.files))
    return replace(
        source,
        tensors=tensors,
        adapters=tuple(adapter.folder for adapter in adapters),
        changes=changes,
        replaced=tuple(dict.fromkeys(name for adapter in adapters for name in adapter.replaced)),
        files=files,
        warnings=warnings,
    )


def _changes_seeing(adapter: Adapter, roles: Mapping[str, Role]) -> tuple[str, ...]:
    """A warning if an adapter changes the vision parts: a tower may have a ``q_proj``, too."""
    seeing = [name for name in {**adapter.changes, **adapter.replaced} if roles[name].kind == "vision"]
    if not seeing:
        return ()
    said = f"the adapter {adapter.folder} changes {len(seeing)} tensors of what reads images ({_few(seeing)})"
    return (printable(f"{said}; a merge has them where this source gives the tokenizer"),)


def _tensors(
    stored: Mapping[str, TensorEntry], plan: Blueprint, config: Mapping[str, Any], place: str
) -> dict[str, TensorEntry]:
    """The location of every tensor of the model, checked for presence, shape and dtype."""
    tensors = dict(entries(plan.parts, dict(plan.located), stored))
    if missing := [name for name in plan.parts if name not in tensors]:
        hint = "Complete the download, or check that config.json belongs to these weights."
        if plan.head.issuperset(missing):
            if (error := headless(config, place)) is not None:
                raise error
            hint = "If its head is its embedding, set tie_word_embeddings to true in a copy of config.json."
        raise InputError(place, f"tensors that config.json asks for are missing from the files: {_few(missing)}", hint)
    for name, entry in tensors.items():
        check_shape(name, entry.shape, plan.shapes[name], place)
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(
                place,
                f"{name} is stored as {entry.dtype}; only {', '.join(TORCH_DTYPES)} can be merged",
                "Use the model in full precision; F8 and integers are what quantised models are stored as.",
            )
    return tensors


def _check_copies(stored: Mapping[str, TensorEntry], plan: Blueprint, place: str) -> None:
    """Reject second copies of tied tensors in the files unless they are equal."""
    for copy, original in plan.copies.items():
        one, other = stored[copy], stored[original]
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not same or not torch.equal(view_entry(one, map_file(one.file)), view_entry(other, map_file(other.file))):
            raise InputError(
                place,
                f"config.json ties {copy} to {original} (tie_word_embeddings), but they differ in the files",
                "Set tie_word_embeddings to false in a copy of config.json, if the model was trained so.",
            )


def _files(folder: Path, stored: Mapping[str, TensorEntry], sees: bool) -> tuple[Path, ...]:
    weights = sorted({entry.file for entry in stored.values()})
    side = [folder / name for name in ("config.json", "generation_config.json", INDEX)]
    processor = processor_files(folder) if sees else []
    return (*weights, *(file for file in side if file.exists()), *tokenizer_files(folder), *processor)


def _warnings(
    tensors: Mapping[str, TensorEntry],
    float32: Mapping[str, frozenset[str]],
    extra: list[str],
    linked: Sequence[str],
) -> tuple[str, ...]:
    sentences = []
    if linked:
        sentences.append(f"links to files of another folder: {_few(list(linked))}")
    if extra:
        sentences.append(f"left out, being no part of the model: {_few(extra)}")
    most = str(_dominant_dtype(tensors)).removeprefix("torch.")
    if len({entry.dtype for name, entry in tensors.items() if name not in float32.get(most, ())}) > 1:
        sentences.append(f"the tensors are of several dtypes; most are {most}")
    return tuple(printable(sentence) for sentence in sentences)


def _dominant_dtype(tensors: Mapping[str, TensorEntry]) -> torch.dtype:
    elements: Counter[str] = Counter()
    for entry in tensors.values():
        elements[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPES[elements.most_common(1)[0][0]]


def _few(names: list[str]) -> str:
    return ", ".join(printable(name, _MAX_NAME) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
