"""Reads recipes from mergekit configurations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from evomerge.errors import InputError
from evomerge.mergekit.grammar import Grammar, Setting, Value, find_grammar
from evomerge.mergekit.references import read_reference, short_names
from evomerge.mergekit.settings import Parameters, check_keys, find_value, read_parameters
from evomerge.mergekit.vocabularies import read_tokenizer, read_vocabulary
from evomerge.plugins import unknown_name
from evomerge.recipes.base import DType
from evomerge.recipes.stack import Blend, Role, RoleKind, StackRecipe, renumber

Roles = Mapping[str, Role]
"""The role of every tensor of a model by its name in the files, as in ``Source.roles``."""

_KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
_UNSUPPORTED = {
    "modules": "Only models of one module can be merged.",
    "residual_weight": "mergekit never reads it.",
}


@dataclass(frozen=True)
class _Slice:
    """A run of ``length`` layers: the first layer of each model, by reference, and the settings there.

    A first or last slice without layers describes the embedding, or the final norm and the head.
    """

    starts: Mapping[str, int]
    length: int
    base: str | None
    models: Mapping[str, Parameters]
    parameters: Parameters
    place: str


def from_mergekit(
    config: Mapping[str, Any], look: Callable[[str], Roles], place: str = "mergekit configuration"
) -> StackRecipe:
    """The recipe that a mergekit configuration describes.

    Short names are made from the last parts of the models' names. Layers, gradients, filters and precedence follow
    mergekit: values are looked up for every tensor by its real name, and the most common blend of a part becomes the
    part's. A ``lambda`` is multiplied into the weights if that is equivalent.

    Args:
        look: returns the roles of a model's tensors, by its reference.

    Raises:
        InputError: an unknown key or wrong value; layers that a model does not have; or something that a recipe cannot
            represent, such as ``modules:``.
    """
    _check_keys(config, _KEYS, place)
    method = config.get("merge_method")
    grammar = find_grammar(str(method), f"{place}: merge_method")
    base = _base(config, f"{place}: base_model")
    slices = _slices(config, grammar, base, look, place)
    references = list(dict.fromkeys(itertools.chain(*(piece.starts for piece in slices), [base] if base else [])))
    tokenizer = read_tokenizer(config, base or references[0], place)
    names = short_names(dict.fromkeys([*references, tokenizer]))
    parameters = read_parameters(config.get("parameters"), grammar, f"{place}: parameters")
    merge = _Merge(str(method), grammar, names, parameters, look(tokenizer))

    hops = [
        merge.hop(piece, offset, start + offset) for start, piece in _placed(slices) for offset in range(piece.length)
    ]
    embedding = merge.outside(slices[0], "embedding")
    norm = merge.outside(slices[-1], "norm") or hops[-1][-1]
    head = merge.outside(slices[-1], "head") or embedding  # a tied head is the embedding
    if embedding is None or head is None:
        raise InputError(place, f"{tokenizer} has no embedding of tokens")
    return StackRecipe.compose(
        sources={name: reference for reference, name in names.items()},
        tokenizer=names[tokenizer],
        embedding=embedding,
        hops=hops,
        norm=norm,
        head=head,
        tensors=merge.exceptions,
        vocabulary=read_vocabulary(config, names, base, place),
        dtype=_dtype(config, place),
    )


@dataclass(frozen=True)
class _Merge:
    """The settings of a configuration for the whole model, and exceptions among its tensors found so far.

    ``names`` gives short names by reference, ``roles`` those of the tensors of the tokenizer's source.
    """

    method: str
    grammar: Grammar
    names: Mapping[str, str]
    parameters: Parameters
    roles: Roles
    exceptions: dict[str, Blend] = field(default_factory=dict)

    def hop(self, piece: _Slice, offset: int, hop: int) -> tuple[dict[str, int], Blend, Blend, Blend]:
        """One layer of a slice: the layer of each source by short name, and the blends of its three kinds of tensor."""
        layers = {model: start + offset for model, start in piece.starts.items()}
        t = offset / (piece.length - 1) if piece.length > 1 else 1.0
        like = min(hop, depth(self.roles) - 1)  # the tokenizer's source determines the tensors of a layer
        kinds: dict[RoleKind, dict[str, Blend]] = {"attention": {}, "mlp": {}, "norm": {}}
        for name, role in self._layer(like):
            inputs = {model: renumber(name, role, layer) for model, layer in layers.items()}
            merged = renumber(name, role, hop)
            kinds[role.kind][merged] = self._blend(piece, t, merged, inputs)
        made = [self._part(kinds[kind]) for kind in ("attention", "mlp", "norm")]
        filling = next(blend for blend in made if blend is not None)  # for a kind without tensors
        attention, mlp, norm = (blend or filling for blend in made)
        return {self.names[model]: layer for model, layer in layers.items()}, attention, mlp, norm

    def outside(self, piece: _Slice, kind: RoleKind) -> Blend | None:
        """The blend of a part outside the layers, with gradients evaluated at their start; None if it has no tensor."""
        tensors = (name for name, role in self.roles.items() if role == Role(kind))
        return self._part({name: self._blend(piece, 0.0, name, dict.fromkeys(piece.starts, name)) for name in tensors})

    def _layer(self, layer: int) -> list[tuple[str, Role]]:
        return [(name, role) for name, role in self.roles.items() if role.layer == layer]

    def _part(self, tensors: Mapping[str, Blend]) -> Blend | None:
        """The most common blend of a part's tensors; the others become exceptions."""
        counts: list[tuple[Blend, int]] = []
        for blend in tensors.values():
            if all(blend != known for known, _ in counts):
                counts.append((blend, sum(blend == other for other in tensors.values())))
        if not counts:
            return None
        common, _ = max(counts, key=lambda pair: pair[1])
        self.exceptions.update({name: blend for name, blend in tensors.items() if blend != common})
        return common

    def _blend(self, piece: _Slice, t: float, merged: str, inputs: Mapping[str, str]) -> Blend:
        """The blend of the tensor named ``merged`` in the merged model and ``inputs`` in the models."""
        grammar, base = self.grammar, piece.base
        mixed = [model for model in piece.starts if model != base or grammar.base == "source"]
        if grammar.base == "first" and base is not None:
            mixed.insert(0, base)
        if not mixed and base is not None:  # nothing to add to the base
            name = self.names[base]
            return Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}})
        values: dict[str, Any] = {}
        for setting in grammar.settings:
            if setting.per_source:
                values[setting.ours] = {
                    self.names[model]: self._value(setting, piece, model, inputs[model], t) for model in mixed
                }
            else:
                values[setting.ours] = self._value(setting, piece, None, merged, t)
        for setting in grammar.unsaid:
            if setting.per_source:  # such numbers must not be omitted
                values[setting.ours] = dict.fromkeys((self.names[model] for model in mixed), setting.default)
        return Blend(
            method=self.method,
            sources=tuple(self.names[model] for model in mixed),
            base=self.names[base] if base is not None and grammar.base in ("apart", "optional") else None,
            parameters=_with_lambda(grammar, values),
        )

    def _value(self, setting: Setting, piece: _Slice, model: str | None, tensor: str, t: float) -> Value:
        own = [piece.models[model]] if model is not None else []
        value = find_value(setting, [*own, piece.parameters, self.parameters], tensor, t)
        if value is None:
            of = f" of {model}" if model is not None else ""
            raise InputError(f"{piece.place}parameters.{setting.name}", f"is missing for {tensor}{of}")
        return value


