"""Where the tensors of a checkpoint belong in the model.

Most are a whole tensor of the model under its own name. Some have been renamed by transformers (``embed_out`` of a
GPT-NeoX is now ``lm_head``) or lack the model's prefix (``h.0`` for ``transformer.h.0``). And some are a piece of one:
in a checkpoint of a mixture of experts each expert has its own tensors, but in the model all experts share one. Names
and pieces come from transformers' own rules for loading and saving; there is no list of names here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.blueprint import Blueprint
from evomerge.checkpoints.computing import computing_settings, image_settings
from evomerge.checkpoints.layered import LayerSetting, layer_settings, with_text_settings, written_settings
from evomerge.checkpoints.parts import COPY_AGAIN, Cut, Part, check_shape
from evomerge.checkpoints.residual import residual_writers
from evomerge.checkpoints.roles import model_roles
from evomerge.checkpoints.stacking import EmptyStack, path_problem
from evomerge.checkpoints.structure import (
    decoder_of,
    empty_model,
    layer_stack,
    loaded_in_float32,
    module_name,
    parse_config,
    stored_tensors,
    takes_images,
    text_config,
    tied_names,
)
from evomerge.errors import InputError

_TENSORS_AHEAD = 500
"""A model may have this many tensors more than twice those in the files; beyond that it is not built at all, and the
error does not name the missing ones."""

_DECODER, _HEAD = "model.", "lm_head."
"""Prefixes of the decoder and of the head in the text models that are part of models with images."""

_COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Tables that older checkpoints contain, and that are ignored if the model has a buffer whose name ends so."""

_SETTINGS = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
)  # fmt: skip


def checkpoint_parts(model: Any) -> dict[str, Part]:
    """The tensors that transformers writes for a model, by name, in the order of its modules, and the part each one is.

    Every tensor that the model stores is covered exactly once. A tensor whose written form does not consist of pieces
    of it keeps its name in the model, which transformers can read as well.
    """
    stored = stored_tensors(model)
    try:
        written = revert_weight_conversion(model, stored)  # on the meta device: names and shapes alone
    except Exception:  # a rule that cannot be reverted without values
        written = stored
    parts: dict[str, list[tuple[str, Part]]] = defaultdict(list)
    for name, part in parts_in_model(model, {name: tuple(t.shape) for name, t in written.items()})[0].items():
        if part.tensor in stored and part.of(stored[part.tensor]).shape == written[name].shape:
            parts[part.tensor].append((name, part))
    layout: dict[str, Part] = {}
    for in_model, tensor in stored.items():
        pieces = parts[in_model]
        whole = sum(part.of(tensor).numel() for _, part in pieces) == tensor.numel()
        layout |= dict(pieces) if whole else {in_model: Part(in_model)}
    return layout


