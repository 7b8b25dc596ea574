"""The command observe: report a search to observers from a separate process."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from evomerge.commands.failing import FAILED
from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.observers import ObserverList, ObserverSettings, follow
from evomerge.search.settings.folder import open_store
from evomerge.yaml import load_yaml


class _Given(BaseModel):
    observers: ObserverList


def missing_lines(folder: Path, settings: Sequence[ObserverSettings], faults: Mapping[str, str]) -> Iterator[str]:
    """What a search says at its end about observers that did not get everything, with the command that makes up for it.

    Args:
        faults: as of ``Observers``.
    """
    for observer in settings:
        if why := faults.get(observer.kind):
            given = json.dumps({"kind": observer.kind} | observer.model_dump(mode="json", exclude_defaults=True))
            again = shlex.join(["evomerge", "observe", str(folder), given])
            yield f"observer {observer.kind} has not got everything ({why}); to report the rest: {again}"


def observe(folder: Path, observers: Sequence[str]) -> int:
    """Report a search to observers, each given as in a search file, until no driver is running; the exit code."""
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
    faults: dict[str, str] = {}
    with open_store(folder) as store, contextlib.suppress(KeyboardInterrupt):
        faults = follow(store, folder, given.observers)
    for kind, why in faults.items():
        hint = "It has not got everything: once that is fixed, the same command continues."
        print(f"error: {InputError(f'observers: {kind}', why, hint)}", file=sys.stderr)
    return FAILED if faults else 0
