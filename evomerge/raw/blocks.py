"""The blocks of image models, and groups of tensors by patterns of their names and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from evomerge.raw.layouts import KEPT, LAST, TEXT, Layout, depths_of, layout_of


def blocks_of(names: Iterable[str]) -> dict[str, str]:
    """The block of each tensor; "" if it has none, as for all tensors of a model in an unknown layout."""
    names = list(names)
    if (layout := layout_of(names)) is None:
        return dict.fromkeys(names, "")
    found = _by_rules(names, layout)
    ends = sorted(block for block in found.values() if re.fullmatch(r"OUT\d\d", block))
    alone = {block for block in found.values() if block.startswith(TEXT)} == {f"{TEXT}1"}
    named = {LAST: ends[-1] if ends else "OUT", **({f"{TEXT}1": TEXT} if alone else {})}
    return {name: named.get(block, block) for name, block in found.items()}


def _by_rules(names: Sequence[str], layout: Layout) -> dict[str, str]:
    depths, found = depths_of(names), {}
    for name in names:
        matches = ((rule, match) for rule in layout.rules if (match := rule.pattern.match(name)) is not None)
        rule_match = next(matches, None)
        found[name] = "" if rule_match is None else rule_match[0].block(rule_match[1], depths)
    return found


def grouped(names: Iterable[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The group of each tensor that belongs to one: the first with a pattern that matches its name or its block.

    Patterns are shell patterns: ``*attn*``, ``IN0?``. The letters of a block without a number match all numbers:
    ``TEXT`` is TEXT1 and TEXT2. A tensor of a block in ``KEPT`` can only belong to a group that names this block.

    Args:
        patterns: by group.
    """
    found = {}
    for name, block in blocks_of(names).items():
        for group, of_group in patterns.items():
            if block in of_group or (block not in KEPT and any(_fits(name, block, one) for one in of_group)):
                found[name] = group
                break
    return found


def _fits(name: str, block: str, pattern: str) -> bool:
    if fnmatchcase(name, pattern):
        return True
    return block != "" and (fnmatchcase(block, pattern) or block.rstrip("0123456789") == pattern)
