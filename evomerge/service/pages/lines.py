"""Finds a fault in a search file: from the place that an error names to a line of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

_LINE = re.compile(r"\bline (\d+)$")
_TASK = re.compile(r"\btask ([^\s:,]+)(?:: ([\w.]+))?")
_MEASURES = ("objectives", "constraints", "features")


@dataclass(frozen=True)
class FaultPlace:
    """A line number from 1, or 0 if unknown, and the keys that lead to the fault."""

    line: int
    path: tuple[str, ...] = ()


def place_of(text: str, field: str) -> FaultPlace:
    """The place of the key that ``field`` names, or of its innermost part that exists.

    Args:
        text: YAML, valid or not.
        field: as errors name it: ``search file: objectives.maths.metric``, ``sources.maths``, ``search file, line 7``,
            ``objectives.maths: file``, ``task gsm8k: held_out`` of the objective on that task.
    """
    if (match := _LINE.search(field)) is not None:
        return FaultPlace(min(int(match[1]), text.count("\n") + 1))
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return FaultPlace(0)
    path = _path(root, field)
    line, node = 0, root
    for key in path:
        pair = next((pair for pair in _pairs(node) if pair[0].value == key), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return FaultPlace(line, tuple(path))


def _path(root: yaml.Node | None, field: str) -> Sequence[str]:
    """The keys that a place names, outermost first."""
    if (task := _TASK.search(field)) is not None and (keys := _of_task(root, task[1])) is not None:
        return [*keys, *(task[2] or "task").split(".")]
    known = {key.value for key, _ in _pairs(root)}
    parts = [part.split(".") for part in field.split(": ")]
    begin = next((i for i, part in enumerate(parts) if part[0] in known), len(parts) - 1)
    return [key for part in parts[begin:] for key in part]


def _of_task(root: yaml.Node | None, task: str) -> Sequence[str] | None:
    """The keys of the objective or constraint that uses a task of lm-eval."""
    for section, measures in _pairs(root):
        for name, settings in _pairs(measures) if section.value in _MEASURES else ():
            if any(key.value == "task" and getattr(value, "value", None) == task for key, value in _pairs(settings)):
                return section.value, name.value
    return None


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
