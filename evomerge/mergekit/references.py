"""Model references in mergekit's notation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from evomerge.errors import InputError
from evomerge.plugins import unknown_name


def read_reference(given: Any, place: str) -> str:
    """A reference that mergekit writes as text (``path@revision+lora@revision``) or as keys, always as text.

    Raises:
        InputError: it is neither, or cannot be written as one text.
    """
    if isinstance(given, Mapping) and "path" not in given:
        _check(given, ("model", "lora"), place)
        parts = [_read_path(given.get("model"), f"{place}.model")]
        parts += [_read_path(given["lora"], f"{place}.lora")] if given.get("lora") is not None else []
        return "+".join(parts)
    return _read_path(given, place, adapters=not isinstance(given, Mapping))


def _read_path(given: Any, place: str, *, adapters: bool = False) -> str:
    path, revision = given, None
    if isinstance(given, Mapping):
        _check(given, ("path", "revision"), place)
        path, revision = given.get("path"), given.get("revision")
    if not isinstance(path, str) or not path.strip() or not isinstance(revision, str | None):
        raise InputError(place, "must be a folder or a hub id")
    if "+" in path and not adapters:
        raise InputError(place, f"{path!r} has a + in it, which divides a model from its adapter", "Rename the folder.")
    return path if revision is None else f"{path}@{revision}"


def _check(given: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in given:
        if key == "override_architecture":
            raise InputError(f"{place}.{key}", "cannot be taken: config.json says what a model is", "Remove it.")
        if key not in known:
            raise unknown_name(str(key), known, place, "key")


def short_names(references: Iterable[str]) -> dict[str, str]:
    """A name for each reference: ``org/name@revision+adapter`` becomes ``name+adapter``."""
    names: dict[str, str] = {}
    for reference in references:
        parts = (part.partition("@")[0].rstrip("/").rpartition("/")[2] for part in reference.split("+"))
        stem = "+".join(parts) or "source"
        free = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        names[reference] = next(name for name in free if name not in names.values())
    return names
