"""Recipes from mergekit configurations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from evomerge.errors import InputError
from evomerge.mergekit.grammar import GRAMMARS, Grammar
from evomerge.plugins import unknown_name
from evomerge.recipe import Blend, DType, Recipe

Levels = Sequence[Mapping[str, Any]]
"""Where a parameter may be given, nearest first: at the model, at the slice, at the top."""

_KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
)  # fmt: skip
_UNSUPPORTED = {
    "modules": "Only models of one module can be merged.",
    "tokenizer": "Name one model with `tokenizer_source:`; tokens are not realigned.",
    "chat_template": "The chat template is that of `tokenizer_source`.",
    "residual_weight": "mergekit never reads it.",
}

# The tensors of each part of a recipe, as Llama names them: what a filter is matched against.
_EMBEDDING, _NORM, _HEAD = ["model.embed_tokens.weight"], ["model.norm.weight"], ["lm_head.weight"]
_ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
_MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
_LAYER_NORM = ["input_layernorm.weight", "post_attention_layernorm.weight"]


@dataclass(frozen=True)
class _Slice:
    """Layers ``start`` to ``stop - 1`` and the models that they are made of, by reference, with their parameters."""

    start: int
    stop: int
    models: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Any]


def from_mergekit(
    config: Mapping[str, Any], layers: Callable[[str], int], place: str = "mergekit configuration"
) -> Recipe:
    """The recipe that a mergekit configuration says.

    Short names are made from the last parts of the models' names. Gradients, filters and precedence are mergekit's; its
    ``lambda`` is multiplied into the weights, which is the same as long as they are not normalised.

    Args:
        layers: the number of layers of a model, by its reference; asked only for a configuration with ``models:``.

    Raises:
        InputError: an unknown key or wrong value; or something that a recipe cannot hold, such as a path that repeats
            layers, a filter that splits the attention, ``rescale`` other than the method's own.
    """
    _check_keys(config, _KEYS, place)
    method = config.get("merge_method")
    if not isinstance(method, str) or method not in GRAMMARS:
        raise unknown_name(str(method), GRAMMARS, f"{place}: merge_method", "merge method")
    grammar, base = GRAMMARS[method], config.get("base_model")
    if base is None and (grammar.task_vectors or method == "slerp"):
        raise InputError(f"{place}: base_model", f"is missing, and {method} needs it")
    if base is not None and not isinstance(base, str):
        raise InputError(f"{place}: base_model", "must be a folder or a hub id")
    slices = _slices(config, base, layers, place)
    references = list(dict.fromkeys(itertools.chain(*(each.models for each in slices), [base] if base else [])))
    tokenizer = _tokenizer(config, base or references[0], place)
    names = _short_names(dict.fromkeys([*references, tokenizer]))
    whole = _Merge(method, base, names, _parameters(config, grammar, place), place)

    def hops() -> Iterator[tuple[int, Blend, Blend, Blend]]:
        for piece in slices:
            for layer in range(piece.start, piece.stop):
                last = piece.stop - piece.start - 1
                t = (layer - piece.start) / last if last else 1.0
                attention, mlp, norm = (
                    whole.blend([f"model.layers.{layer}.{name}" for name in part], piece, t)
                    for part in (_ATTENTION, _MLP, _LAYER_NORM)
                )
                yield layer, attention, mlp, norm

    return Recipe.compose(
        sources={name: reference for reference, name in names.items()},
        tokenizer=names[tokenizer],
        embedding=whole.blend(_EMBEDDING, slices[0], 0.0),
        hops=hops(),
        norm=whole.blend(_NORM, slices[-1], 0.0),
        head=whole.blend(_HEAD, slices[-1], 0.0),
        dtype=_dtype(config, place),
    )


@dataclass(frozen=True)
class _Merge:
    """What a configuration says of the whole model. ``names`` gives short names by reference."""

    method: str
    base: str | None
    names: Mapping[str, str]
    parameters: Mapping[str, Any]
    place: str

    def blend(self, tensors: Collection[str], piece: _Slice, t: float) -> Blend:
        """The blend of the part of the model that holds ``tensors``, at the point ``t`` in [0, 1] of a slice."""
        grammar, place = GRAMMARS[self.method], f"{self.place}: parameters"
        mixed = _mixed(self.method, piece, self.base, self.place)
        reader, levels = _Reader(tensors, t, place), (piece.parameters, self.parameters)
        values: dict[str, Any] = {}
        for name, default in grammar.per_source.items():
            own = {model: (piece.models[model], *levels) for model in mixed}
            values[name] = {self.names[model]: reader.number(name, own[model], default) for model in mixed}
        for name, default in grammar.shared.items():
            values[name] = reader.number(name, levels, default)
        if grammar.normalize is not None:
            values["normalize"] = reader.switch("normalize", levels, grammar.normalize)
        if grammar.rescale is not None and reader.switch("rescale", levels, grammar.rescale) != grammar.rescale:
            wanted = str(grammar.rescale).lower()
            raise InputError(f"{place}.rescale", f"is always {wanted} for {self.method} here", "Remove it.")
        if grammar.task_vectors and (scale := reader.number("lambda", levels, 1.0)) != 1:
            if values["normalize"]:
                mend = "Set normalize: false, and choose weights that need no lambda."
                raise InputError(f"{place}.lambda", "cannot be taken along with normalize: true", mend)
            values["weight"] = {source: weight * scale for source, weight in values["weight"].items()}
        return Blend(
            method=self.method,
            sources=tuple(self.names[model] for model in mixed),
            base=self.names[self.base] if self.base is not None and grammar.task_vectors else None,
            parameters=values,
        )


def _check_keys(given: Any, known: Collection[str], place: str) -> None:
    if not isinstance(given, Mapping):
        raise InputError(place, "must be keys with values")
    for key in given:
        if key in _UNSUPPORTED:
            raise InputError(f"{place}: {key}", "cannot be taken from a mergekit configuration", _UNSUPPORTED[key])
        if key not in known:
            raise unknown_name(str(key), known, place, "key")


def _parameters(holder: Mapping[str, Any], grammar: Grammar, place: str) -> Mapping[str, Any]:
    found = holder.get("parameters")
    if found is None:
        return {}
    _check_keys(found, grammar.parameters, f"{place}: parameters")
    return dict(found)


def _slices(config: Mapping[str, Any], base: str | None, layers: Callable[[str], int], place: str) -> list[_Slice]:
    grammar = GRAMMARS[config["merge_method"]]
    if ("models" in config) == ("slices" in config):
        raise InputError(place, "needs either `models:` or `slices:`")
    if "models" in config:
        models = _models(config["models"], ("model", "parameters"), grammar, f"{place}: models")
        return [_Slice(0, layers(base or next(iter(models))), models, {})]
    found: list[_Slice] = []
    for number, piece in enumerate(_list(config["slices"], f"{place}: slices")):
        where = f"{place}: slices[{number}]"
        _check_keys(piece, ("sources", "parameters"), where)
        models = _models(piece.get("sources"), ("model", "layer_range", "parameters"), grammar, f"{where}.sources")
        ranges = [source.get("layer_range") for source in piece["sources"]]
        start = found[-1].stop if found else 0
        for each in ranges:
            if not isinstance(each, list) or len(each) != 2 or not all(type(end) is int for end in each):
                raise InputError(f"{where}.layer_range", "must be two whole numbers, [first, last + 1]")
            if each != ranges[0] or each[0] != start or each[1] <= start:
                problem = f"is {each}, where layer {start} must follow"
                raise InputError(
                    f"{where}.layer_range",
                    problem,
                    "Only paths that take every layer once, in order, can be made so far.",
                )
        found.append(_Slice(start, ranges[0][1], models, _parameters(piece, grammar, where)))
    return found


def _models(entries: Any, keys: Collection[str], grammar: Grammar, place: str) -> dict[str, Mapping[str, Any]]:
    models: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(_list(entries, place)):
        where = f"{place}[{number}]"
        _check_keys(entry, keys, where)
        model = entry.get("model")
        if not isinstance(model, str):
            raise InputError(f"{where}.model", "must be a folder or a hub id")
        if model in models:
            raise InputError(where, f"names {model} again")
        models[model] = _parameters(entry, grammar, where)
    return models


def _list(found: Any, place: str) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise InputError(place, "must be a list with at least one entry")
    return found


def _mixed(method: str, piece: _Slice, base: str | None, place: str) -> list[str]:
    """The references of a blend's sources. Task vectors have the base apart; in SLERP the base is where t = 0."""
    others = [model for model in piece.models if model != base]
    if method == "slerp":
        if base is None or len(others) != 1:
            raise InputError(place, f"slerp mixes base_model with one other model, not with {len(others)}")
        return [base, *others]
    if GRAMMARS[method].task_vectors:
        if not others:
            raise InputError(place, "names no model beside the base")
        return others
    if base is not None and base not in piece.models:
        mend = "List it as a model with a weight, or remove it."
        raise InputError(f"{place}: base_model", f"is none of the models, and {method} uses no base", mend)
    return list(piece.models)


