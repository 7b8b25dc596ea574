"""NuSLERP: SLERP with weights, on task vectors if there is a base, for the whole tensor or vector by vector.

mergekit's nuslerp (Goddard).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import WEIGHT, Grammar, Setting
from evomerge.merging.arithmetic import sphere
from evomerge.merging.arithmetic.passes import Combine, Pass, RowFunction
from evomerge.merging.plans import along, switch, values
from evomerge.method import Method
from evomerge.methods.parameters import one_weight, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.arithmetic.sphere import Vector
    from evomerge.merging.measured.facts import Facts

_COLINEAR = 1 - 1e-12  # |cos| above which vectors count as parallel: float64 has the sine to four digits there


def nuslerp(facts: Facts, blend: Blend) -> Pass:
    """SLERP at t = w_2 / (w_1 + w_2), on task vectors if there is a base.

    ``flatten: false`` treats each row of a matrix as a vector of its own instead of the whole matrix; with ``row_wise:
    true`` as well, each column.
    """
    first, second = values(blend, "weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if not switch(blend, "flatten", True):
        return _of_many(facts, blend, t)
    if blend.base is None:
        return Combine(dict(zip(blend.sources, _of_two(facts.inner(blend.sources), t), strict=True)))
    return along(blend.base, blend.sources, _of_two(facts.deltas(blend.base, blend.sources), t))


def _of_two(inner: Vector, t: float) -> list[float]:
    return sphere.slerp(inner, t, colinear=_COLINEAR).tolist()  # type: ignore[no-any-return]


def _of_many(facts: Facts, blend: Blend, t: float) -> Pass:
    import torch

    base = (blend.base,) if blend.base is not None else ()
    columns = switch(blend, "row_wise", False) and len(facts.site.shape) == 2

    def split(rows: Sequence[Tensor]) -> tuple[Tensor | float, Tensor, Tensor]:
        origin = rows[0] if base else 0.0
        first, second = (x - origin for x in rows[len(base) :])
        return origin, first, second

    def products(rows: Sequence[Tensor]) -> Tensor:
        _, first, second = split(rows)
        return torch.stack([(x * y).sum(0) for x, y in _pairs_of(first, second)]).view(-1)

    known = (
        torch.from_numpy(facts.total("products of columns", [*base, *blend.sources], products)).view(3, -1)
        if columns
        else None
    )

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        origin, first, second = split(tensors)
        inner = known.to(tensors[0].device) if known is not None else None
        if inner is None:
            inner = torch.stack([(x * y).sum(1, keepdim=True) for x, y in _pairs_of(first, second)])
        one, other = _slerp_of_many(inner, t)
        return origin + one * first + other * second

    return RowFunction((*base, *blend.sources), rows)


def _pairs_of(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The factors whose products sum to inner products, in float64: squares of small changes underflow in float32."""
    first, second = first.double(), second.double()
    return [(first, first), (first, second), (second, second)]


def _slerp_of_many(products: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """``sphere.slerp`` for many pairs of vectors at once, from <a, a>, <a, b>, <b, b>; zero counts as perpendicular."""
    aa, ab, bb = products
    cosine = (ab / (aa * bb).sqrt().clamp(min=1e-300)).clamp(-1, 1)
    straight = cosine.abs() >= _COLINEAR
    angle = cosine.where(~straight, 0.0).acos()
    one, other = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    return one.where(~straight, 1 - t).float(), other.where(~straight, t).float()


NUSLERP = Method(
    "nuslerp",
    nuslerp,
    (weight(1.0, high=1.0),),
    min_sources=2,
    max_sources=2,
    switches={"flatten": True, "row_wise": False},
    alone=one_weight(),
    mergekit=Grammar(
        "optional",
        (
            WEIGHT,
            Setting("nuslerp_flatten", "flatten", True, absent=True),
            Setting("nuslerp_row_wise", "row_wise", False, absent=False),
        ),
        least=2,
        most=2,
    ),
    title="NuSLERP",
)
