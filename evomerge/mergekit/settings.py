"""Values in mergekit's notation: plain, as a gradient over the layers of a slice, or selected by filters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from evomerge.errors import InputError
from evomerge.mergekit.grammar import Grammar, Setting, Value
from evomerge.plugins import unknown_name

Parameters = Mapping[str, Any]
"""The settings in one place of a configuration, by mergekit's names, validated but otherwise unchanged."""


def check_keys(given: Any, known: Collection[str], place: str) -> None:
    """Reject anything but a mapping with keys among ``known``."""
    if not isinstance(given, Mapping):
        raise InputError(place, "must be keys with values")
    for key in given:
        if key not in known:
            raise unknown_name(str(key), known, place, "key")


def read_parameters(given: Any, grammar: Grammar, place: str) -> Parameters:
    """The validated ``parameters:`` of a model, a slice or a whole configuration; empty if ``given`` is None.

    Raises:
        InputError: an unknown key, a value of the wrong kind, or one that a recipe cannot represent.
    """
    if given is None:
        return {}
    check_keys(given, grammar.names, place)
    for setting in grammar.settings:
        if setting.name in given:
            _check_form(given[setting.name], setting, f"{place}.{setting.name}")
    for name, value in grammar.fixed.items():
        if name in given and given[name] != value:
            raise InputError(f"{place}.{name}", f"is always {value:g} here, not {given[name]!r}", "Remove it.")
    return dict(given)


def find_value(setting: Setting, levels: Iterable[Parameters], tensor: str, t: float) -> Value | None:
    """The value for one tensor at the point ``t`` in [0, 1] of its slice; mergekit's default if none is set.

    Args:
        levels: the places that may set it, nearest first. The first that has a value for this tensor is used.
        tensor: the name that filters are matched against.
    """
    for level in levels:
        if setting.name in level:
            value = _at(level[setting.name], tensor, t, setting.switch)
            if value is not None:
                return bool(value) if setting.switch else float(value)
    return setting.default


def _check_form(given: Any, setting: Setting, place: str) -> None:
    rules = given if isinstance(given, list) else [given]
    if not any(isinstance(rule, Mapping) for rule in rules):
        return _check_values(given, setting, place)
    for rule in rules:
        check_keys(rule, ("filter", "value"), place)
        if not isinstance(rule.get("filter"), str | None):
            raise InputError(f"{place}.filter", f"must be a part of tensors' names, not {rule['filter']!r}")
        if "value" not in rule:
            raise InputError(place, "has a filter without a value")
        _check_values(rule["value"], setting, place)
    return None


def _check_values(given: Any, setting: Setting, place: str) -> None:
    if given == []:
        raise InputError(place, "is an empty list")
    for value in given if isinstance(given, list) else [given]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if setting.switch and not (isinstance(value, bool) or (number and value in (0, 1))):
            raise InputError(place, f"must be true or false, not {value!r}")
        if not setting.switch and not (number and math.isfinite(value)):
            raise InputError(place, f"must be a number, a list of numbers or filters with values, not {value!r}")


def _at(given: Any, tensor: str, t: float, switch: bool) -> Value | None:
    rules = given if isinstance(given, list) else [given]
    if not any(isinstance(rule, Mapping) for rule in rules):
        return _on_gradient(rules, t, switch)
    for rule in rules:
        if rule.get("filter") in (None, "*") or rule["filter"] in tensor:
            return _at(rule["value"], tensor, t, switch)
    return None


def _on_gradient(points: Sequence[Value], t: float, switch: bool) -> Value:
    left = int(t * (len(points) - 1))
    if switch:
        return points[left]
    right = min(left + 1, len(points) - 1)
    fraction = t * (len(points) - 1) - left
    return (1 - fraction) * points[left] + fraction * points[right]
