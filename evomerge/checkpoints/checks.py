"""Checks across sources, and of the values of their weights, before a search begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.folder import has, load_json
from evomerge.checkpoints.kept_blueprints import blueprint
from evomerge.checkpoints.parts import holders
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipes.stack import Blend, Hop, Role, StackRecipe, renumber

_SAME_SHAPE = "Merge fine-tunes of one base."
_SAME_TOWER = "Leave it out, and what reads images stays that of the tokenizer's source."
_SAME_PLACE = "Put layers where the model has layers of their kind, and take them from fine-tunes of one base."
_SAME_TOKENIZER = (
    "Say which tokens the merged model knows: `vocabulary: {kind: union}`, or `{kind: tokenizer}` for those of the "
    "tokenizer's source alone; in a mergekit configuration, `tokenizer_source: union` or a model."
)
_CHOOSE_TOKENIZER = "Say which source gives the tokenizer: `tokenizer: NAME`."

# Settings that change the meaning of weights of equal shape: two heads of 64 are not four of 32.
_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


def check_compatible(
    sources: Mapping[str, Source],
    recipe: StackRecipe | None = None,
    *,
    same_tokens: bool = True,
    same_special: bool = True,
) -> None:
    """Reject sources that cannot be mixed tensor by tensor.

    All are compared with the first: architecture, layers, tying, every tensor's name and shape, vocabulary and special
    tokens. The padding token may differ, because it never affects what a model computes.

    Args:
        recipe: determines which layers are mixed with each other. With a recipe, sources may differ in depth, and only
            tensors that are mixed must agree in shape.
        same_tokens: whether tokenizers must have the same tokens with the same ids. False for sources that ``align``
            has mapped to one vocabulary.
        same_special: whether texts must begin and end with the same tokens. False if the user chose the source that
            provides the tokenizer: then all sources must only know the others' special tokens.

    Raises:
        InputError: naming the two sources, what differs and both values.
    """
    first, *others = sources.values()
    vocabularies: dict[Path, dict[str, int]] = {}  # by folder: adapters on one model share its vocabulary

    def vocabulary(source: Source) -> dict[str, int]:
        if source.folder not in vocabularies:
            vocabularies[source.folder] = _vocabulary(source)
        return vocabularies[source.folder]

    known = vocabulary(first) if same_tokens else {}
    for other in others:
        _same_text_model(first, other)
        if recipe is None:
            _same(first, other, "number of layers", first.layers, other.layers)
        _same(
            first, other, "tie_word_embeddings", first.tied, other.tied,
            "Untie the tied one: set tie_word_embeddings to false and save the embedding again as the head.",
        )  # fmt: skip
        mine, theirs = first.settings, other.settings
        _same(first, other, "vocab_size", mine["vocab_size"], theirs["vocab_size"], _SAME_TOKENIZER)
        _same(first, other, "hidden_size", mine["hidden_size"], theirs["hidden_size"])
        for name in texts(first) | texts(other) if recipe is None else ():
            _same(first, other, f"shape of {name}", _shape(first, name), _shape(other, name))
        for field in _MEANING:
            _same(first, other, field, mine[field], theirs[field])
        if same_tokens:
            _same_vocabulary(first, other, known, vocabulary(other))
            _same_special(first, other, {} if same_special else known)
    if recipe is not None:
        _check_path(sources, recipe)


def check_written(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Refuse to write a folder that transformers could not load unchanged; builds an empty model from ``config``.

    Args:
        config: the config.json of the folder.
        shapes: the shapes of its tensors, by name.

    Raises:
        InputError: a tensor is missing, does not belong to the model, or has the wrong shape.
    """
    hint = "The folder could not be loaded; nothing was written."
    try:
        plan = blueprint(config, shapes, place)
    except InputError as error:
        raise InputError(place, f"what would be written is not a model: {error.problem}", hint) from None
    held = {name: holder for name, holder, _ in holders(plan.parts, dict(plan.located))}
    wrong = [f"{name} is missing" for name in plan.parts if name not in held]
    beyond = shapes.keys() - {*held.values()} - plan.copies.keys()
    wrong += [f"{name} is not a tensor of it" for name in beyond if not plan.ignores(name)]
    wrong += [
        f"{name} has shape {list(shapes[name])}, not {list(plan.shapes[name])}"
        for name, holder in held.items()
        if name == holder and shapes[name] != plan.shapes[name]
    ]
    if wrong:
        raise InputError(place, f"what would be written is not the model of its config.json: {min(wrong)}", hint)


def check_finite(source: Source) -> None:
    """Read every weight once and reject a source with NaN or infinity in any of them.

    Raises:
        InputError: naming the tensor.
    """
    for name in source.tensors:
        check_tensor(source, name, source.read(name))
        source.release(name)


