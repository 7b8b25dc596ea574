"""What models are called to others: hub ids where they are known, and of folders of this machine the name alone."""

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
    """A source as a card names it: org/name@revision, or base+maths of two folders."""
    return "+".join(_hub_id(part) or Path(part).name if _is_folder(part) else part for part in _parts(source))


def hub_ids(source: Source) -> list[str]:
    """The hub ids of a source and of its adapters, without revisions; none of a folder that does not say its own."""
    return [id_ for part in _parts(source) if (id_ := _id_of(part))]


def is_public(source: Source) -> bool:
    """Whether a source and all of its adapters are on the hub."""
    return len(hub_ids(source)) == len(_parts(source))


def movable(recipe: Recipe, *, stays: bool) -> Recipe:
    """The recipe as it goes with a model: of models in the hub's cache it names the ids.

    Args:
        stays: on this machine, where other folders and files are found by their absolute paths, wherever the model's is
            moved to; elsewhere they have their names alone.
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
    """Settings in which files and folders of this machine have their names alone, for they lie elsewhere on others."""
    if isinstance(settings, Mapping):
        return {key: without_places(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_places(value) for value in settings]
    if isinstance(settings, str) and len(settings) < _LONGEST and os.path.isabs(settings) and os.path.exists(settings):
        return Path(settings).name
    return settings


def _parts(source: Source) -> list[str]:
    """The model and its adapters, as they were given."""
    return split_reference(source.reference, None)


def _id_of(part: str) -> str:
    return _hub_id(part) if _is_folder(part) else part.partition("@")[0]


def _is_folder(part: str) -> bool:
    return Path(part).is_absolute() or os.path.isdir(part)


def _hub_id(folder: str) -> str:
    """The id of a folder that lies in the hub's cache."""
    match = _SNAPSHOT.search(folder)
    return f"{match[1]}/{match[2]}" if match else ""
