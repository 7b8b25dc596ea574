"""A search file with ``select``: which sources are chosen from, and the search file after the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import InputError
from evomerge.search.settings.sections import MAX_KEPT

if TYPE_CHECKING:
    from evomerge.search.settings.search_file import SearchFile

PLACE = "select"
REST = "rest"
"""The name of the source that is the average of all sources that were not kept."""


def random_name(number: int) -> str:
    """The name of a random direction that replaces a source as a control; numbers start at 1."""
    return f"random_{number}"


RESERVED = frozenset({REST, *map(random_name, range(1, MAX_KEPT))})


def always_kept(file: SearchFile) -> list[str]:
    """The sources that stay whatever is chosen: the base, and those that give the tokenizer or rows of tokens."""
    needed = {file.base, file.tokenizer_source, *file.vocabulary.used_sources()}
    return [name for name in file.sources if name in needed]


def choices(file: SearchFile) -> list[str]:
    """The sources that are chosen from, in the order of the file."""
    kept = set(always_kept(file))
    return [name for name in file.sources if name not in kept]


def check_select(file: SearchFile) -> None:
    """Refuse a ``select`` that is impossible.

    Raises:
        InputError: there is no base, there are no more sources than are kept, or something else in the search file does
            not work with sources that the choice makes.
    """
    if file.select is None:
        return
    if file.base is None:
        raise InputError(PLACE, "compares sources with their base, and there is none", "Name it: `base: NAME`.")
    names = choices(file)
    if len(names) <= file.select.keep:
        count = "is 1 source" if len(names) == 1 else f"are {len(names)} sources"
        problem = f"is {file.select.keep}, and there {count} to choose from ({', '.join(names)})"
        hint = "Leave `select` out: a search takes them all." if len(names) <= 8 else "Lower it."
        raise InputError(f"{PLACE}.keep", problem, hint)
    if taken := sorted(file.sources.keys() & RESERVED):
        problem = "is the name of a source that `select` makes"
        raise InputError(f"sources.{taken[0]}", problem, "Give it another name.")
    if file.select.rest != "drop" and file.calibration is not None and file.calibration.file is None:
        problem = "would add a source without calibration texts: there are only texts for single sources"
        raise InputError(f"{PLACE}.rest", problem, "Give some for all (`calibration.file`), or say `rest: drop`.")
    if file.artifacts is not None:
        problem = "makes sources in the search's folder, which a copy elsewhere would not find"
        raise InputError(PLACE, problem, "Choose first (`evomerge select FILE`), and search over what it names.")
    if file.start_from:
        raise InputError(PLACE, "could choose other sources than the earlier search had", "Leave out `start_from`.")


def searched(file: SearchFile, sources: Mapping[str, str]) -> SearchFile:
    """The search file after a choice of sources: with these, and without ``select``.

    Args:
        sources: references of the chosen sources and of those that the choice made, by name. Sources that are always
            kept come before them.
    """
    kept = {name: file.sources[name] for name in always_kept(file)} | dict(sources)
    update: dict[str, object] = {"sources": kept, "select": None}
    if (texts := file.calibration) is not None:
        own = {name: path for name, path in texts.sources.items() if name in kept}
        update["calibration"] = texts.model_copy(update={"sources": own})
    return file.model_copy(update=update)


def stand_in(file: SearchFile) -> SearchFile:
    """The search file as it may be after the choice, with the first sources: for checks and plans before the choice."""
    if file.select is None:
        return file
    most = file.select.keep + (file.select.rest != "drop")
    return searched(file, {name: file.sources[name] for name in choices(file)[:most]})
