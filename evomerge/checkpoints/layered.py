"""What a configuration says of single layers, so that it can be said of the same layers in other places.

Some settings list a value for each layer (``layer_types``), some the numbers of the layers that are of a kind
(``mlp_only_layers``), some map such numbers to more (``per_layer_config``), and some count layers from the beginning or
the end (``first_k_dense_replace``). Each is read as a value for every layer, which a layer takes along to its place in
a path, and is written in its own form there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["each", "numbers", "by_number", "leading", "trailing", "last_before"]
"""A value for each layer; the numbers of some; values of some by their numbers; how many come first, or last; the
number of the layer before those that come last."""

PLACES = frozenset({"layer_idx", "layer_id"})
"""Where a module keeps the number of its layer, which says where its part of the cache is."""

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

    ``values`` has what is said of the layer for the forms "each" and "by_number" (None where nothing is), and for all
    others whether the layer is among those that are meant.
    """

    form: Form
    values: tuple[Any, ...]


def layer_settings(config: Mapping[str, Any], layers: int) -> dict[str, LayerSetting]:
    """What a configuration, as a dictionary with defaults filled in, says of each of ``layers`` layers, by its key."""
    settings: dict[str, LayerSetting] = {}
    for key, value in config.items():
        if key in _COUNTS and type(value) is int:
            settings[key] = LayerSetting(_COUNTS[key], tuple(_counted(_COUNTS[key], value, layers)))
        elif isinstance(value, dict) and "layer" in key and (said := _by_number(value, layers)) is not None:
            settings[key] = LayerSetting("by_number", said)
        elif not isinstance(value, list | tuple) or _is_of_the_model(key):
            continue
        elif _are_numbers(value, layers) and ("layer" in key or key.endswith("_idxs")):
            settings[key] = LayerSetting("numbers", tuple(number in value for number in range(layers)))
        elif len(value) == layers:
            settings[key] = LayerSetting("each", tuple(value))
    return settings


def written_settings(settings: Mapping[str, LayerSetting], path: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a model whose layers have these values, in the form that each setting has.

    A form that cannot say it, such as a count of layers that do not come first, says what comes nearest.

    Args:
        path: for each layer its value of every setting.
    """
    return {key: _written(setting.form, [layer[key] for layer in path]) for key, setting in settings.items()}


def with_text_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other settings of the text model: in its part of it, where it has one."""
    part = config.get("text_config")
    if isinstance(part, dict):
        return {**config, "text_config": {**part, **settings}}
    return {**config, **settings}


def _by_number(value: Mapping[Any, Any], layers: int) -> tuple[Any, ...] | None:
    """What a dictionary says of each layer; None where its keys are not numbers of layers (JSON makes them texts)."""
    said = {str(number): content for number, content in value.items()}
    names = [str(number) for number in range(layers)]
    return tuple(said.get(name) for name in names) if said and said.keys() <= set(names) else None


def _is_of_the_model(key: str) -> bool:
    return key in ("architectures", "time_step_limit") or key.endswith(("token_id", "token_ids"))


def _are_numbers(values: Sequence[Any], layers: int) -> bool:
    """Numbers of layers rise; what is said of each layer (a size, yes or no) does not, or goes beyond."""
    known = all(type(value) is int and 0 <= value < layers for value in values)
    return known and all(one < other for one, other in itertools.pairwise(values))


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
        return {str(number): said for number, said in enumerate(values) if said is not None}
    if form == "numbers":
        return [number for number, meant in enumerate(values) if meant]
    if form == "leading":
        return next((number for number, meant in enumerate(values) if not meant), len(values))
    trailing = next((number for number, meant in enumerate(reversed(values)) if not meant), len(values))
    return trailing if form == "trailing" else len(values) - 1 - trailing
