"""What a reference to a model says without opening it: whether its folder is there, and what its config.json holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evomerge.checkpoints.config import check_config
from evomerge.checkpoints.places import find_folder, is_hub_id, split_reference
from evomerge.errors import InputError
from evomerge.files import read_json

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_ANOTHER_KIND = (_ADAPTER, "*.gguf", "*.pt", "latest", "global_step*")
"""Adapters alone, GGUF, DeepSpeed's checkpoints."""


def check_reference(reference: str, place: str, root: Path | None = None) -> None:
    """Refuse a model, or an adapter on it, that is not there or has no configuration that can be read.

    Of what is on the hub the configuration alone is downloaded. Left to be opened are folders in which something else
    stands for a model: that is said better by who knows what it is.

    Raises:
        InputError: names ``place`` and the folder.
    """
    model, *adapters = split_reference(reference, root)
    folder = find_folder(model, place, root, [_CONFIG])
    is_elsewhere = is_hub_id(model, root) and not (folder / _CONFIG).exists()
    if not is_elsewhere and not any(any(folder.glob(pattern)) for pattern in _ANOTHER_KIND):
        check_config(_json(folder, _CONFIG, "a model", place), place)
    for adapter in adapters:
        _json(find_folder(adapter, place, root, [_ADAPTER]), _ADAPTER, "an adapter", place)


def local_config(reference: str) -> dict[str, Any]:
    """The config.json of a model that ``check_reference`` let through; empty where there is none on this machine."""
    file = Path(os.path.expanduser(split_reference(reference, None)[0])) / _CONFIG
    content = read_json(file, reference) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _json(folder: Path, name: str, what: str, place: str) -> dict[str, Any]:
    if not (folder / name).exists():
        raise InputError(place, f"has no {name} in {folder}", f"Name a folder that holds {what}.")
    content = read_json(folder / name, place)
    if not isinstance(content, dict):
        raise InputError(place, f"{name} is not a JSON object", "Download it again.")
    return content
