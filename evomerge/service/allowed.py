"""What a search file may contain when it arrives over HTTP, possibly from somebody without an account on this machine.

It may name models and data in the folders that the server allows, and models on the hub. It may not run code, reach
other places, or take more than a moment to parse.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints.places import split_reference
from evomerge.errors import InputError
from evomerge.faults import NAME_PATTERN
from evomerge.files import is_model_here, split_expert, with_expert
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.yaml import load_yaml

PLACE = "search file"

MAX_CHARACTERS = 2**16
MAX_VALUES = 20_000
"""The limits of the text, and of its values once YAML aliases are expanded."""

_REFUSED = (
    "store",
    "observers",
    "artifacts",
    "cluster.address",
    "cluster.insecure",
    "cluster.runtime_env",
    "allow_task_code",
)
"""Keys with which a search could reach other machines or run its own code."""

_CODE_KEYS = ("trust_remote_code", "allow_task_code")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_NAME = re.compile(NAME_PATTERN)
_PATH = re.compile(r"^[/~]|(^|/)\.\.(/|$)|^\./")
_CODE_FILE = re.compile(r"\.pyc?\s*$", re.IGNORECASE)


def checked_file(text: str, folders: Sequence[Path]) -> SearchFile:
    """Parse and check a search file. Its paths become absolute; relative paths are resolved against the first folder.

    Args:
        folders: the folders that may hold the models and data it names; the last one is the folder of all searches.

    Raises:
        InputError: names the key that is not allowed here, or what is wrong with the file.
    """
    content = _content(text)
    for key in _REFUSED:
        if _at(content, key) not in (None, False):
            problem = "is not allowed in a search file sent over HTTP"
            raise InputError(f"{PLACE}: {key}", problem, "Leave it out, or start the search from the command line.")
    try:
        file = parse_search_file(_with_searches(content, folders[-1]), place=PLACE, root=folders[0])
    except (ValueError, OverflowError, RecursionError, OSError):  # a number of 10,000 digits, a path with a null byte
        raise InputError(PLACE, "holds a value that cannot be read") from None
    for key, reference in file.sources.items():
        located(reference, f"{PLACE}: sources.{key}", folders)
    settings = file.model_dump(mode="json", exclude={"sources"})
    for key, name, value in _leaves(settings, ""):
        _check(key, name, value, folders)
    return file


def located(reference: str, place: str, folders: Sequence[Path]) -> str:
    """A reference to a model with absolute folders; relative ones are resolved against the first folder.

    Raises:
        InputError: the model is neither in these folders nor on the hub. Names ``place``, never what was found there.
    """
    parts = []
    for part in split_reference(reference, folders[0]):
        if not part:
            raise InputError(place, "a reference has nothing before or after its plus", "Write `MODEL+ADAPTER`.")
        named, expert = split_expert(part, folders[0])
        local = os.path.join(folders[0], os.path.expanduser(named))
        found = os.path.realpath(local) if is_model_here(local) else named
        if not is_inside(found, folders) and not (is_hub_id(named) and found == named):
            raise InputError(place, "names a folder that this server does not allow", _hint(folders))
        parts.append(with_expert(found, expert))
    return "+".join(parts)


def is_hub_id(text: str) -> bool:
    """Whether a text names a model on the hub: org/name, or org/name@revision."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def is_inside(path: str, folders: Sequence[Path]) -> bool:
    """Whether an absolute path is inside one of these folders after symlinks are resolved."""
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return False
    return Path(path).is_absolute() and any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def _content(text: str) -> Mapping[str, Any]:
    """Parse the text of a search file after checking that it is small enough."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(PLACE, f"is longer than {MAX_CHARACTERS} characters")
    content = load_yaml(text, PLACE, most_values=MAX_VALUES)
    if not isinstance(content, dict):
        raise InputError(PLACE, "is not a search file: its top level must be keys such as `sources:` and `space:`")
    return content


def _with_searches(content: Mapping[str, Any], searches: Path) -> Mapping[str, Any]:
    """The content with the names in ``start_from`` replaced by paths in the folder of all searches."""
    named = content.get("start_from")
    listed = [named] if isinstance(named, str) else named
    if not isinstance(listed, list):
        return content
    at = [str(searches / name) if isinstance(name, str) and _NAME.fullmatch(name) else name for name in listed]
    return {**content, "start_from": at}


def _at(content: Mapping[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if value not in ([], {}, ()) else None


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (key path, last key, value) for every value that is not a container."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, key.rpartition(".")[2], value


def _check(key: str, name: str, value: Any, folders: Sequence[Path]) -> None:
    """Refuse a value that would make a search run code or read files outside the allowed folders.

    This covers every setting, including those of plug-ins: by now every path is absolute or at least looks like a path.
    """
    place = f"{PLACE}: {key}"
    if name in _CODE_KEYS and value:
        raise InputError(place, "would run code, which a search file sent over HTTP may not", "Leave it out.")
    if name == "evaluator" and value == "python":
        problem = "runs a Python file, which a search file sent over HTTP may not"
        raise InputError(place, problem, "Start the search from the command line.")
    if not isinstance(value, str):
        return
    if _CODE_FILE.search(value):
        raise InputError(place, "names a Python file, which a search file sent over HTTP may not")
    if _PATH.search(value) and not is_inside(value, folders):
        raise InputError(place, "names a path that this server does not allow", _hint(folders))


def _hint(folders: Sequence[Path]) -> str:
    return f"Allowed are {', '.join(map(str, folders))}, and models on the hub; evomerge serve --sources DIR adds more."
