"""Settings of a configuration that differ between layers, so that they can follow layers to other positions.

Some settings list a value for each layer (``layer_types``), some list the numbers of the layers of a kind
(``mlp_only_layers``), some map such numbers to values (``per_layer_config``), and some count layers from the beginning
or the end (``first_k_dense_replace``). Each is read as one value per layer, which moves with the layer to its position
in a path, and is written back in its own form.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["each", "numbers", "by_number", "leading", "trailing", "last_before"]
"""The form of a setting: a value for each layer; the numbers of some layers; values by the numbers of some layers; how
many layers come first, or last; the number of the layer before those that come last."""

INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id"})
"""Attributes in which a module stores the number of its layer, by which it finds its part of the cache."""

_COUNTS: Mapping[str, Form] = {
    "first_k_dense_replace": "leading",
    "num_dense_layers": "leading",
    "moe_layer_start_index": "leading",
    "num_kv_shared_layers": "trailing",
    "moe_layer_end_index": "last_before",
}


@dataclass(frozen=True)
class LayerSetting:
    """A setting of a configuration as a value for each layer.

    Attributes:
        form: how config.json has it.
        values: for the forms "each" and "by_number" the setting of each layer (None if it has none), for all others
            whether the layer belongs to those that the setting names or counts.
    """

    form: Form
    values: tuple[Any, ...]


def layer_settings(config: Mapping[str, Any], layers: int) -> dict[str, LayerSetting]:
    """The layer settings of a configuration with ``layers`` layers, by key.

    ``config`` is a dictionary with defaults filled in.
    """
    settings: dict[str, LayerSetting] = {}
    for key, value in config.items():
        if key in _COUNTS and type(value) is int:
            settings[key] = LayerSetting(_COUNTS[key], tuple(_counted(_COUNTS[key], value, layers)))
        elif isinstance(value, dict) and "layer" in key and (by_layer := _by_number(value, layers)) is not None:
            settings[key] = LayerSetting("by_number", by_layer)
        elif not isinstance(value, list | tuple) or _is_of_the_model(key):
            continue
        elif _are_numbers(value, layers) and ("layer" in key or key.endswith("_idxs")):
            settings[key] = LayerSetting("numbers", tuple(number in value for number in range(layers)))
        elif len(value) == layers:
            settings[key] = LayerSetting("each", tuple(value))
    return settings


def written_settings(settings: Mapping[str, LayerSetting], path: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a model whose layers have these values, each in its own form.

    If the form cannot express the values, as when layers that are counted from the beginning do not come first, the
    nearest value is written.

    Args:
        settings: gives the form of each setting.
        path: for each layer its value of every setting.
    """
    return {key: _written(setting.form, [layer[key] for layer in path]) for key, setting in settings.items()}


def with_text_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other settings of the text model: in its ``text_config`` if it has one."""
    part = config.get("text_config")
    if isinstance(part, dict):
        return {**config, "text_config": {**part, **settings}}
    return {**config, **settings}


def _by_number(value: Mapping[Any, Any], layers: int) -> tuple[Any, ...] | None:
    """A dictionary's value for each layer; None if its keys are not layer numbers (which are strings in JSON)."""
    by_name = {str(number): content for number, content in value.items()}
    names = [str(number) for number in range(layers)]
    return tuple(by_name.get(name) for name in names) if by_name and by_name.keys() <= set(names) else None


def _is_of_the_model(key: str) -> bool:
    return key in ("architectures", "time_step_limit") or key.endswith(("token_id", "token_ids"))


def _are_numbers(values: Sequence[Any], layers: int) -> bool:
    """Whether a list has the numbers of some layers: these increase, while a list of sizes or flags does not."""
    in_range = all(type(value) is int and 0 <= value < layers for value in values)
    return in_range and all(one < other for one, other in itertools.pairwise(values))


def _counted(form: Form, count: int, layers: int) -> list[bool]:
    if form == "leading":
        return [number < count for number in range(layers)]
    if form == "trailing":
        return [number >= layers - count for number in range(layers)]
    return [number > (count if count >= 0 else layers + count) for number in range(layers)]


def _written(form: Form, values: Sequence[Any]) -> Any:
    if form == "each":
        return list(values)
    if form == "by_number":
        return {str(number): value for number, value in enumerate(values) if value is not None}
    if form == "numbers":
        return [number for number, belongs in enumerate(values) if belongs]
    if form == "leading":
        return next((number for number, belongs in enumerate(values) if not belongs), len(values))
    trailing = next((number for number, belongs in enumerate(reversed(values)) if not belongs), len(values))
    return trailing if form == "trailing" else len(values) - 1 - trailing
