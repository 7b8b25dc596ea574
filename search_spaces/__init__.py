"""Search spaces: one a file. A new one is a file here, or an entry point ``evomerge.search_spaces`` of a package."""

from __future__ import annotations

from typing import cast

from evomerge.plugins import find_plugin
from search_spaces.base import SpaceSettings


def space_settings(kind: str, place: str) -> type[SpaceSettings]:
    """The settings class of the space of this kind; InputError when there is none."""
    return cast(type[SpaceSettings], find_plugin("evomerge.search_spaces", kind, place, "search space"))