def parts_in_model(model: Any, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Part], list[str]]:
    """The part of the model that each tensor of a checkpoint is: where transformers would load it.

    Tensors that the model does not know keep their names.

    Args:
        shapes: of the checkpoint's tensors, by name.

    Returns:
        The parts by name, and the names of tensors from which loading would compute tensors of the model.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    tensors, prefix = model.state_dict(), model.base_model_prefix
    parts: dict[str, Part] = {}
    pieces: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):  # the order in which transformers counts experts
        new, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
        if new not in tensors:
            new, pattern = rename_source_key(name, [], [], prefix, tensors)
        if pattern is None:
            parts[name] = Part(new)
        else:
            pieces[new][pattern].append(name)
    computed: list[str] = []
    for in_model, names in pieces.items():
        converter = by_pattern[next(iter(names))]
        ordered = [names[pattern] for pattern in converter.source_patterns if pattern in names]
        cuts = _cuts(converter.operations, ordered, shapes)
        if cuts is None:
            computed.extend(name for group in ordered for name in group)
        else:
            parts |= {name: Part(in_model, cut) for name, cut in cuts.items()}
    return parts, computed


def _cuts(
    operations: Sequence[Any], groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Cut, ...]] | None:
    """The position of each tensor in the one that the operations make of all; None for operations unknown here."""
    steps = list(operations)
    stacked = isinstance(steps[0], MergeModulelist) and steps[0].dim == 0
    joined = [step.dim for step in steps[stacked:] if isinstance(step, Concatenate)]
    if stacked + len(joined) != len(steps) or len(joined) > 1 or (stacked and not joined and len(groups) > 1):
        return None
    if not joined:
        return {name: (index,) for index, name in enumerate(groups[0])}
    axis = joined[0] - stacked  # in the single tensors
    if axis < 0 or any(len(shapes[name]) <= axis for group in groups for name in group):
        return None
    cuts: dict[str, tuple[Cut, ...]] = {}
    start = 0
    for group in groups:
        for index, name in enumerate(group):
            shape = shapes[name]
            full = [(0, size) for size in shape[:axis]]
            cuts[name] = (*([index] if stacked else []), *full, (start, start + shape[axis]))
            start += 0 if stacked else shape[axis]
        start += shapes[group[0]][axis] if stacked else 0
    return cuts


def locate(model: Any, shapes: Mapping[str, Sequence[int]], place: str) -> dict[Part, str]:
    """For each part in a checkpoint, the name of the tensor that is this part.

    Args:
        shapes: of the checkpoint's tensors, by name.
        place: for errors.

    Raises:
        InputError: a tensor would be computed while loading, or is there twice, or a layer lacks an expert.
    """
    parts, computed = parts_in_model(model, shapes)
    if computed:
        raise InputError(
            place,
            f"{computed[0]} is not a tensor of the model but something that others are computed from while loading",
            f"{type(model).__name__} is not supported when it is stored so.",
        )
    located: dict[Part, str] = {}
    forms: dict[str, str] = {}  # whole or in pieces
    tensors = model.state_dict()
    for name, part in parts.items():
        other = located.get(part) or forms.get(part.tensor, "")
        if part in located or (other and bool(part.cuts) != bool(parts[other].cuts)):
            raise InputError(place, f"the files hold {part.tensor} twice: as {other} and as {name}")
        located[part] = forms[part.tensor] = name
    _check_experts(located, tensors, place)
    return located


def make_blueprint(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Blueprint:
    """The blueprint for a checked config.json and the tensors of a checkpoint; ``kept_blueprints`` caches it.

    Raises:
        InputError: transformers has no such model, or the tensors do not belong to it.
    """
    parsed = parse_config(config, place)
    text = text_config(parsed)
    if takes_images(parsed) and getattr(text, "cross_attention_layers", None):
        problem = f"is a {parsed.model_type}, whose layers read images by cross-attention; such models are not"
        hint = "Models whose layers read images among the tokens of a text can be merged."
        raise InputError(place, f"{problem} supported", hint)
    layers: int = text.num_hidden_layers
    held = sum(0 not in shape for shape in shapes.values())  # names of empty tensors could be added for free
    if layers > held:  # before building that many modules
        raise InputError(place, f"config.json: num_hidden_layers is {layers}, but there are {held} tensors", COPY_AGAIN)
    model = empty_model(parsed, place, torch.bfloat16, _TENSORS_AHEAD + 2 * held)  # float32 tensors are so in any dtype
    written, stored = checkpoint_parts(model), stored_tensors(model)
    try:
        names = _names(model, written)
        parts = {names[name]: part for name, part in written.items()}
        roles = model_roles(model, layers)
    except LookupError as error:
        hint = "Only models with a stack of layers can be merged."
        raise InputError(place, f"cannot be merged: {error}", hint) from None
    located = locate(model, shapes, place)
    for part, name in located.items():
        if not part.cuts and part.tensor in stored:
            check_shape(name, shapes[name], stored[part.tensor].shape, place)
    name, stack = layer_stack(model, layers)
    writers = [residual_writers(layer, text.model_type, text) for layer in stack]
    folds = {
        f"{name}.{number}.{inside}": fold
        for number, layer_writers in enumerate(writers)
        for inside, fold in (layer_writers.tensors.items() if layer_writers else ())
    }
    depth = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layered = layer_settings(text.to_dict(), layers)
    ties = tied_names(model)
    head = getattr(model.get_output_embeddings(), "weight", None)
    copies = ((Part(copy), Part(original)) for copy, original in ties.items())
    return Blueprint(
        layers=layers,
        text_type=text.model_type,
        settings={field: _setting(text, field) for field in _SETTINGS} | {"depth": depth},
        layered=layered,
        computing=computing_settings(text, depth),
        image_settings=image_settings(parsed) if takes_images(parsed) else {},
        reordering_problem=_reordering_problem(config, EmptyStack(model, name, stack), depth, layered),
        parts=parts,
        written={name: own for own, name in names.items()} if takes_images(parsed) else {},
        ignored=_ignored(model),
        roles={name: roles[part.tensor] for name, part in parts.items()},
        shapes={name: tuple(part.of(stored[part.tensor]).shape) for name, part in parts.items()},
        located=tuple(located.items()),
        copies={located[copy]: located[original] for copy, original in copies if copy in located},
        tied=frozenset(name for name, part in parts.items() if part.tensor in ties.values()),
        float32=_float32(model, parts, stored),
        head=frozenset(name for name, part in parts.items() if stored[part.tensor] is head),
        transposed=frozenset(name for name, part in parts.items() if _is_transposed(_owner(model, part))),
        folds={n: folds[part.tensor] for n, part in parts.items() if part.tensor in folds} if all(writers) else {},
        normed=all(layer_writers is not None and layer_writers.normed for layer_writers in writers),
    )


def _names(model: Any, written: Mapping[str, Part]) -> dict[str, str]:
    """Our name for each tensor that transformers writes: for tensors of the text model, that in the text model alone.

    For experts that are written separately, it ends with the rest of their written name.

    Raises:
        LookupError: two tensors would have the same name.
    """
    if (decoder := decoder_of(model)) is model:
        return {name: name for name in written}
    inside, head = module_name(model, decoder) + ".", model.get_output_embeddings()
    of_head = "" if head is None else module_name(model, head) + "."
    first, part = next((name, part) for name, part in written.items() if part.tensor.startswith(inside))
    written_inside = first.removesuffix(part.tensor.removeprefix(inside))
    names: dict[str, str] = {}
    for name, part in written.items():
        if part.tensor.startswith(inside):
            rest = name.removeprefix(written_inside) if part.cuts else part.tensor.removeprefix(inside)
            names[name] = _DECODER + rest
        elif of_head and part.tensor.startswith(of_head):
            names[name] = _HEAD + part.tensor.removeprefix(of_head)
        else:
            names[name] = name
    if len({*names.values()}) < len(names):
        raise LookupError(f"a {type(model).__name__} has tensors of one name in and outside its text model")
    return names


def _ignored(model: Any) -> tuple[str, ...]:
    """Patterns of the names that transformers ignores when it loads a model, including tables of older checkpoints."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    for ending, pattern in _COMPUTED.items():
        if any(name.endswith(ending) for name, _ in model.named_buffers()):
            patterns.add(pattern)
    return tuple(sorted(patterns))


