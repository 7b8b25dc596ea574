"""Files of several merges: YAML documents of which later ones use earlier ones by name, as in mergekit-multi.

A document is one of our recipes or a mergekit configuration, with a ``name``; the one without is the final model. A
model name that is the name of a document refers to that merge. Unlike in mergekit-multi, a stage is not rounded to a
dtype before the next one uses it, and is never reused if its document, or a file of its models, has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import ValidationError

from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.mergekit.reading import Roles, from_mergekit
from evomerge.mergekit.references import short_names
from evomerge.recipes.stack import StackRecipe
from evomerge.recipes.staged import Stage, StagedRecipe

FINAL = "model"
"""The name of the document without one."""

Made = Callable[[Stage, Mapping[str, str]], Roles]
"""(a stage, the references of its sources) -> the roles of its tensors."""


def read_stages(documents: list[dict[str, Any]], look: Callable[[str], Roles], made: Made, place: str) -> StagedRecipe:
    """The recipe described by several documents.

    Args:
        look: returns the roles of a model's tensors, by its reference.
        made: called with each stage except the last, in the order in which they are made.

    Raises:
        InputError: missing or duplicate names, or circular references; a stage that is not used; or any error in a
            document.
    """
    by_name = _named(documents, place)
    order = _ordered(by_name, place)
    roles: dict[str, Roles] = {}
    taken: dict[str, dict[str, str]] = {}
    recipes: dict[str, StackRecipe] = {}
    for name in order:
        where = f"{place}: {name}"
        recipe = _read(by_name[name], lambda reference: roles.get(reference) or look(reference), where)
        for reference in recipe.sources.values():
            if reference not in by_name:
                look(reference)
        recipes[name], taken[name] = recipe, dict(recipe.sources)
        if name != order[-1]:
            roles[name] = made(Stage.of(name, recipe.sources, recipe), recipe.sources)
    references = dict.fromkeys(ref for refs in taken.values() for ref in refs.values() if ref not in by_name)
    names = {reference: _free(name, by_name) for reference, name in short_names(references).items()}
    stages = tuple(
        Stage.of(name, {own: names.get(ref, ref) for own, ref in taken[name].items()}, recipes[name]) for name in order
    )
    return StagedRecipe.of(stages, {name: reference for reference, name in names.items()})


def _free(name: str, stages: Mapping[str, object]) -> str:
    return f"{name}-source" if name in stages else name


def _named(documents: list[dict[str, Any]], place: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise InputError(f"{place}, document {number}", "is not a merge: it has no keys")
        name = document.get("name", FINAL)
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{place}, document {number}: name", "must be a text")
        if name in found:
            what = "have no name; one is the model, the others are used by theirs" if name == FINAL else f"are {name!r}"
            raise InputError(f"{place}, document {number}", f"two documents {what}", "Give it a name of its own.")
        found[name] = {key: value for key, value in document.items() if key != "name"}
    return found


def _ordered(documents: Mapping[str, dict[str, Any]], place: str) -> list[str]:
    """The names of the documents, each after those that it uses, the final model last."""
    uses = {name: {text for text in _texts(document) if text in documents} for name, document in documents.items()}
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        raise InputError(place, f"the merges use each other in a circle: {' -> '.join(error.args[1])}") from None
    unused = [name for name in documents if not any(name in used for used in uses.values())]
    if len(unused) > 1:
        extra = [name for name in unused if name != FINAL]
        problem = f"{', '.join(sorted(extra))} {'is' if len(extra) == 1 else 'are'} used by no other document"
        raise InputError(place, problem, "Leave it out, or make one file for each model.")
    return order


def _texts(content: Any) -> Iterator[str]:
    """All texts among the values."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _read(document: dict[str, Any], look: Callable[[str], Roles], place: str) -> StackRecipe:
    if "blends" not in document:
        if "merge_method" not in document:
            raise InputError(place, "is no merge: it has neither `blends:` nor, as mergekit's have, `merge_method:`")
        return from_mergekit(document, look, place)
    try:
        return StackRecipe.model_validate(document)
    except ValidationError as error:
        raise explain(error, place, StackRecipe, document) from None
