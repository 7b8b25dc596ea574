"""Reads lm-eval's task files as text: which file defines a task, and which metrics it lists. Runs no code.

lm-eval takes seconds to import, and ten more to index its 14,000 files, so a wrong name is detected here first.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from evomerge.files import check_plain
from evomerge.plugins import unknown_name
from evomerge.yaml import check_yaml

OWN_TASKS = Path(__file__).parent / "tasks"

_MAX_BYTES = 1_000_000  # size limit of a task file
_MANY_BRACKETS = 1_000
_NAMES = re.compile(rb"^[ \t-]*[\"']?(?:task|group|tag)[\"']?:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


@cache
def library_tasks() -> Path:
    """The folder of the task files included in lm-eval, without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def library_file(name: str) -> Path | None:
    """The file in lm-eval that defines this task. Reading 14,000 files takes 0.2 s, and indexing them 10 s."""
    return _file_of(name, library_tasks())


def check_folder(folder: Path) -> None:
    """Reject a folder of task files that lm-eval, which reads every file in it, would never finish reading.

    Raises:
        InputError: something is not a regular file, or its YAML would expand without bound.
    """
    for file in _task_files(folder):
        try:
            check_plain(file, "task_folders")
        except OSError:  # such as a dangling link, which is skipped
            continue
        content = _content(file)
        if b"&" in content or content.count(b"[") + content.count(b"{") > _MANY_BRACKETS:
            check_yaml(content.decode("utf-8", "replace"), str(file))


def metrics_of(name: str, folders: tuple[Path, ...]) -> list[str] | None:
    """The metrics that the file of a task lists, with its filters (``exact_match,strict-match``) if it has any.

    None if the file does not say, but code or lm-eval decides.

    Raises:
        InputError: no file of the user, of this project or of lm-eval has that name anywhere.
    """
    file = next((task_file for folder in (*folders, OWN_TASKS) if (task_file := _file_of(name, folder))), None)
    file = file or library_file(name)
    if file is None:
        _refuse_unknown(name, folders)
        return None
    config = _read(file)
    metrics, filters = _names(config, "metric_list", "metric"), _names(config, "filter_list", "name")
    if not metrics or "class" in config:
        return None
    return [f"{metric},{filter_name}" for metric in metrics for filter_name in filters] if filters else metrics


def _names(config: Mapping[str, Any], field: str, key: str) -> list[str]:
    """The names of the entries of a list; empty if one of them is not given as plain text."""
    entries = config.get(field)
    named = [
        entry.get(key) if isinstance(entry, dict) else None for entry in (entries if isinstance(entries, list) else ())
    ]
    plain = [name for name in named if isinstance(name, str)]
    return plain if len(plain) == len(named) else []


def _refuse_unknown(name: str, folders: tuple[Path, ...]) -> None:
    """Reject a name that does not occur in any task file, or in what they include: as a task, a group or a tag."""
    text = name.encode("utf-8", "replace")
    names: set[str] = set()
    for folder in (*folders, OWN_TASKS, library_tasks()):
        for content in map(_content, _task_files(folder)):
            if text in content:
                return
            names.update(other.decode() for other in _NAMES.findall(content))
    raise unknown_name(name, names, "task", "task")


def _file_of(name: str, folder: Path) -> Path | None:
    quoted = rb"[\"']?" + re.escape(name.encode("utf-8", "replace")) + rb"[\"']?"
    line = re.compile(rb"^[\"']?task[\"']?:\s*" + quoted + rb"\s*(#.*)?$", re.MULTILINE)
    return min((file for file in _task_files(folder) if line.search(_content(file))), default=None)


def _task_files(folder: Path) -> Iterator[Path]:
    for above, _, files in os.walk(folder):
        yield from (Path(above, file) for file in files if "yaml" in file or "." not in file)


def _content(file: Path) -> bytes:
    """The content of a task file; empty if it is not a regular file, which is reported when the task is loaded."""
    try:
        if file.is_file() and file.stat().st_size <= _MAX_BYTES:
            return file.read_bytes()
    except OSError:
        pass
    return b""


def _read(file: Path, depth: int = 0) -> dict[str, Any]:
    """A task file's keys, merged over those of the files that it includes; empty if they cannot be read."""
    try:
        content = yaml.load(_content(file), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    included = content.get("include")
    below = _read(file.parent / included, depth + 1) if isinstance(included, str) and depth < 10 else {}
    return below | content


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Builds plain data, and None for ``!function`` and every other tag."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
