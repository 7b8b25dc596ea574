"""Public names of models: hub ids if known, and only the names of local folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.places import split_reference
from evomerge.checkpoints.source import Source
from evomerge.files import split_expert, with_expert
from evomerge.recipes.base import Recipe

_LONGEST = 4096  # characters of a path
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]+/?$")


def public_name(source: Source) -> str:
    """The name of a source in a card: org/name@revision, or base+maths for two folders."""
    return "+".join(_hub_id(part) or Path(part).name if _is_folder(part) else part for part in _parts(source))


def hub_ids(source: Source) -> list[str]:
    """The hub ids of a source and its adapters, without revisions; none for a folder whose id is unknown."""
    return [id_ for part in _parts(source) if (id_ := _id_of(part))]


def is_public(source: Source) -> bool:
    """Whether a source and all of its adapters are on the hub."""
    return len(hub_ids(source)) == len(_parts(source))


def movable(recipe: Recipe, *, stays: bool) -> Recipe:
    """The recipe that accompanies a model; models in the hub's cache are named by id.

    Args:
        stays: whether it stays on this machine, so that other folders and files have absolute paths and are found even
            if the model is moved; otherwise only their names are kept.
    """

    def movable_part(part: str) -> str:
        folder, expert = split_expert(part, None)
        return with_expert(movable_folder(folder), expert)

    def movable_folder(part: str) -> str:
        if not os.path.isabs(part) or not os.path.exists(part):
            return part
        if match := _SNAPSHOT.search(part):
            return f"{match[1]}/{match[2]}@{Path(part).name}"
        return part if stays else Path(part).name

    sources = {
        name: "+".join(movable_part(part) for part in split_reference(reference, None))
        for name, reference in recipe.sources.items()
    }
    return recipe.model_copy(update={"sources": sources})


def without_places(settings: Any) -> Any:
    """Settings in which local files and folders are reduced to their names, because paths differ on other machines."""
    if isinstance(settings, Mapping):
        return {key: without_places(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_places(value) for value in settings]
    if isinstance(settings, str) and len(settings) < _LONGEST and os.path.isabs(settings) and os.path.exists(settings):
        return Path(settings).name
    return settings


def _parts(source: Source) -> list[str]:
    """The model and its adapters as they were given."""
    return split_reference(source.reference, None)


def _id_of(part: str) -> str:
    return _hub_id(part) if _is_folder(part) else part.partition("@")[0]


def _is_folder(part: str) -> bool:
    return Path(part).is_absolute() or os.path.isdir(part)


def _hub_id(folder: str) -> str:
    """The hub id of a folder in the hub's cache."""
    match = _SNAPSHOT.search(folder)
    return f"{match[1]}/{match[2]}" if match else ""
