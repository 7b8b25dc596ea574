"""Finding what users add: one lookup for search spaces, evaluators and merge methods, through entry points."""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from evomerge.errors import InputError
from evomerge.printable import printable

_MOST_NAME, _MOST_LISTED = 100, 300  # characters


def plugins(group: str) -> Mapping[str, EntryPoint]:
    """Every entry point of a group by name, this project's own among them."""
    return _installed(group, tuple(sys.path))


@cache
def _installed(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """``plugins`` while packages are looked for in these places: reading them all takes ten milliseconds."""
    return {point.name: point for point in entry_points(group=group)}


def find_plugin(group: str, name: str, place: str, noun: str) -> object:
    """Load the entry point ``name`` of ``group``.

    Raises:
        InputError: there is none of that name; says the nearest, or all.
    """
    known = plugins(group)
    if name not in known:
        raise unknown_name(name, known, place, noun)
    return known[name].load()


def unknown_name(name: str, known: Iterable[str], place: str, noun: str) -> InputError:
    """The error for a name that is not among those known: the nearest is named, or as many as fit on a line or two."""
    names = sorted(known)
    near = difflib.get_close_matches(name[:_MOST_NAME], names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {_listed(names)}."
    return InputError(place, f"there is no {noun} {printable(name, _MOST_NAME)!r}", hint)


def _listed(names: Sequence[str]) -> str:
    ends = itertools.accumulate(len(name) + 2 for name in names)
    fitting = sum(end <= _MOST_LISTED for end in ends)
    if fitting == len(names):
        return ", ".join(names)
    return f"{', '.join(names[:fitting])} and {len(names) - fitting:,} more"