def _float32(model: Any, parts: Mapping[str, Part], stored: Mapping[str, torch.Tensor]) -> dict[str, frozenset[str]]:
    """Names of the tensors that stay in float32 in models of either 16-bit dtype; ``model`` is one in bfloat16."""
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    wider = wide | loaded_in_float32(model, torch.float16)
    kept = {"bfloat16": wide, "float16": wider}
    return {dtype: frozenset(n for n, part in parts.items() if part.tensor in names) for dtype, names in kept.items()}


def _setting(parsed: Any, field: str) -> Any:
    try:
        return getattr(parsed, field, None)
    except Exception:  # layers may differ in it, as in the heads of Gemma 4
        return None


def _reordering_problem(
    config: Mapping[str, Any], stack: EmptyStack, depth: str, layered: Mapping[str, LayerSetting]
) -> str:
    """Why layers cannot be moved, found by trying a path of all of them in reverse, in order, and again in reverse."""
    own = range(len(stack.layers))
    path = [*reversed(own), *own, *reversed(own)]
    settings = written_settings(layered, [{key: setting.values[n] for key, setting in layered.items()} for n in path])
    path_config = with_text_settings(config, {depth: len(path), **settings})
    return path_problem(path_config, [(stack, number) for number in path], stack)


def _is_transposed(owner: Any) -> bool:
    """Whether a module's weights are stored as inputs by outputs: those of GPT-2, and some experts in one tensor.

    ``is_transposed`` is an attribute that transformers sets for its own kernels for experts.
    """
    return isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False) is True


def _owner(model: Any, part: Part) -> Any:
    return model.get_submodule(part.tensor.rpartition(".")[0])


def find_names(model: Any, parts: Mapping[str, Part], names: Sequence[str]) -> dict[str, str | None]:
    """The tensor among ``parts`` that each name refers to, also by an older name or by that of a tied copy; or None."""
    by_part = {part: name for name, part in parts.items()}
    tied = tied_names(model)
    named = parts_in_model(model, dict.fromkeys(names, ()))[0]
    resolved: dict[str, str | None] = {}
    for name in names:
        part = named.get(name, Part(name))
        resolved[name] = name if name in parts else by_part.get(Part(tied.get(part.tensor, part.tensor)))
    return resolved


def _check_experts(located: Mapping[Part, str], tensors: Mapping[str, torch.Tensor], place: str) -> None:
    """Refuse a layer that lacks an expert: experts are numbered in order, so the next would take its place."""
    counts: dict[tuple[str, tuple[Cut, ...]], list[str]] = defaultdict(list)
    for part, name in located.items():
        if part.cuts and isinstance(part.cuts[0], int):
            counts[part.tensor, part.cuts[1:]].append(name)
    for (in_model, _), names in counts.items():
        if len(names) != tensors[in_model].shape[0]:
            raise InputError(
                place,
                f"there are {len(names)} experts like {names[0]}; config.json asks for {tensors[in_model].shape[0]}",
                "Complete the download, or check that config.json belongs to these weights.",
            )
