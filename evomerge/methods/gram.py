"""Gram: the change closest to every task vector on the inputs that the task vector itself implies.

Without data, the rows of a task vector d_i [out, in] stand in for its layer's inputs, since gradients are sums of
these. With G_i = d_i^T d_i and c_i = w_i / |d_i|^(2p), the change that disturbs each source least on its own inputs has
the general form

    b + lambda (s + (D - s C) h(C)),    C = sum_i c_i G_i,    D = sum_i c_i d_i G_i,

with a ridge h(l) = 1 / (l + eps), or the filter of gradient descent h(l) = (1 - exp(-l / eps)) / l, over a share of the
largest eigenvalues, and a starting point s, which remains where the task vectors imply nothing. The methods of four
papers are points of this parameter space, or close to one:

* WUDI (arXiv 2503.08099, ``wudi``): p = 1, s = 0, a ridge only to make C invertible.
* ACTMat (arXiv 2604.01329, ``actmat``): p = 0, weights, the pseudo-inverse.
* SWUDI (arXiv 2606.07289, ``swudi``): p = 1, s the sum of task vectors, gradient descent, the largest eigenvalues.
* ACE (arXiv 2603.02945, ``ace``): p = 0 or 1 depending on how uneven norms are, a ridge towards the mean, and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from evomerge.merging.arithmetic.passes import Combine, Pass, TensorFunction
from evomerge.merging.plans import added, base_of, choice, number, values
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.parameters import one_weight, scale
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts
    from evomerge.merging.normal_equations import Filter, Products
    from evomerge.merging.site import Site


def gram(facts: Facts, blend: Blend) -> Pass:
    """The equation in the module docstring. eps is relative to the mean eigenvalue of C, and so scale-independent.

    s is ``start`` times the weighted mean of the task vectors: zero for 0, and for equal weights their sum if ``start``
    is the number of sources. With a large ridge and a ``start`` of 1, the result is close to the mean.
    """
    return solved(
        facts,
        blend,
        values(blend, "weight"),
        norm=number(blend, "norm", 1.0),
        start=number(blend, "start", 1.0),
        eps=10.0 ** number(blend, "log_eps", -2.0),
        flow=choice(blend, "filter", "ridge") == "flow",
        rank=number(blend, "rank", 1.0),
    )


def actmat(facts: Facts, blend: Blend) -> Pass:
    """b + lambda (sum_i w_i d_i G_i) (sum_i w_i G_i)^+, with the pseudo-inverse as the limit of a small ridge.

    Starting at the mean makes no difference, because all task vectors are zero where C is.
    """
    return solved(facts, blend, values(blend, "weight"), norm=0.0, start=1.0, eps=_LIMIT)


_LIMIT = 1e-8
"""Relative to the mean eigenvalue: negligible as a ridge, yet above the float32 rounding errors in directions that a
change does not have, which a pseudo-inverse would amplify."""


def solved(
    facts: Facts,
    blend: Blend,
    weights: Sequence[float],
    *,
    norm: float,
    start: float,
    eps: float,
    flow: bool = False,
    rank: float = 1.0,
) -> Pass:
    """Gram at one point of its parameter space, from cached products; a weighted mean if not a matrix of a layer."""
    base, factor, total, site = base_of(blend), number(blend, "lambda", 1.0), sum(weights), facts.site
    if not total:
        return Combine({base: 1.0})
    used = [i for i, weight in enumerate(weights) if weight]
    if not site.matrices or (len(used) == 1 and start == 1.0):
        return added(base, blend.sources, [factor * weight / total for weight in weights])
    from evomerge.merging.normal_equations import Filter, kept_of

    width = site.shape[-2:][site.input_axis]
    starts, by = [start * weights[i] / total for i in used], Filter(eps, flow, kept_of(rank, width))
    solvers = []
    for matrix in range(site.matrices):
        products = _products(facts, (base, *blend.sources), matrix)
        squares = products["squares"].tolist()
        shares = [w / square**norm if square else 0.0 for w, square in zip(weights, squares, strict=True)]
        mean = sum(c * square for c, square in zip(shares, squares, strict=True)) / width  # mean eigenvalue of C
        shares = [shares[i] / (mean or 1.0) for i in used]
        solvers.append(_solver(_only(products, used), shares, starts, by))
    return changed_by_matrix(site, (base, *(blend.sources[i] for i in used)), solvers, factor)


Solver: TypeAlias = "Callable[[list[Tensor]], Tensor]"
"""(task vectors of a matrix, float32 [out, in]) -> the change to the matrix, same shape and dtype."""


def changed_by_matrix(site: Site, names: tuple[str, ...], solvers: Sequence[Solver], factor: float) -> Pass:
    """The base plus ``factor`` times a change to each of a tensor's matrices, from the task vectors ``names[1:]``."""
    from evomerge.merging.normal_equations import matrix_of

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        merged = tensors[0].clone()
        for number_of, solve in enumerate(solvers):
            origin, *matrices = (matrix_of(tensor, number_of, site.input_axis) for tensor in tensors)
            change = solve([matrix - origin for matrix in matrices])
            matrix_of(merged, number_of, site.input_axis).add_(change, alpha=factor)
        return merged

    return TensorFunction(names, whole)


