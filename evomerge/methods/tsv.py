"""TSV-Merge: task vectors composed from their singular vectors, which are made orthogonal between sources.

Gargiulo et al., "Task Singular Vectors: reducing task interference in model merging" (arXiv 2412.00081), section 4:
for each matrix and source i with d_i = U_i S_i V_i^T (1), keep the first k = r / n of r singular vectors for each of n
sources, concatenate them, U = [U_1 ... U_n] and V = [V_1 ... V_n], replace U and V by their nearest orthogonal matrices
(5), and multiply again: b + lambda U S V^T (6). Tensors that are not matrices of a layer are averaged.

Weights w_i multiply S_i. They do not affect U and V, so decompositions are computed once, and a candidate costs one
matrix product. Every k needs its own U and V, so k is not searched directly: the parameter says how often k is halved,
which leaves only a few decompositions to cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Combine, Pass, TensorFunction
from evomerge.merging.plans import added, base_of, number, values
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.evidence import Tensors
    from evomerge.merging.measured.facts import Facts


def tsv(facts: Facts, blend: Blend) -> Pass:
    """b + lambda U S V^T, with w_i S_i in S. Experts stored in one tensor are separate matrices."""
    base, factor, weights = base_of(blend), number(blend, "lambda", 1.0), values(blend, "weight")
    halvings = int(number(blend, "halvings", 0))
    if not facts.site.matrices:
        return added(base, blend.sources, [factor * w / len(weights) for w in weights])
    if len(weights) == 1 and halvings == 0:  # all of its singular vectors, which are already orthogonal
        return added(base, blend.sources, [factor * weights[0]])
    names = (base, *blend.sources)
    of_each = [_vectors(facts, names, halvings, number_of) for number_of in range(facts.site.matrices)]
    if not any(weights):
        return Combine({base: 1.0})
    scales = [x["sizes"] * x["sizes"].new_tensor(weights)[x["owners"]] * factor for x in of_each]

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        merged = tensors[0].reshape(-1, *tensors[0].shape[-2:]).clone()
        for matrix, vectors, sizes in zip(merged, of_each, scales, strict=True):
            left, scaled, right = (x.to(matrix.device) for x in (vectors["left"], sizes, vectors["right"]))
            matrix.addmm_(left * scaled, right)
        return merged.view(tensors[0].shape)

    return TensorFunction((base,), whole)


def _vectors(facts: Facts, names: Sequence[str], halvings: int, matrix: int) -> Tensors:
    """The orthogonal vectors of one of a tensor's matrices, for a base and its sources; see ``_orthogonal``."""

    def compute() -> Tensors:
        if halvings:
            return _fewer(facts, _vectors(facts, names, 0, matrix), halvings)
        return _decomposed(
            facts, names[0], [tensor.view(-1, *tensor.shape[-2:])[matrix] for tensor in facts.tensors(names)]
        )

    return facts.once("task singular vectors 1", names, compute, halvings=float(halvings), matrix=float(matrix))


def _kept(rows: int, columns: int, count: int) -> int:
    """The bytes of ``_orthogonal`` for task vectors of full rank."""
    vectors = count * max(1, min(rows, columns) // count)
    return 4 * vectors * (rows + columns + 2 * vectors + 1) + 8 * vectors


def _decomposed(facts: Facts, base: str, tensors: Sequence[Tensor]) -> Tensors:
    """The vectors of n sources: r / n each, or as many as a source has. Tensors are [rows, columns], the base first."""
    import torch

    from evomerge.merging.arithmetic.spectra import decomposed, rounding

    origin, *sources = tensors
    noise, most = rounding(origin.shape, facts.size_of(base)), max(1, min(origin.shape) // len(sources))

    def of_one(source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return decomposed(source.double() - origin.double(), noise, most=most, name=facts.site.name)

    left, sizes, right = zip(*facts.weights.each(of_one, sources), strict=True)
    owners = torch.cat([torch.full((len(of_source),), number_of) for number_of, of_source in enumerate(sizes)])
    return _orthogonal(facts, (torch.cat(left, dim=1), torch.cat(right, dim=1)), torch.cat(sizes), owners)


def _orthogonal(facts: Facts, sides: Sequence[Tensor], sizes: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """Orthogonalise the singular vectors of all sources, left [rows, k] and right [columns, k], in float64.

    Returns:
        left [rows, k], right [k, columns]: the nearest orthogonal vectors, float32. left_gram, right_gram [k, k]: their
        inner products with the original vectors, from which these can be recovered. sizes [k]: the singular values.
        owners int64 [k]: the source that each belongs to.
    """
    from evomerge.merging.arithmetic.spectra import nearest_orthogonal

    near = facts.weights.each(lambda vectors: nearest_orthogonal(vectors, name=facts.site.name), sides)
    grams = [(new.T @ old).float() for new, old in zip(near, sides, strict=True)]
    left, right = (new.float() for new in near)
    return {
        "left": left.contiguous(), "right": right.T.contiguous(), "left_gram": grams[0], "right_gram": grams[1],
        "sizes": sizes.float(), "owners": owners,
    }  # fmt: skip


def _fewer(facts: Facts, whole: Tensors, halvings: int) -> Tensors:
    """The vectors when only the first of each source are kept, their number halved ``halvings`` times."""
    import torch

    owners = whole["owners"]
    counts = torch.bincount(owners)
    place = torch.cat([torch.arange(count) for count in counts.tolist()] or [owners])
    kept = place < (counts >> halvings).clamp(min=1)[owners]
    left = whole["left"].double() @ whole["left_gram"][:, kept].double()
    right = whole["right"].T.double() @ whole["right_gram"][:, kept].double()
    return _orthogonal(facts, (left, right), whole["sizes"][kept], owners[kept])


TSV = Method(
    "tsv",
    tsv,
    (
        weight(1.0),
        scale(),
        MethodParameter("halvings", "blend", low=0, high=3, default=0, searched=False, kind="int", limits=(0, 20)),
    ),
    needs_base=True,
    kept=_kept,
    title="TSV-Merge",
    reference="arXiv 2412.00081",
)
