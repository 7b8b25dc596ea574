"""The command observe: report a search to observers from a separate process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.observers import ObserverList, follow
from evomerge.search.settings.folder import open_store
from evomerge.yaml import load_yaml


class _Given(BaseModel):
    observers: ObserverList


def observe(folder: Path, observers: Sequence[str]) -> None:
    """Report a search to observers, each given as in a search file, until no driver is running."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    content = {"observers": [load_yaml(text, "OBSERVER") for text in observers]}
    try:
        given = _Given.model_validate(content)
    except ValidationError as error:
        raise explain(error, "evomerge observe", _Given, content) from None
    except InputError as error:  # from the check of an observer's own class
        raise InputError(f"evomerge observe: {error.place}", error.problem, error.hint) from None
    for observer in given.observers:
        observer.check()
    with open_store(folder) as store, contextlib.suppress(KeyboardInterrupt):
        follow(store, folder, given.observers)