@dataclass(frozen=True)
class _Reader:
    """Reads parameters for the tensors of one part of the model, at the point ``t`` in [0, 1] of its slice."""

    tensors: Collection[str]
    t: float
    place: str

    def number(self, name: str, levels: Levels, default: float | None) -> float:
        value = self._one(name, levels, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{self.place}.{name}", f"must be a number, not {value!r}")
        return float(value)

    def switch(self, name: str, levels: Levels, default: bool) -> bool:
        value = self._one(name, levels, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.place}.{name}", f"must be true or false, not {value!r}")
        return value

    def _one(self, name: str, levels: Levels, default: Any) -> Any:
        values = []
        for tensor in self.tensors:
            given = (self._at(level[name], tensor, name) for level in levels if name in level)
            values.append(next((value for value in given if value is not None), default))
        if any(value != values[0] for value in values):
            problem = f"differs between {', '.join(self.tensors)}, which a recipe makes alike"
            mend = "Let filters choose among self_attn, mlp, layernorm, embed_tokens, model.norm and lm_head."
            raise InputError(f"{self.place}.{name}", problem, mend)
        if values[0] is None:
            raise InputError(f"{self.place}.{name}", f"is missing for {next(iter(self.tensors))}")
        return values[0]

    def _at(self, setting: Any, tensor: str, name: str) -> Any:
        """The value for one tensor: a plain value, a gradient over the slice, or the first filter that matches."""
        if isinstance(setting, Mapping):
            setting = [setting]
        if not isinstance(setting, list):
            return setting
        where = f"{self.place}.{name}"
        if not setting:
            raise InputError(where, "is an empty list")
        if not any(isinstance(each, Mapping) for each in setting):
            for each in setting:
                if isinstance(each, bool) or not isinstance(each, int | float):
                    raise InputError(where, f"must be a gradient of numbers, but holds {each!r}")
            return _interpolate(setting, self.t)
        for rule in setting:
            _check_keys(rule, ("filter", "value"), where)
            if rule.get("filter") in (None, "*") or str(rule["filter"]) in tensor:
                return self._at(rule.get("value"), tensor, name)
        return None


def _interpolate(points: Sequence[float], t: float) -> float:
    left = int(t * (len(points) - 1))
    right = min(left + 1, len(points) - 1)
    fraction = t * (len(points) - 1) - left
    return (1 - fraction) * points[left] + fraction * points[right]


def _tokenizer(config: Mapping[str, Any], fallback: str, place: str) -> str:
    named = config.get("tokenizer_source")
    if named is None or named == "base":
        return fallback
    if named == "union" or not isinstance(named, str):
        raise InputError(
            f"{place}: tokenizer_source", f"cannot be {named!r}: vocabularies are not united", "Name one of the models."
        )
    return named


def _dtype(config: Mapping[str, Any], place: str) -> DType | None:
    key = "out_dtype" if config.get("out_dtype") is not None else "dtype"
    named = config.get(key)
    for dtype in get_args(DType):
        if named == dtype:
            return dtype  # type: ignore[no-any-return]
    if named is not None:
        raise unknown_name(str(named), get_args(DType), f"{place}: {key}", "dtype")
    return None


def _short_names(references: Iterable[str]) -> dict[str, str]:
    """A name for each reference: ``org/name@revision+adapter`` becomes ``name+adapter``."""
    names: dict[str, str] = {}
    for reference in references:
        parts = (part.partition("@")[0].rstrip("/").rpartition("/")[2] for part in reference.split("+"))
        stem = "+".join(parts) or "source"
        free = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        names[reference] = next(name for name in free if name not in names.values())
    return names
