"""Methods that stay in the span of the sources: each tensor is one linear combination, found from inner products.

Notation and conventions are those of ``plans``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evomerge.merging import sphere
from evomerge.merging.facts import Facts
from evomerge.merging.passes import Combine, Elementwise, Pass
from evomerge.merging.plans import (
    FRACTION,
    Method,
    added,
    along,
    base_of,
    cancel,
    number,
    switch,
    values,
    weights,
)
from evomerge.method_specs import SPECS
from evomerge.recipe import Blend


def linear(facts: Facts, blend: Blend) -> Pass:
    """sum_i w_i x_i / sum_i w_i.

    Wortsman et al., "Model soups" (arXiv 2203.05482), the uniform soup of section 2, here with weights. Weights that
    sum to zero say nothing of a mean: then all count the same.
    """
    shares = weights(blend, normalize=True)
    if switch(blend, "normalize", True) and cancel(shares):
        shares = [1 / len(shares)] * len(shares)
    return Combine(dict(zip(blend.sources, shares, strict=True)))


def passthrough(facts: Facts, blend: Blend) -> Pass:
    """s x: one source as it is, or scaled, as layers in stacks of layers are."""
    (source,) = blend.sources
    return Combine({source: blend.value("scale", source)})


def slerp(facts: Facts, blend: Blend) -> Pass:
    """sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, a being the angle between both; see ``sphere.slerp``."""
    found = sphere.slerp(facts.inner(blend.sources), number(blend, "t", 0.5), colinear=0.9995)
    return Combine(dict(zip(blend.sources, found.tolist(), strict=True)))


def nuslerp(facts: Facts, blend: Blend) -> Pass:
    """SLERP at t = w_2 / (w_1 + w_2), of the task vectors where there is a base.

    mergekit's nuslerp (Goddard). ``flatten: false`` takes each row of a matrix as a vector of its own instead of the
    whole; with ``row_wise: true`` as well, each column.
    """
    first, second = values(blend, "weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if not switch(blend, "flatten", True):
        return _nuslerp_of_many(facts, blend, t)
    if blend.base is None:
        return Combine(dict(zip(blend.sources, _nuslerp(facts.inner(blend.sources), t), strict=True)))
    found = _nuslerp(facts.deltas(blend.base, blend.sources), t)
    return along(blend.base, blend.sources, found)


_COLINEAR = 1 - 1e-12  # |cos| from which on there is no arc to speak of: float64 has its sine to four digits there


def _nuslerp(inner: np.ndarray, t: float) -> list[float]:
    return sphere.slerp(inner, t, colinear=_COLINEAR).tolist()  # type: ignore[no-any-return]


def _nuslerp_of_many(facts: Facts, blend: Blend, t: float) -> Pass:
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

    return Elementwise((*base, *blend.sources), rows)


def _pairs_of(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What inner products are summed from, in float64: squares of small changes underflow in float32."""
    first, second = first.double(), second.double()
    return [(first, first), (first, second), (second, second)]


def _slerp_of_many(products: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """``sphere.slerp`` for many pairs of vectors at once, from <a, a>, <a, b>, <b, b>; zero is at a right angle."""
    aa, ab, bb = products
    cosine = (ab / (aa * bb).sqrt().clamp(min=1e-300)).clamp(-1, 1)
    straight = cosine.abs() >= _COLINEAR
    angle = torch.acos(cosine.where(~straight, 0.0))
    one, other = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return one.where(~straight, 1 - t).float(), other.where(~straight, t).float()


def multislerp(facts: Facts, blend: Blend) -> Pass:
    """The barycentre of directions, of task vectors where there is a base; see ``sphere.multislerp``."""
    if len(blend.sources) == 1:
        return Combine({blend.sources[0]: 1.0})
    shares = np.array(weights(blend, normalize=True))
    if blend.base is None:
        found = sphere.multislerp(facts.inner(blend.sources), shares)
        return Combine(dict(zip(blend.sources, found.tolist(), strict=True)))
    return along(blend.base, blend.sources, sphere.multislerp(facts.deltas(blend.base, blend.sources), shares).tolist())


def karcher(facts: Facts, blend: Blend) -> Pass:
    """The Karcher mean of the sources' directions, as in arXiv 2603.04972; see ``sphere.karcher``."""
    if len(blend.sources) == 1:
        return Combine({blend.sources[0]: 1.0})
    given = np.array(values(blend, "weight"))
    shares = given / given.sum() if given.sum() else np.full(len(given), 1 / len(given))
    found = sphere.karcher(facts.inner(blend.sources), shares)
    return Combine(dict(zip(blend.sources, found.tolist(), strict=True)))


def task_arithmetic(facts: Facts, blend: Blend) -> Pass:
    """b + lambda sum_i w_i d_i.

    Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2: learning via addition, with a
    weight for each task vector. With ``normalize`` the sum is divided by sum_i w_i.
    """
    factor = number(blend, "lambda", 1.0)
    return added(base_of(blend), blend.sources, [factor * w for w in weights(blend, normalize=False)])


def model_stock(facts: Facts, blend: Blend) -> Pass:
    """b + lambda t (mean_i x_i - b), with t from the angles between the task vectors; see ``sphere.stock_ratio``.

    lambda is 1 in the paper. ``filter_wise: true`` gives each row of a matrix a t of its own.
    """
    base, factor, count = base_of(blend), number(blend, "lambda", 1.0), len(blend.sources)
    if not switch(blend, "filter_wise", False):
        ratio = sphere.stock_ratio(facts.deltas(base, blend.sources))
        return added(base, blend.sources, [factor * ratio / count] * count)

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        deltas = torch.stack([x - tensors[0] for x in tensors[1:]], dim=1)  # [rows, sources, length]
        inner = (deltas.double() @ deltas.double().transpose(1, 2)).cpu().numpy()
        found = [sphere.stock_ratio(each) for each in inner]
        ratios = torch.tensor(found, dtype=torch.float32, device=deltas.device)
        return tensors[0] + factor * ratios[:, None] * deltas.mean(dim=1)

    return Elementwise((base, *blend.sources), rows)


# ---- all of them -----------------------------------------------------------------------------------------------------

METHODS = (
    Method(SPECS["linear"], linear),
    Method(SPECS["passthrough"], passthrough),
    Method(SPECS["slerp"], slerp, limits={"t": FRACTION}),
    Method(SPECS["nuslerp"], nuslerp),
    Method(SPECS["multislerp"], multislerp),
    Method(SPECS["karcher"], karcher),
    Method(SPECS["task_arithmetic"], task_arithmetic),
    Method(SPECS["model_stock"], model_stock),
)
