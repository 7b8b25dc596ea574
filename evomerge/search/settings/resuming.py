"""The settings with which a search is resumed: its search file, changed only where it remains the same search.

Importing this loads nothing heavier than the store, so that mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.search.settings.folder import FILE_NAME, write_settings
from evomerge.search.settings.rebudget import check_budget
from evomerge.search.settings.search_file import SearchFile, apply_override, load_search_file, parse_search_file
from evomerge.store import Store

# Keys that may change when a search is resumed: when it ends, where it runs, and what is confirmed. With any other
# change, the candidates before and after would belong to two different searches.
RESUMABLE = (
    "budget",
    "confirm",
    "compositions",
    "pool",
    "cluster",
    "attempts",
    "attempt_hours",
    "store",
    "observers",
    "answers",
    "artifacts",
)
FIXED = ("cluster.cpus_per_worker",)  # results depend on the number of threads in the last bits


def resumed_file(folder: Path, store: Store, overrides: Sequence[str]) -> SearchFile:
    """The search file to continue with: the folder's copy with overrides, if it differs only where it may.

    Raises:
        InputError: it differs elsewhere (the message says how), or its budget is less than what is spent already.
    """
    recorded = _recorded_file(folder, store)
    before = recorded.model_dump(mode="json")
    path = folder / FILE_NAME
    edited = load_search_file(path).model_dump(mode="json") if path.is_file() else dict(before)
    if recorded.select is None and edited["select"] is not None and store.events(kinds=("selected",), newest=1):
        edited = dict(before)  # the driver died after it had chosen sources, and before it wrote them to the file
    for override in overrides:
        apply_override(edited, override)
    file = parse_search_file(edited, place=FILE_NAME, root=folder.resolve())
    if file.budget != recorded.budget:  # an unchanged one may be spent: then there is only something to confirm
        check_budget(file.budget, store)
    if not store.has_scores():  # no result depends on the old settings
        if file.name != recorded.name:
            raise InputError(f"{folder}/{FILE_NAME}: name", f"is {file.name!r}, and the search is {recorded.name!r}")
        return file
    differences = list(_differences(before, file.model_dump(mode="json"), ""))
    forbidden = [line for key, line in differences if key.split(".")[0] not in RESUMABLE or key in FIXED]
    if forbidden:
        raise InputError(
            f"{folder}/{FILE_NAME}",
            "differs from the search that was started: " + "; ".join(forbidden),
            f"Only {', '.join(RESUMABLE)} can change on resume; start a new search for anything else.",
        )
    return file


def _recorded_file(folder: Path, store: Store) -> SearchFile:
    """The search file as the store has it, with defaults for keys that the program that wrote it did not know yet."""
    try:
        return parse_search_file(
            store.search().settings, place="the settings recorded in the store", root=folder.resolve()
        )
    except InputError as error:
        hint = (
            "They were recorded by another version of Evomerge, or with a package that is not installed here. Continue "
            "the search with that version or package, or start a new one."
        )
        raise InputError(f"{folder}: {error.place}", error.problem, hint) from None


def is_same_search(file: SearchFile, store: Store) -> bool:
    """Whether a search file asks for the same candidates as the recorded one."""
    recorded, now = store.search().settings, file.model_dump(mode="json")
    return all(key in recorded and recorded[key] == value for key, value in now.items() if key not in RESUMABLE)


def record_resumed(folder: Path, store: Store, file: SearchFile) -> None:
    """Record the settings with which a search continues, in its folder and in its store."""
    settings = file.model_dump(mode="json")
    if settings != store.search().settings:
        # The file first: if this is interrupted, the next resume treats the difference as a change made by a person.
        write_settings(folder, settings)
        store.update_settings(settings)


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key path, description of the change) for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            path = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), after.get(name), path)
    elif before != after:
        yield key, f"{key}: {before!r} -> {after!r}"
