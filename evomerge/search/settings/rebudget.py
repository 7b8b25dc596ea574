"""Changing the budget of a search: it is written to the search file, and read by the running driver or the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.files import read_text
from evomerge.search.settings.folder import FILE_NAME, write_settings
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.settings.sections import Budget
from evomerge.store import Store
from evomerge.store.events import SettingsRefused
from evomerge.yaml import load_yaml


def bounds_of(overrides: Sequence[str], hint: str) -> dict[str, Any]:
    """The bounds in options such as ``--set budget.candidates=N``.

    Raises:
        InputError: another key is set; it has this ``hint``.
    """
    bounds = {}
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, bound = key.strip().partition(".")
        if section != "budget" or bound not in Budget.model_fields:
            raise InputError(f"--set {override}", "is not a budget setting", hint)
        bounds[bound] = load_yaml(text, f"--set {override}")
    return bounds


def change_budget(folder: Path, store: Store, changes: Mapping[str, Any]) -> Budget:
    """Write changed bounds into the search file of a search.

    A running driver must be told to read them with the verb "reread".

    Args:
        changes: new values by the name of the bound; None removes it.

    Returns:
        The new budget.

    Raises:
        InputError: no bound is left, one is not a number or already spent, or the search file cannot be read.
    """
    content = _content(folder / FILE_NAME, store)
    content["budget"] |= changes
    file = parse_search_file(content, place=FILE_NAME, root=folder.resolve())
    check_budget(file.budget, store)
    write_settings(folder, content)
    return file.budget


def check_budget(budget: Budget, store: Store) -> None:
    """Refuse a budget of fewer candidates than a search has asked for (InputError)."""
    asked = sum(store.counts().values())
    if budget.candidates is not None and budget.candidates < asked:
        problem = f"is {budget.candidates}, and {asked} candidates have been asked for already"
        raise InputError("budget.candidates", problem, f"Give {asked} to end it here, or more to continue.")


def reread_budget(folder: Path, store: Store) -> Budget | None:
    """Read the budget of the search file again and record it in the store; None, and an event, if it is not valid."""
    try:
        content = _content(folder / FILE_NAME, store)
        budget = parse_search_file(content, place=FILE_NAME, root=folder.resolve()).budget
        check_budget(budget, store)
        if budget.cost is not None and store.search().record.cluster.prices is None:
            hint = "Stop the search and resume it."
            raise InputError("budget.cost", "needs a price, and a running driver cannot be given one", hint)
    except InputError as error:
        store.record_event(SettingsRefused(why=str(error)))
        return None
    store.update_settings(store.search().settings | {"budget": budget.model_dump(mode="json")})
    return budget


def _content(path: Path, store: Store) -> dict[str, Any]:
    """The search file in the folder, which a person may have edited; if it is missing, that in the store."""
    content = load_yaml(read_text(path, FILE_NAME), FILE_NAME) if path.is_file() else store.search().settings
    if not isinstance(content, dict) or not isinstance(content.get("budget"), dict):
        raise InputError(FILE_NAME, "is no longer a search file", "Put back the one that the search was started with.")
    return content
