"""What mergekit lets one say of each merge method, and what it is called in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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


def _per_source(name: str, default: float | None) -> Setting:
    return Setting(name, name, default, per_source=True)


def _for_all(name: str, default: float | None, absent: float | None = None) -> Setting:
    return Setting(name, name, default, absent=default if absent is None else absent)


_WEIGHT = _per_source("weight", None)
_DENSITY = _per_source("density", 1.0)
_GAMMA = _per_source("gamma", 0.01)
_EPSILON = _per_source("epsilon", 0.15)
_LAMBDA = _for_all("lambda", 1.0)
_RAM_EPSILON = _for_all("epsilon", 1e-5)


def _task_vectors(
    sum: Literal["plain", "elected"], *more: Setting, normalize: bool = False, rescale: bool | None = None
) -> Grammar:
    """The family that mergekit calls generalised task arithmetic. Nothing is rescaled where ``rescale`` is None."""
    settings = [
        _WEIGHT,
        *more,
        Setting("normalize", "normalize", normalize, absent=False),
        _LAMBDA,
    ]
    idle = ["int8_mask"]  # it chooses how signs are stored
    if rescale is None:
        idle += ["density", "rescale"]
    else:
        settings.append(Setting("rescale", "rescale", rescale, absent=rescale))
    return Grammar("apart", tuple(settings), copies_base=True, sum=sum, idle=tuple(idle))


GRAMMARS: Mapping[str, Grammar] = {
    "linear": Grammar("source", (_WEIGHT, Setting("normalize", "normalize", True, absent=True))),
    "slerp": Grammar("first", (_for_all("t", None, 0.5),), least=2, most=2),
    "nuslerp": Grammar(
        "optional",
        (
            _WEIGHT,
            Setting("nuslerp_flatten", "flatten", True, absent=True),
            Setting("nuslerp_row_wise", "row_wise", False, absent=False),
        ),
        least=2,
        most=2,
    ),
    "multislerp": Grammar(
        "optional", (_WEIGHT, Setting("normalize_weights", "normalize", True, absent=True)), fixed={"eps": 1e-8}
    ),
    "karcher": Grammar("source", fixed={"max_iter": 10, "tol": 1e-5}, unsaid=(_per_source("weight", 1.0),)),
    "task_arithmetic": _task_vectors("plain"),
    "ties": _task_vectors("elected", _DENSITY, normalize=True, rescale=False),
    "dare_linear": _task_vectors("plain", _DENSITY, rescale=True),
    "dare_ties": _task_vectors("elected", _DENSITY, rescale=True),
    "della": _task_vectors("elected", _DENSITY, _EPSILON, normalize=True, rescale=True),
    "della_linear": _task_vectors("plain", _DENSITY, _EPSILON, rescale=True),
    "breadcrumbs": _task_vectors("plain", _DENSITY, _GAMMA, rescale=False),
    "breadcrumbs_ties": _task_vectors("elected", _DENSITY, _GAMMA, rescale=False),
    "model_stock": Grammar(
        "apart", (Setting("filter_wise", "filter_wise", False, absent=False),), least=2, unsaid=(_LAMBDA,)
    ),
    "sce": Grammar("apart", (_for_all("select_topk", 1.0),), copies_base=True, idle=("int8_mask",)),
    "arcee_fusion": Grammar("apart", most=1, unsaid=(_for_all("fence", 1.5),)),
    "nearswap": Grammar("apart", (_for_all("t", None, 0.001),), most=1),
    "ram": Grammar("apart", (_RAM_EPSILON,), copies_base=True, unsaid=(_LAMBDA,)),
    "ramplus_tl": Grammar(
        "apart",
        (_for_all("r", 0.1), _for_all("alpha", 0.2), _RAM_EPSILON),
        copies_base=True,
        unsaid=(_LAMBDA,),
    ),
    "passthrough": Grammar("source", (_per_source("scale", 1.0),), most=1),
}
