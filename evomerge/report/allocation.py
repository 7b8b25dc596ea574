"""Which experts are in which layers of a routed candidate, and how much tokens use them, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.use import BASE, ExpertUse

ABSENT = "·"
_NAME = 14  # the maximum length of an expert's name


def columns_of(recipe: RoutedRecipe) -> tuple[str, ...]:
    """The experts in the order in which their use is measured, with the base last if tokens may abstain."""
    return (*recipe.experts, *([BASE] if recipe.router.base_expert else []))


def lives(recipe: RoutedRecipe, layer: int, expert: str) -> bool:
    """Whether an expert is in a layer; if tokens may abstain, the base is in every layer with experts."""
    group = recipe.group_of(layer)
    return expert in group.experts or (expert == BASE and bool(group.experts))


def depth_of(recipe: RoutedRecipe) -> int:
    """The number of layers of all its groups."""
    return sum(group.layers for group in recipe.groups)


def share_at(uses: Mapping[str, ExpertUse], layer: int, column: int) -> float | None:
    """An expert's share of a layer's gates, averaged over tasks; None if it was not measured."""
    known = [use.shares[layer][column] for use in uses.values() if layer < len(use.shares) and use.shares[layer]]
    return sum(known) / len(known) if known else None


def entropy_at(uses: Mapping[str, ExpertUse], layer: int) -> float | None:
    """A token's entropy over the experts of a layer in nats, averaged over tasks; None if it was not measured."""
    known = [use.entropy[layer] for use in uses.values() if layer < len(use.entropy)]
    numbers = [number for number in known if number is not None]
    return sum(numbers) / len(numbers) if numbers else None


def allocation_lines(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse]) -> list[str]:
    """A row for each layer with the share of every expert, then the means of each task.

    Args:
        uses: the measured use by task; without any, the experts of a layer are only marked.
    """
    columns = columns_of(recipe)
    names = [_short(name) for name in columns]
    first = max(len("layer 00"), *(len(_short(task)) for task in uses), 0) + 2
    what = "share of what the gates let through" if uses else "marked where they live"
    lines = [f"experts by layer: {what}, {ABSENT} where one is absent"]
    lines.append(" " * first + "  ".join(names) + ("  entropy" if uses else ""))
    for layer in range(depth_of(recipe)):
        cells = [_cell(recipe, uses, layer, column) for column in range(len(columns))]
        lines.append(_row(f"layer {layer}", first, cells, names, entropy_at(uses, layer)))
    for task, use in uses.items():
        cells = [f"{share:.0%}" for share in use.mean_shares] or [ABSENT] * len(columns)
        entropies = [number for number in use.entropy if number is not None]
        mean = sum(entropies) / len(entropies) if entropies else None
        lines.append(_row(_short(task), first, cells, names, mean))
    return lines


def _cell(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse], layer: int, column: int) -> str:
    if not lives(recipe, layer, columns_of(recipe)[column]):
        return ABSENT
    share = share_at(uses, layer, column)
    return "lives" if share is None else f"{share:.0%}"


def _row(name: str, first: int, cells: Sequence[str], names: Sequence[str], entropy: float | None) -> str:
    text = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True))
    return (name.ljust(first) + text + ("" if entropy is None else f"  {entropy:7.2f}")).rstrip()


def _short(name: str) -> str:
    name = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return name.rjust(5)
