"""Writes recipes as mergekit configurations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import InputError
from evomerge.mergekit.grammar import Grammar, Setting, Value, find_grammar
from evomerge.mergekit.reading import Roles, depth
from evomerge.mergekit.vocabularies import write_vocabulary
from evomerge.recipes.stack import Blend, Role, StackRecipe, renumber


@dataclass(frozen=True)
class _Tensor:
    """A tensor: its name in the merged model, its name in each source, and its blend."""

    merged: str
    inputs: Mapping[str, str]
    blend: Blend


def to_mergekit(recipe: StackRecipe, look: Callable[[str], Roles]) -> dict[str, Any]:
    """The mergekit configuration for a recipe, ready to be written as YAML.

    Consecutive hops of consecutive layers with the same blends form one slice; exceptions among its tensors are
    selected by filters.

    Args:
        look: returns the roles of a model's tensors, by its reference.

    Raises:
        InputError: mergekit cannot express it: blends that differ in method, or in sources or base within one slice; a
            method or number that it does not have; tensors that no filter can distinguish; two names for one model.
    """
    _check_vision(recipe)
    methods = sorted({blend.method for blend in recipe.blends})
    if len(methods) > 1:
        raise InputError("recipe.blends", f"differ in method, which mergekit cannot express ({', '.join(methods)})")
    grammar = find_grammar(methods[0], "recipe.blends", "merge method of mergekit's")
    _check_references(recipe)
    for number, blend in enumerate(recipe.blends):
        _check_numbers(blend, grammar, f"recipe.blends[{number}]")
    slices = _slices(recipe, grammar, look(recipe.sources[recipe.tokenizer]))
    if len(slices[-1]["sources"]) > len(slices[0]["sources"]):
        problem = "mixes more models at its end than at its beginning, on which mergekit 0.1.5 fails"
        raise InputError("recipe", problem, "Give the blends of the beginning the same sources, with weight 0.")
    bases = {piece.get("base_model") for piece in slices}
    config: dict[str, Any] = {"merge_method": methods[0]}
    if len(bases) == 1:  # one for all instead of one for each slice
        base = bases.pop()
        config |= {"base_model": base} if base is not None else {}
        slices = [{key: value for key, value in piece.items() if key != "base_model"} for piece in slices]
    config |= _whole(slices, look) or {"slices": slices}
    donor = recipe.sources[recipe.tokenizer]
    if grammar.base == "source" and ("slices" in config or any(entry["model"] == donor for entry in config["models"])):
        config["base_model"] = donor  # only its configuration is used; otherwise mergekit uses that of any model
    if recipe.dtype is not None:
        config |= {"dtype": "float32", "out_dtype": recipe.dtype}
    return config | write_vocabulary(recipe, config.get("base_model"))


def _check_references(recipe: StackRecipe) -> None:
    used = {name: recipe.sources[name] for name in sorted(recipe.used_sources() | {recipe.tokenizer})}
    if len(set(used.values())) != len(used):
        raise InputError("recipe.sources", "has two names for one model, which mergekit takes for one")
    for name, reference in used.items():
        if reference.count("+") > 1:
            raise InputError(f"recipe.sources.{name}", "has several adapters; mergekit takes one", "Fold them first.")


def _check_vision(recipe: StackRecipe) -> None:
    """Reject vision parts made from several models, for which mergekit has another format."""
    if recipe.seen is not None:
        problem = "makes the vision parts from several models, which mergekit cannot express beside layers"
        raise InputError("recipe.vision", problem, "Merge it here, with `evomerge merge`.")


def _check_numbers(blend: Blend, grammar: Grammar, place: str) -> None:
    """Reject numbers that mergekit has no setting for."""
    if blend.basis is not None:
        raise InputError(f"{place}.basis", "merges adapters in core space, which mergekit cannot express")
    if blend.steps:
        names = ", ".join(step.name for step in blend.steps)
        problem = f"change what {blend.method} made ({names}), which mergekit cannot do"
        raise InputError(f"{place}.steps", problem, "Merge it here, with `evomerge merge`.")
    if grammar.base in ("apart", "optional") and blend.base in blend.sources:
        raise InputError(place, f"mixes the base {blend.base} as a source, which mergekit leaves out")
    settings = {setting.ours: setting for setting in grammar.settings}
    unsaid = {setting.ours: setting.default for setting in grammar.unsaid}
    for name, value in blend.parameters.items():
        if name in unsaid:
            given = set(value.values()) if isinstance(value, dict) else {value}
            if given != {unsaid[name]}:
                raise InputError(f"{place}.{name}", f"is always {unsaid[name]:g} in mergekit's {blend.method}")
        elif name not in settings:
            raise InputError(f"{place}.{name}", f"is not a parameter of mergekit's {blend.method}")
        elif isinstance(value, dict) and not settings[name].per_source:
            raise InputError(f"{place}.{name}", f"is one number for all sources in mergekit's {blend.method}")


def _slices(recipe: StackRecipe, grammar: Grammar, roles: Roles) -> list[dict[str, Any]]:
    """One slice for each run of hops; the first carries the embedding, the last the final norm and the head.

    If these mix different models from the adjacent hops, they get a separate slice without layers.
    """
    hops = [list(_hop(recipe, roles, number)) for number in range(len(recipe.hops))]
    runs = [(start, stop, list(itertools.chain(*hops[start:stop]))) for start, stop in _runs(recipe, hops)]
    embedding, end = _outside(recipe, roles, "embedding"), _outside(recipe, roles, "norm", "head")
    if _mix_alike(embedding, runs[0][2]):
        runs[0][2].extend(embedding)
    else:
        runs.insert(0, (0, 0, embedding))
    if _mix_alike(end, runs[-1][2]):
        runs[-1][2].extend(end)
    else:
        runs.append((len(hops), len(hops), end))
    return [_slice(recipe, grammar, tensors, start, stop) for start, stop, tensors in runs]


def _mix_alike(tensors: Sequence[_Tensor], others: Sequence[_Tensor]) -> bool:
    """Whether both groups of tensors mix the same models, as all tensors of a slice must."""
    return all((t.blend.sources, t.blend.base) == (others[0].blend.sources, others[0].blend.base) for t in tensors)


def _hop(recipe: StackRecipe, roles: Roles, number: int) -> Iterator[_Tensor]:
    hop = recipe.hops[number]
    like = min(number, depth(roles) - 1)
    for name, role in roles.items():
        if role.layer == like:
            merged = renumber(name, role, number)
            blend = recipe.blend_for(Role(role.kind, number), merged)
            yield _Tensor(merged, {s: renumber(name, role, hop.layer_of(s)) for s in _models(blend)}, blend)


def _outside(recipe: StackRecipe, roles: Roles, *kinds: str) -> list[_Tensor]:
    chosen = [(name, role) for name, role in roles.items() if role.layer is None and role.kind in kinds]
    blends = [(name, recipe.blend_for(role, name)) for name, role in chosen]
    return [_Tensor(name, dict.fromkeys(_models(blend), name), blend) for name, blend in blends]


def _models(blend: Blend) -> list[str]:
    return [*blend.sources, *([blend.base] if blend.base is not None else [])]


def _runs(recipe: StackRecipe, hops: Sequence[Sequence[_Tensor]]) -> Iterator[tuple[int, int]]:
    """(first hop, last hop + 1) of each run of hops with the same blends and consecutive layers."""
    start = 0
    for number in range(1, len(hops) + 1):
        if number < len(hops) and _follows(recipe, hops, number):
            continue
        yield start, number
        start = number


def _follows(recipe: StackRecipe, hops: Sequence[Sequence[_Tensor]], number: int) -> bool:
    before, here = hops[number - 1], hops[number]
    if [tensor.blend for tensor in before] != [tensor.blend for tensor in here]:
        return False
    one, other = recipe.hops[number - 1], recipe.hops[number]
    return all(other.layer_of(model) == one.layer_of(model) + 1 for tensor in here for model in _models(tensor.blend))


def _slice(recipe: StackRecipe, grammar: Grammar, tensors: Sequence[_Tensor], start: int, stop: int) -> dict[str, Any]:
    first = tensors[0].blend
    for tensor in tensors:
        for what, here, there in (
            ("sources", tensor.blend.sources, first.sources),
            ("base", tensor.blend.base, first.base),
        ):
            if here != there:
                problem = f"{tensor.merged} and {tensors[0].merged} differ in {what} ({here}, {there})"
                raise InputError("recipe", problem, "Within a slice, mergekit mixes the same models.")
    sources = []
    for model in _models(first):
        begin = recipe.hops[start].layer_of(model) if start < stop else 0
        own = {
            setting.name: _setting({t.inputs[model]: _value(t.blend, setting, model) for t in tensors}, setting)
            for setting in grammar.settings
            if setting.per_source and model in first.sources
        }
        entry = {"model": recipe.sources[model], "layer_range": [begin, begin + stop - start], "parameters": own}
        sources.append(_without_empty(entry))
    shared = {
        setting.name: _setting({t.merged: _value(t.blend, setting, None) for t in tensors}, setting)
        for setting in grammar.settings
        if not setting.per_source
    }
    base = first.sources[0] if grammar.base == "first" else first.base
    named = {"base_model": recipe.sources[base]} if base is not None else {}
    return _without_empty({"sources": sources, **named, "parameters": shared})


def _value(blend: Blend, setting: Setting, source: str | None) -> Value:
    value = blend.parameters.get(setting.ours, setting.absent)
    if isinstance(value, dict):
        value = value[source or ""]
    if isinstance(value, str):
        raise InputError("recipe.blends", f"{blend.method} has the choice {setting.ours}, and mergekit has none")
    if value is None:
        raise InputError("recipe.blends", f"{blend.method} needs a value for {setting.ours}")
    return value


def _setting(values: Mapping[str, Value], setting: Setting) -> Value | list[dict[str, Any]]:
    """A single value if all tensors agree; otherwise a filter for each value that differs from the most common."""
    common = Counter(values.values()).most_common(1)[0][0]
    left = dict(values)  # those not yet covered by a filter
    rules: list[dict[str, Any]] = []
    while odd := next((name for name, value in left.items() if value != common), None):
        part = _filter(odd, left)
        if part is None:
            problem = f"no mergekit filter gives only {odd} its {setting.name} {left[odd]:g}"
            raise InputError("recipe", problem, "Its name is a part of another tensor's name.")
        rules.append({"filter": part, "value": left[odd]})
        left = {name: value for name, value in left.items() if part not in name}
    return [*rules, {"value": common}] if rules else common


def _filter(name: str, values: Mapping[str, Value]) -> str | None:
    """The part of a name that occurs only in names with the same value, and in as many of them as possible."""
    parts = name.split(".")
    best: tuple[tuple[int, bool, int, int], str] | None = None
    for first, last in itertools.combinations(range(len(parts) + 1), 2):
        text = ".".join(parts[first:last])
        matched = [value for other, value in values.items() if text in other]
        numbered = any(part.isdecimal() for part in parts[first:last])
        rank = (-len(matched), numbered, last - first, first)
        if all(value == values[name] for value in matched) and (best is None or rank < best[0]):
            best = rank, text
    return best[1] if best is not None else None


def _whole(slices: Iterable[dict[str, Any]], look: Callable[[str], Roles]) -> dict[str, Any] | None:
    """A single slice with all layers of every model, in the shorter form; None if it is anything else."""
    first, *more = slices
    sources = first["sources"]
    if more or any(source["layer_range"] != [0, depth(look(source["model"]))] for source in sources):
        return None
    models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    return {"models": models} | {key: value for key, value in first.items() if key != "sources"}


def _without_empty(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value != {}}
