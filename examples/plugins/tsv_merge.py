"""TSV-Merge: task vectors by their singular vectors, which are made orthogonal between the sources.

Gargiulo et al., "Task Singular Vectors: reducing task interference in model merging" (arXiv 2412.00081), section 4:
for each matrix and source i with d_i = U_i S_i V_i^T (1), keep the first k = floor(r / n) of r singular vectors for
each of n sources, set them side by side, U = [U_1 ... U_n] and V = [V_1 ... V_n], replace U and V by their nearest
orthogonal matrices (5), and put the product together again: b + lambda U S V^T (6). What is no matrix of a layer is a
mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.facts import Facts
from evomerge.merging.passes import Combine, Pass, Whole
from evomerge.merging.plans import added, base_of, number, values
from evomerge.method import Method
from evomerge.methods.parameters import scale, weight
from evomerge.recipes.stack import Blend


def tsv_merge(facts: Facts, blend: Blend) -> Pass:
    """The weights scale S_i alone, so the decompositions are made once and a candidate costs one product."""
    base, factor, weights = base_of(blend), number(blend, "lambda", 1.0), values(blend, "weight")
    if not facts.site.is_matrix:
        return added(base, blend.sources, [factor * w / len(weights) for w in weights])
    names = (base, *blend.sources)
    vectors = facts.once("task singular vectors", names, lambda: _orthogonal_vectors(facts.tensors(names)))
    left, sizes, right, owners = (vectors[name] for name in ("left", "sizes", "right", "owners"))
    if not len(sizes):
        return Combine({base: 1.0})
    scaled = factor * torch.tensor(weights)[owners] * sizes

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        (origin,) = tensors
        u, s, v = (x.to(origin.device) for x in (left, scaled, right))
        return origin + (u * s) @ v

    return Whole((base,), whole)


def _orthogonal_vectors(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the base and n sources, [rows, columns] each.

    Returns:
        left [rows, k], sizes [k] and right [k, columns]: singular vectors and values of all sources, the vectors made
        orthogonal. owners int64 [k]: to which source each belongs.
    """
    origin, *sources = (tensor.float() for tensor in tensors)
    lefts, sizes, rights, owners = [], [], [], []
    most = max(1, min(origin.shape) // len(sources))
    for number_of, source in enumerate(sources):
        u, s, v = torch.linalg.svd(source - origin, full_matrices=False)
        # Beyond the rank of a change its vectors are noise, which orthogonality would give room to.
        rank = int((s > s[0] * max(origin.shape) * torch.finfo(s.dtype).eps).sum())
        count = min(most, rank)
        lefts.append(u[:, :count])
        sizes.append(s[:count])
        rights.append(v[:count])
        owners.append(torch.full((count,), number_of))
    left, right = _nearest_orthogonal(torch.cat(lefts, dim=1)), _nearest_orthogonal(torch.cat(rights))
    return {"left": left, "sizes": torch.cat(sizes), "right": right, "owners": torch.cat(owners)}


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """P Q^T of M = P D Q^T, the solution of the orthogonal Procrustes problem."""
    p, _, q = torch.linalg.svd(matrix, full_matrices=False)
    return (p @ q).contiguous()


TSV_MERGE = Method(
    "tsv_merge",
    tsv_merge,
    (weight(1.0), scale()),
    needs_base=True,
    title="TSV-Merge",
    reference="arXiv 2412.00081",
)