def check_tensor(source: Source, name: str, tensor: torch.Tensor) -> None:
    """Reject a tensor of a source with NaN or infinity.

    Raises:
        InputError: naming it.
    """
    from evomerge.checkpoints.finite import all_finite  # imports numba, which is not needed unless weights are read

    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            source.place,
            f"{name} in {source.tensors[name].file.name} has NaN or Inf in {bad:,} of {tensor.numel():,} elements",
            "The model is broken; download or train it again.",
        )


def _same(one: Source, other: Source, field: str, mine: Any, theirs: Any, hint: str = _SAME_SHAPE) -> None:
    if mine != theirs:
        raise InputError(other.place, f"{other.name} and {one.name} differ in {field}: {theirs} and {mine}", hint)


def check_keeps_vision(sources: Mapping[str, Source], tokenizer: str) -> None:
    """Reject a merge of vision-language models into a text model, which would drop their vision parts.

    Args:
        tokenizer: the source that provides tokenizer and configuration.

    Raises:
        InputError: naming a source that reads images.
    """
    seeing = [name for name, source in sources.items() if source.takes_images]
    if seeing and not sources[tokenizer].takes_images:
        problem = f"is {tokenizer}, a text model, and the vision parts of {seeing[0]} would be dropped"
        hint = f"Say so: `tokenizer: {seeing[0]}`; in a mergekit configuration, `tokenizer_source`."
        raise InputError("tokenizer", problem, hint)


def texts(source: Source) -> set[str]:
    """The names of the tensors of a source's text model."""
    return {name for name, role in source.roles.items() if role.kind != "vision"}


def check_vision(sources: Mapping[str, Source], recipe: StackRecipe) -> None:
    """Reject mixing the vision parts of sources if these parts differ.

    Raises:
        InputError: naming the source and what differs; also for a text-only source.
    """
    if recipe.seen is None:
        return
    model = sources[recipe.tokenizer]
    for name in sorted(_mixed(recipe.seen) | {recipe.tokenizer}):
        other = sources[name]
        if not other.takes_images:
            problem = f"{name} is a text model, and the vision parts are to be made from it"
            raise InputError(other.place, problem, "Make them only from sources that read images.")
        _same(model, other, "model_type", model.config["model_type"], other.config["model_type"], _SAME_TOWER)
        for tensor in sorted((model.tensors.keys() - texts(model)) | (other.tensors.keys() - texts(other))):
            _same(model, other, f"shape of {tensor}", _shape(model, tensor), _shape(other, tensor), _SAME_TOWER)
        for key in sorted({**model.image_settings, **other.image_settings}):
            _same(model, other, key, model.image_settings.get(key), other.image_settings.get(key), _SAME_TOWER)


def text_model_problem(one: Source, other: Source) -> str:
    """How the text models of two sources differ in kind, regardless of shapes; empty if they do not.

    Models of different types count as the same if they compute the same with equal weights, which is tested.
    """
    if one.text_type == other.text_type:
        return ""
    types = f"it is a {other.text_type}, and {one.name} a {one.text_type}"
    if not one.takes_images and not other.takes_images:
        return types
    from evomerge.checkpoints.equivalence import equivalence_problem  # builds models

    problem = equivalence_problem(one, other)
    return f"{types}, and {problem}" if problem else ""


def _same_text_model(one: Source, other: Source) -> None:
    """Reject sources whose text models are of different kinds."""
    if one.config["model_type"] == other.config["model_type"]:
        _same(one, other, "architectures", one.config.get("architectures"), other.config.get("architectures"))
    elif one.takes_images or other.takes_images:
        if problem := text_model_problem(one, other):
            raise InputError(
                other.place, f"{other.name} and {one.name} differ in their text models: {problem}", _SAME_SHAPE
            )
    else:
        _same(one, other, "model_type", one.config["model_type"], other.config["model_type"])


