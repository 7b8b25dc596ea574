"""Where in a search file a fault stands: from the place that an error names to a line of the text."""

from __future__ import annotations

import re

import yaml

_LINE = re.compile(r"\bline (\d+)$")


def line_of(text: str, field: str) -> int:
    """The line, from 1, of the key that ``field`` names; of the innermost part of it that is there; 0 if none is.

    Args:
        text: YAML, whole or broken.
        field: as errors name it: ``search file: objectives.maths.metric``, ``sources.maths``, ``search file, line 7``.
    """
    if (found := _LINE.search(field)) is not None:
        return min(int(found[1]), text.count("\n") + 1)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return 0
    line = 0
    for key in field.rpartition(": ")[2].split("."):
        pair = next((pair for pair in _pairs(node) if pair[0].value == key), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