def depth(roles: Roles) -> int:
    """The number of layers of a model."""
    return 1 + max((role.layer for role in roles.values() if role.layer is not None), default=-1)


def _with_lambda(grammar: Grammar, values: dict[str, Any]) -> dict[str, Any]:
    """Multiply lambda into the weights if that gives the same model.

    Normalised weights of a plain sum are divided here, as in mergekit. If elements are elected by sign, the divisor
    differs between elements, and a negative lambda would invert elections.
    """
    scale = values.get("lambda", 1.0)
    if scale == 1 or (grammar.sum == "elected" and (values["normalize"] or scale < 0)):
        return values
    total = sum(values["weight"].values()) if values["normalize"] else 1.0
    total = total if abs(total) >= 1e-8 else 1.0
    weights = {source: weight / total * scale for source, weight in values["weight"].items()}
    return values | {"weight": weights, "normalize": False, "lambda": 1.0}


def _check_keys(given: Any, known: Collection[str], place: str) -> None:
    for key in given if isinstance(given, Mapping) else ():
        if key in _UNSUPPORTED:
            raise InputError(f"{place}: {key}", "cannot be taken from a mergekit configuration", _UNSUPPORTED[key])
    check_keys(given, known, place)


def _base(holder: Mapping[str, Any], place: str) -> str | None:
    given = holder.get("base_model")
    return None if given is None else read_reference(given, place)


def _placed(slices: Iterable[_Slice]) -> Iterator[tuple[int, _Slice]]:
    """Each slice with the index of its first hop."""
    start = 0
    for piece in slices:
        yield start, piece
        start += piece.length


