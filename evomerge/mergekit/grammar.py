"""What mergekit lets one say of a merge method, and what it is called in a recipe; each method holds its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evomerge.method import GROUP, find_method
from evomerge.plugins import plugins, unknown_name

Value = float | bool


@dataclass(frozen=True)
class Setting:
    """A number, or a yes/no switch, that mergekit takes.

    Attributes:
        name: in mergekit's file.
        ours: in a recipe's blends.
        default: mergekit's; None where a value must be given. A bool tells that this is a switch.
        absent: what a blend means that leaves it out; None where every blend says it.
        per_source: each source may have its own.
    """

    name: str
    ours: str
    default: Value | None
    absent: Value | None = None
    per_source: bool = False

    @property
    def switch(self) -> bool:
        return isinstance(self.default, bool)


@dataclass(frozen=True)
class Grammar:
    """What mergekit lets one say of a method.

    Attributes:
        base: what `base_model` is. "source": a model like the others, mixed where it is listed. "apart": needed, and
            what task vectors are taken against. "optional": apart where there is one. "first": needed, the first of the
            sources.
        least: the fewest sources, the base that stands apart not counted.
        most: the most sources.
        copies_base: with nothing beside the base, the merge is the base.
        sum: how task vectors are added, where `lambda` and `normalize` act on the sum: "plain", or of those that agree
            in sign ("elected").
        settings: what can be set.
        fixed: what a recipe cannot hold, with the value that it always has here.
        idle: what mergekit reads and no result hangs on.
        unsaid: numbers of ours that mergekit has no word for, with the value that is always meant there.
    """

    base: Literal["source", "apart", "optional", "first"]
    settings: tuple[Setting, ...] = ()
    least: int = 1
    most: int | None = None
    copies_base: bool = False
    sum: Literal["plain", "elected"] | None = None
    fixed: Mapping[str, Value] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    unsaid: tuple[Setting, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*(setting.name for setting in self.settings), *self.fixed, *self.idle]


def find_grammar(method: str, place: str, noun: str = "merge method") -> Grammar:
    """What mergekit lets one say of the method of this name.

    Raises:
        InputError: mergekit has no such method, or we have not.
    """
    names = plugins(GROUP)
    grammar = find_method(method, place).mergekit if method in names else None
    if grammar is None:
        known = [name for name in names if find_method(name, place).mergekit is not None]
        raise unknown_name(method, known, place, noun)
    return grammar


def per_source(name: str, default: float | None) -> Setting:
    """A number that each source has its own of."""
    return Setting(name, name, default, per_source=True)


def for_all(name: str, default: float | None, absent: float | None = None) -> Setting:
    """A number for all sources; left out of a blend it means ``absent``, mergekit's default unless given."""
    return Setting(name, name, default, absent=default if absent is None else absent)


WEIGHT = per_source("weight", None)
DENSITY = per_source("density", 1.0)
LAMBDA = for_all("lambda", 1.0)


def task_vectors(
    sum: Literal["plain", "elected"], *more: Setting, normalize: bool = False, rescale: bool | None = None
) -> Grammar:
    """The family that mergekit calls generalised task arithmetic. Nothing is rescaled where ``rescale`` is None."""
    settings = [
        WEIGHT,
        *more,
        Setting("normalize", "normalize", normalize, absent=False),
        LAMBDA,
    ]
    idle = ["int8_mask"]  # it chooses how signs are stored
    if rescale is None:
        idle += ["density", "rescale"]
    else:
        settings.append(Setting("rescale", "rescale", rescale, absent=rescale))
    return Grammar("apart", tuple(settings), copies_base=True, sum=sum, idle=tuple(idle))
