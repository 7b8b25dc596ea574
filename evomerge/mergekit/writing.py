"""Mergekit configurations of recipes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from evomerge.errors import InputError
from evomerge.mergekit.grammar import GRAMMARS, Grammar
from evomerge.plugins import unknown_name
from evomerge.recipe import Blend, Recipe


def to_mergekit(recipe: Recipe) -> dict[str, Any]:
    """The mergekit configuration of a recipe, ready to be written as YAML.

    Raises:
        InputError: mergekit cannot say it: blends that differ in method, sources, base or switches; a method that it
            has not; two names for one model.
    """
    first = recipe.blends[0]
    if first.method not in GRAMMARS:
        raise unknown_name(first.method, GRAMMARS, "recipe", "merge method of mergekit's")
    grammar, normalize = GRAMMARS[first.method], _normalize(first)
    for blend in recipe.blends:
        for what, here, there in (
            ("method", blend.method, first.method),
            ("sources", blend.sources, first.sources),
            ("base", blend.base, first.base),
            ("normalize", _normalize(blend), normalize),
        ):
            if here != there:
                raise InputError("recipe.blends", f"differ in {what}, which mergekit cannot say ({here}, {there})")
    path = [hop.layer for hop in recipe.hops]
    if path != list(range(len(path))):
        raise InputError("recipe.hops", f"visits layers {path}; only every layer once, in order, can be written so far")
    used = [recipe.sources[name] for name in sorted(recipe.used_sources())]
    if len(set(used)) != len(used):
        raise InputError("recipe.sources", "has two names for one model, which mergekit takes for one")
    if grammar.task_vectors and first.base in first.sources:
        raise InputError("recipe.blends", f"mix the base {first.base} as a source, which mergekit leaves out")

    base = first.base if grammar.task_vectors else first.sources[0] if first.method == "slerp" else None
    config: dict[str, Any] = {"merge_method": first.method}
    config |= {"base_model": recipe.sources[base]} if base is not None else {}
    config |= {"slices": _write_slices(recipe, grammar)} if len(recipe.blends) > 1 else _write_models(recipe, grammar)
    if grammar.normalize is not None:
        config.setdefault("parameters", {})["normalize"] = normalize
    if recipe.dtype is not None:
        config |= {"dtype": "float32", "out_dtype": recipe.dtype}
    return config | {"tokenizer_source": recipe.sources[recipe.tokenizer]}


def _normalize(blend: Blend) -> bool:
    return bool(blend.parameters.get("normalize", blend.method == "linear"))


def _write_models(recipe: Recipe, grammar: Grammar) -> dict[str, Any]:
    blend = recipe.blends[0]
    models = [
        {"model": recipe.sources[source], "parameters": {p: blend.value(p, source) for p in grammar.per_source}}
        for source in blend.sources
    ]
    shared = {name: blend.value(name) for name in grammar.shared}
    return {"models": [_without_empty(model) for model in models]} | ({"parameters": shared} if shared else {})


def _write_slices(recipe: Recipe, grammar: Grammar) -> list[dict[str, Any]]:
    """One slice for each run of equal layers; the first carries the embedding, the last the final norm and the head."""
    runs = [list(run) for _, run in itertools.groupby(recipe.hops, lambda hop: (hop.attention, hop.mlp, hop.norm))]
    slices = []
    for number, run in enumerate(runs):
        filters = {"self_attn": run[0].attention, "mlp": run[0].mlp}
        filters |= {"embed_tokens": recipe.embedding} if number == 0 else {}
        filters |= {"model.norm": recipe.norm, "lm_head": recipe.head} if number == len(runs) - 1 else {}
        blends = {name: recipe.blends[index] for name, index in filters.items()}
        rest = recipe.blends[run[0].norm]
        span = [run[0].layer, run[-1].layer + 1]
        sources = [
            {
                "model": recipe.sources[source],
                "parameters": {p: _setting(blends, rest, p, source) for p in grammar.per_source},
            }
            for source in rest.sources
        ]
        if grammar.task_vectors and rest.base is not None:  # with slices, mergekit wants it among them
            sources.append({"model": recipe.sources[rest.base], "parameters": {}})
        sources = [_without_empty({**source, "layer_range": span}) for source in sources]
        shared = {p: _setting(blends, rest, p, None) for p in grammar.shared}
        slices.append(_without_empty({"sources": sources, "parameters": shared}))
    return slices


def _setting(blends: Mapping[str, Blend], rest: Blend, name: str, source: str | None) -> float | list[dict[str, Any]]:
    """One value where all parts agree; else a filter for each part that differs from the rest."""
    common = rest.value(name, source)
    rules: list[dict[str, Any]] = [
        {"filter": key, "value": blend.value(name, source)}
        for key, blend in blends.items()
        if blend.value(name, source) != common
    ]
    return [*rules, {"value": common}] if rules else common


def _without_empty(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value != {}}