def _products(facts: Facts, names: tuple[str, ...], matrix: int) -> Products:
    """The products of all task vectors of a matrix, which are the same for every candidate."""
    from evomerge.merging.normal_equations import changes, own_products

    def compute() -> Products:
        return own_products(changes(facts, names, matrix))

    return facts.once("products of task vectors 1", names, compute, matrix=float(matrix))


def _kept(rows: int, columns: int, count: int) -> int:
    """The bytes of ``own_products``: float64 except for the basis and what is expressed in it."""
    width = min(columns, count * rows)
    made = 8 * count + 8 * count * width * (width + 1) // 2
    if rows < columns:
        made += 8 * count * rows * width
    return made if width == columns else made + 4 * width * (columns + count * rows)


def _only(products: Products, used: Sequence[int]) -> Products:
    """The products of only some of the task vectors; a basis of all vectors is also one of these."""
    if len(used) == len(products["squares"]):
        return products
    return {name: kept if name == "basis" else kept[used] for name, kept in products.items()}


def _solver(products: Products, shares: Sequence[float], starts: Sequence[float], by: Filter) -> Solver:
    from evomerge.merging.normal_equations import nearest

    return lambda changes: nearest(changes, products, shares, starts, by)


WEIGHT = MethodParameter("weight", "source", 0.0, 1.5, 1.0, limits=(0.0, 1e6), share=True)
"""C must not have a negative part. Only the ratios of weights matter."""

GRAM = Method(
    "gram",
    gram,
    (
        WEIGHT,
        scale(searched=True),
        MethodParameter("log_eps", "blend", -4.0, 1.0, -2.0, limits=(-12.0, 12.0)),
        MethodParameter("norm", "blend", 0.0, 1.0, 1.0, searched=False, limits=(0.0, 2.0)),
        MethodParameter("start", "blend", 0.0, 1.0, 1.0, searched=False, limits=(0.0, 100.0)),
        MethodParameter("rank", "blend", 0.3, 1.0, 1.0, searched=False, limits=FRACTION),
        MethodParameter("filter", "blend", default="ridge", searched=False, kind="choice", choices=("ridge", "flow")),
    ),
    needs_base=True,
    kept=_kept,
    alone=one_weight({"lambda": 1.0, "start": 1.0}),
    title="Gram",
    reference="arXiv 2606.07289",
)
ACTMAT = Method(
    "actmat",
    actmat,
    (WEIGHT, scale(searched=True)),
    needs_base=True,
    kept=_kept,
    alone=one_weight({"lambda": 1.0}),
    title="ACTMat",
    reference="arXiv 2604.01329",
)
