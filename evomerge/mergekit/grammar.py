"""The settings of a merge method in mergekit, and their names in a recipe; each method defines its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evomerge.method import GROUP, find_method
from evomerge.plugins import plugins, unknown_name

Value = float | bool


@dataclass(frozen=True)
class Setting:
    """A number, or a yes/no switch, that mergekit accepts.

    Attributes:
        name: its name in mergekit's file.
        ours: its name in a recipe's blends.
        default: mergekit's default; None if a value is required. A bool means that this is a switch.
        absent: the meaning of a blend that omits it; None if blends never omit it.
        per_source: each source may have its own value.
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
    """The settings that mergekit accepts for a method.

    Attributes:
        base: the meaning of `base_model`. "source": a model like the others, mixed if it is listed. "apart": required,
            and task vectors are relative to it. "optional": like "apart" if there is one. "first": required, and the
            first of the sources.
        least: the minimum number of sources, not counting a base that is "apart".
        most: the maximum number of sources.
        copies_base: with only the base, the merge is the base.
        sum: how task vectors are added, where `lambda` and `normalize` act on the sum: "plain", or only those that
            agree in sign ("elected").
        settings: the settings.
        fixed: settings that a recipe cannot represent, with the value that they always have here.
        idle: settings that mergekit reads, but that affect no result.
        unsaid: our numbers that mergekit has no setting for, with the value that they always have there.
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
    """The settings that mergekit accepts for the method with this name.

    Raises:
        InputError: mergekit has no such method, or we do not.
    """
    names = plugins(GROUP)
    grammar = find_method(method, place).mergekit if method in names else None
    if grammar is None:
        known = [name for name in names if find_method(name, place).mergekit is not None]
        raise unknown_name(method, known, place, noun)
    return grammar


def per_source(name: str, default: float | None) -> Setting:
    """A number with a separate value for each source."""
    return Setting(name, name, default, per_source=True)


def for_all(name: str, default: float | None, absent: float | None = None) -> Setting:
    """A number for all sources; omitted from a blend it means ``absent``, by default mergekit's default."""
    return Setting(name, name, default, absent=default if absent is None else absent)


WEIGHT = per_source("weight", None)
DENSITY = per_source("density", 1.0)
LAMBDA = for_all("lambda", 1.0)


def task_vectors(
    sum: Literal["plain", "elected"], *more: Setting, normalize: bool = False, rescale: bool | None = None
) -> Grammar:
    """The family that mergekit calls generalised task arithmetic. If ``rescale`` is None, nothing is rescaled."""
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
