"""Checks what a model reference says without opening the model: that its folder exists, and its config.json."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from evomerge.checkpoints.config import check_config
from evomerge.checkpoints.places import find_folder, is_hub_id, split_reference
from evomerge.checkpoints.prompt_configs import prompt_facts
from evomerge.errors import InputError
from evomerge.files import read_json
from evomerge.recipes.prompts import PromptFacts

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_ANOTHER_KIND = ("*.gguf", "*.pt", "latest", "global_step*")
"""GGUF files, and DeepSpeed checkpoints."""


def check_reference(reference: str, place: str, root: Path | None = None) -> None:
    """Reject a model, or an adapter on it, that does not exist or has no readable configuration.

    For models on the hub only the configurations are downloaded. Folders with something in place of a model pass this
    check, because opening them gives a more specific error.

    Raises:
        InputError: names ``place`` and the folder.
    """
    model, *adapters = split_reference(reference, root)
    folder = find_folder(model, place, root, [_CONFIG, _ADAPTER])
    if (folder / _ADAPTER).exists():
        refuse_adapter_alone(folder, reference, place)
    is_elsewhere = is_hub_id(model, root) and not (folder / _CONFIG).exists()
    if not is_elsewhere and not any(any(folder.glob(pattern)) for pattern in _ANOTHER_KIND):
        check_config(_json(folder, _CONFIG, "a model", place), place)
    for adapter in adapters:
        _json(find_folder(adapter, place, root, [_ADAPTER]), _ADAPTER, "an adapter", place)


def refuse_adapter_alone(folder: Path, reference: str, place: str) -> NoReturn:
    """Reject an adapter given in place of a model.

    Raises:
        InputError: always; it says how to name model and adapter together.
    """
    content = read_json(folder / _ADAPTER, place)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    named = base if isinstance(base, str) and base else None
    problem = f"{folder} is an adapter, which is not a model without its base"
    if named is None or not (os.path.isdir(named) or is_hub_id(named, None)):
        trained = "" if named is None else f"; it was trained on {named}"
        raise InputError(place, problem, f"Write `BASE+{reference}`, where BASE is the model that it adapts{trained}.")
    raise InputError(place, problem, f"Write `{named}+{reference}`.")


def adapter_types(reference: str, place: str) -> tuple[str, ...]:
    """The peft_type of each adapter on a model that ``check_reference`` accepted; "" for one without a type."""
    return tuple(str(content.get("peft_type") or "") for content in _adapters(reference, place))


def prompt_of(reference: str, place: str) -> PromptFacts | None:
    """The facts about the prompt on such a model; None if it has no adapters, or adapters of weights.

    Raises:
        InputError: it is a prompt that cannot be used.
    """
    return next((facts for content in _adapters(reference, place) if (facts := prompt_facts(content, place))), None)


def _adapters(reference: str, place: str) -> Iterator[dict[str, Any]]:
    """The configurations of the adapters on a model."""
    for adapter in split_reference(reference, None)[1:]:
        yield _json(find_folder(adapter, place, None, [_ADAPTER]), _ADAPTER, "an adapter", place)


def local_config(reference: str) -> dict[str, Any]:
    """The config.json of a model that ``check_reference`` accepted; empty if there is none on this machine."""
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