def _check_path(sources: Mapping[str, Source], recipe: StackRecipe) -> None:
    """Compare what is mixed in each hop with the layer at that index of the tokenizer's source, or its last layer."""
    model = sources[recipe.tokenizer]
    roles = {name: sources[name].roles for name in recipe.used_sources() | {recipe.tokenizer}}
    outside = [(name, role) for name, role in roles[recipe.tokenizer].items() if role.layer is None]
    for name, role in outside:
        for source in _mixed(recipe.blend_for(role, name)):
            _same(model, sources[source], f"shape of {name}", _shape(model, name), _shape(sources[source], name))
    for number, hop in enumerate(recipe.hops):
        like = min(number, model.layers - 1)
        here = [(name, role) for name, role in roles[recipe.tokenizer].items() if role.layer == like]
        users: dict[str, set[str]] = {}  # the tensors of the hop that use each source
        for name, role in here:
            merged = renumber(name, role, number)
            for source in _mixed(recipe.blend_for(Role(role.kind, number), merged)):
                users.setdefault(source, set()).add(name)
        for source, names in users.items():
            layer = _layer(hop, source, sources[source], f"recipe.hops[{number}]")
            _same_kind(model, sources[source], layer)
            theirs = {renumber(name, role, like) for name, role in roles[source].items() if role.layer == layer}
            where = f"layer {layer} of {source} cannot be layer {number} of the merged model, which is to be as layer"
            where = f"{where} {like} of {model.name}"
            if extra := sorted(theirs - {name for name, _ in here}):
                raise InputError(sources[source].place, f"{where}: that has no {extra[0]}", _SAME_PLACE)
            for name in sorted(names):
                other = renumber(name, Role("mlp", like), layer)
                shapes = _shape(sources[source], other), _shape(model, name)
                if shapes[0] != shapes[1]:
                    problem = f"{where}: they differ in shape of {other} and {name}: {shapes[0]} and {shapes[1]}"
                    raise InputError(sources[source].place, problem, _SAME_PLACE)


def _same_kind(model: Source, source: Source, layer: int) -> None:
    """Reject a layer with settings that the model's configuration cannot express, such as another kind of attention."""
    like = min(layer, model.layers - 1)
    for key in {**model.layered, **source.layered}:
        mine, theirs = model.layered.get(key), source.layered.get(key)
        what = f"{key} of layer {layer} and {like}"
        _same(model, source, what, mine and mine.values[like], theirs and theirs.values[layer])


def _mixed(blend: Blend) -> set[str]:
    return {*blend.sources, *([blend.base] if blend.base is not None else [])}


def _layer(hop: Hop, name: str, source: Source, place: str) -> int:
    try:
        layer = hop.layer_of(name)
    except KeyError:
        raise InputError(place, f"mixes {name} into a tensor, but does not say which layer of it") from None
    if layer >= source.layers:
        raise InputError(place, f"takes layer {layer} of {name}, which has the layers 0 to {source.layers - 1}")
    return layer


def _shape(source: Source, name: str) -> str:
    return str(list(source.tensors[name].shape)) if name in source.tensors else "absent"


def _same_vocabulary(one: Source, other: Source, mine: dict[str, int], theirs: dict[str, int]) -> None:
    if mine is theirs or not (different := mine.items() ^ theirs.items()):
        return
    token = min(different, key=lambda pair: pair[1])[0]
    raise InputError(
        other.place,
        f"{other.name} and {one.name} differ in the tokenizer's vocabulary ({len(theirs):,} and {len(mine):,} tokens): "
        f"{token!r} is {theirs.get(token, 'absent')} and {mine.get(token, 'absent')}",
        _SAME_TOKENIZER,
    )


def _same_special(one: Source, other: Source, known: Mapping[str, int]) -> None:
    """Refuse special tokens that differ, unless both are among those known."""
    for token in ("bos_token", "eos_token", "unk_token"):
        mine, theirs = _special(one, token), _special(other, token)
        if not {mine, theirs} <= known.keys() | {None}:
            _same(one, other, token, mine, theirs, _SAME_TOKENIZER if known else _CHOOSE_TOKENIZER)


def _vocabulary(source: Source) -> dict[str, int]:
    """Every token of tokenizer.json with its id, added tokens as well."""
    file = source.folder / "tokenizer.json"
    if not has(source.folder, file.name):
        raise InputError(
            source.place,
            f"has no tokenizer.json in {source.folder}",
            "Load its tokenizer with `AutoTokenizer.from_pretrained` and write it with `save_pretrained`.",
        )
    content = load_json(file, source.place)
    try:
        tokens = content["model"]["vocab"]
        # Unigram models list [token, score] in the order of ids; all others map tokens to ids.
        ids = {t[0]: i for i, t in enumerate(tokens)} if isinstance(tokens, list) else dict(tokens)
        ids |= {added["content"]: added["id"] for added in content.get("added_tokens") or ()}
        highest = max(ids.values())
    except (KeyError, TypeError, IndexError, ValueError):
        raise InputError(source.place, "tokenizer.json holds no vocabulary", "Download it again.") from None
    size = source.settings["vocab_size"]
    if highest >= size:
        raise InputError(
            source.place,
            f"the tokenizer has token ids up to {highest:,}, but the model only {size:,} embeddings (vocab_size)",
            "Give the model the tokenizer that it was trained with.",
        )
    return ids


def _special(source: Source, token: str) -> str | None:
    """A special token's text, from tokenizer_config.json or, in older folders, special_tokens_map.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if has(source.folder, name):
            value = load_json(source.folder / name, source.place).get(token)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None:
                return str(value)
    return None
