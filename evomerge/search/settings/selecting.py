"""A search file with ``select``: what it asks of the sources, and the file that is searched once some are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import InputError
from evomerge.search.settings.sections import MAX_KEPT

if TYPE_CHECKING:
    from evomerge.search.settings.search_file import SearchFile

PLACE = "select"
REST = "rest"
"""The source that is the average of all that were not kept."""


def random_name(number: int) -> str:
    """What a random direction is called that stands in the place of a source, from 1."""
    return f"random_{number}"


RESERVED = frozenset({REST, *map(random_name, range(1, MAX_KEPT))})


def always_kept(file: SearchFile) -> list[str]:
    """The sources that are no choice: the base, and what gives the tokenizer or tokens of the vocabulary."""
    needed = {file.base, file.tokenizer_source, *file.vocabulary.used_sources()}
    return [name for name in file.sources if name in needed]


def choices(file: SearchFile) -> list[str]:
    """The sources that are chosen from, in the order of the file."""
    kept = set(always_kept(file))
    return [name for name in file.sources if name not in kept]


def check_select(file: SearchFile) -> None:
    """Refuse what cannot be chosen from.

    Raises:
        InputError: no base, no more sources than are kept, or a search that cannot do with sources that are made.
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
        problem = "is what `select` calls a source that it makes"
        raise InputError(f"sources.{taken[0]}", problem, "Give it another name.")
    if file.select.rest != "drop" and file.calibration is not None and file.calibration.file is None:
        problem = "would enter as a source without calibration texts: each has its own"
        raise InputError(f"{PLACE}.rest", problem, "Give some for all (`calibration.file`), or say `rest: drop`.")
    if file.artifacts is not None:
        problem = "makes sources in the search's folder, which a copy elsewhere would not find"
        raise InputError(PLACE, problem, "Choose first (`evomerge select FILE`), and search over what it names.")
    if file.start_from:
        raise InputError(PLACE, "could choose other sources than the earlier search had", "Leave out `start_from`.")


def searched(file: SearchFile, sources: Mapping[str, str]) -> SearchFile:
    """The file that is searched when some sources are chosen, or made.

    Args:
        sources: those chosen, with their references as they are to be searched; what is always kept comes before them.
    """
    kept = {name: file.sources[name] for name in always_kept(file)} | dict(sources)
    update: dict[str, object] = {"sources": kept, "select": None}
    if (texts := file.calibration) is not None:
        own = {name: path for name, path in texts.sources.items() if name in kept}
        update["calibration"] = texts.model_copy(update={"sources": own})
    return file.model_copy(update=update)


def stand_in(file: SearchFile) -> SearchFile:
    """The file as it may be once sources are chosen: what is checked and planned before anybody knows which."""
    if file.select is None:
        return file
    most = file.select.keep + (file.select.rest != "drop")
    return searched(file, {name: file.sources[name] for name in choices(file)[:most]})