def _slices(
    config: Mapping[str, Any], grammar: Grammar, base: str | None, look: Callable[[str], Roles], place: str
) -> list[_Slice]:
    method = config["merge_method"]
    if ("models" in config) == ("slices" in config):
        raise InputError(place, "needs either `models:` or `slices:`")
    if "models" in config:
        where = f"{place}: models"
        models = _models(config["models"], ("model", "parameters"), grammar, where)
        if base is not None and base not in models:  # as in mergekit, for every method
            models[base] = {}
        depths = {model: depth(look(model)) for model in models}
        if len(set(depths.values())) > 1:
            listed = ", ".join(f"{model} has {layers}" for model, layers in depths.items())
            raise InputError(where, f"differ in layers: {listed}", "Say with `slices:` which layers are mixed.")
        whole = _Slice(dict.fromkeys(models, 0), next(iter(depths.values())), base, models, {}, f"{place}: ")
        _check_mixed(whole, method, grammar, f"{place}: base_model", where)
        return [whole]
    slices = [
        _slice(piece, config, grammar, base, look, f"{place}: slices[{number}]")
        for number, piece in enumerate(_list(config["slices"], f"{place}: slices"))
    ]
    if not any(piece.length for piece in slices):
        raise InputError(f"{place}: slices", "take no layers at all")
    for number, piece in enumerate(slices[1:-1], start=1):
        if not piece.length:
            problem = "takes no layers, which is meaningful only for the first slice or the last"
            raise InputError(f"{place}: slices[{number}]", problem, "Remove it, or give it layers.")
    return slices


def _slice(
    given: Any, config: Mapping[str, Any], grammar: Grammar, base: str | None, look: Callable[[str], Roles], place: str
) -> _Slice:
    method = config["merge_method"]
    _check_keys(given, ("sources", "base_model", "parameters"), place)
    models = _models(given.get("sources"), ("model", "layer_range", "parameters"), grammar, f"{place}.sources")
    ranges = {}
    for number, (model, source) in enumerate(zip(models, given["sources"], strict=True)):
        ranges[model] = _range(source.get("layer_range"), model, look, f"{place}.sources[{number}].layer_range")
    lengths = {stop - start for start, stop in ranges.values()}
    if len(lengths) > 1:
        listed = ", ".join(f"{stop - start} of {model}" for model, (start, stop) in ranges.items())
        raise InputError(f"{place}.sources", f"take different numbers of layers: {listed}")
    own = _base(given, f"{place}.base_model")
    piece = _Slice(
        {model: start for model, (start, _) in ranges.items()},
        lengths.pop(),
        own or base,
        models,
        read_parameters(given.get("parameters"), grammar, f"{place}.parameters"),
        f"{place}.",
    )
    _check_mixed(piece, method, grammar, f"{place}.base_model", f"{place}.sources")
    return piece


def _check_mixed(piece: _Slice, method: str, grammar: Grammar, base_place: str, place: str) -> None:
    """Reject a slice whose models its method cannot mix."""
    base = piece.base
    if grammar.base in ("apart", "first") and base is None:
        raise InputError(base_place, f"is missing, and {method} needs it")
    if grammar.base != "source" and base is not None and base not in piece.starts:
        raise InputError(place, f"leave out the base model {base}", "List it too, with the layers to take of it.")
    apart = grammar.base in ("apart", "optional") and base is not None
    count = len(piece.starts) - apart
    least, most = 0 if grammar.copies_base else grammar.least, grammar.most
    if count < least or (most is not None and count > most):
        wanted = f"{grammar.least}" if most is not None else f"{grammar.least} or more"
        beside = " beside the base" if apart else ""
        raise InputError(place, f"name {count} models{beside}; {method} mixes {wanted}")


def _range(given: Any, model: str, look: Callable[[str], Roles], place: str) -> tuple[int, int]:
    if not isinstance(given, list) or len(given) != 2 or not all(type(end) is int for end in given):
        raise InputError(place, "must be two whole numbers, [first, last + 1]")
    start, stop = given
    layers = depth(look(model))
    if not 0 <= start <= stop <= layers:
        raise InputError(place, f"is {given}, but {model} has the layers 0 to {layers - 1}: [0, {layers}]")
    return start, stop


def _models(entries: Any, keys: Collection[str], grammar: Grammar, place: str) -> dict[str, Parameters]:
    models: dict[str, Parameters] = {}
    for number, entry in enumerate(_list(entries, place)):
        where = f"{place}[{number}]"
        check_keys(entry, keys, where)
        model = read_reference(entry.get("model"), f"{where}.model")
        if model in models:
            raise InputError(where, f"names {model} again")
        models[model] = read_parameters(entry.get("parameters"), grammar, f"{where}.parameters")
    return models


def _list(given: Any, place: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise InputError(place, "must be a list with at least one entry")
    return given


def _dtype(config: Mapping[str, Any], place: str) -> DType | None:
    key = "out_dtype" if config.get("out_dtype") is not None else "dtype"
    named = str(config.get(key)).removeprefix("torch.")
    for dtype in get_args(DType):
        if named == dtype:
            return dtype  # type: ignore[no-any-return]
    if config.get(key) is not None:
        raise unknown_name(named, get_args(DType), f"{place}: {key}", "dtype")
    return None
