"""ResMerge, for experts trained with reinforcement learning: merges task vectors without their first singular vectors.

Sun et al., "ResMerge" (arXiv 2606.02252), and its reference code. With A_i the best rank-1 approximation of d_i (its
head), R_i = d_i - A_i the residual, and q_i = R_i / |R_i|, for n sources and each matrix of a layer:

* the backbone has the direction of q = sum_i q_i and the length c^beta mean_i |R_i|, with c = |q| / n the coherence and
  beta from 1 for opposite residuals to 0.7 for equal ones; if c is at most 1 / sqrt(n), the value for random
  directions, the backbone is the mean of the R_i;
* the head has the direction of sum_i A_i and the length rho a |backbone|, with a the mean of the positive cosines
  between heads.

Tensors that are not matrices of a layer are averaged. The result lies in the span of the d_i and the A_i: the singular
vectors and the inner products are kept as evidence, and a candidate costs one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge.merging.arithmetic.outer import Outer
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import added, base_of, number
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import scale

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.arithmetic.sphere import Vector
    from evomerge.merging.measured.evidence import Tensors
    from evomerge.merging.measured.facts import Facts
    from evomerge.recipes.stack import Blend

_BETA, _FALL, _RHO = 1.0, 0.3, 0.2
_SMALL = 1e-8  # lengths below this count as zero


def resmerge(facts: Facts, blend: Blend) -> Pass:
    """b + lambda (backbone + head). Experts stored in one tensor are separate matrices."""
    import torch

    base, names, factor = base_of(blend), blend.sources, number(blend, "lambda", 1.0)
    if not facts.site.matrices:
        return added(base, names, [factor / len(names)] * len(names))
    heads = facts.once("heads 1", (base, *names), lambda: _heads(facts.tensors((base, *names)), facts.site.name))
    beta, rho = number(blend, "beta", _BETA), number(blend, "rho", _RHO)
    inner = (heads[kind].numpy() for kind in ("changes", "crossed", "heads"))
    mixed = [_mixed(one, two, three, beta, rho) for one, two, three in zip(*inner, strict=True)]
    changes, parts = (torch.tensor(np.array(x) * factor, dtype=torch.float32) for x in zip(*mixed, strict=True))
    left = (heads["left"] * parts[:, None]).flatten(0, 1)
    return Outer(base, names, changes, left.contiguous(), heads["right"])


def _mixed(changes: Vector, crossed: Vector, heads: Vector, beta: float, rho: float) -> tuple[Vector, Vector]:
    """Coefficients of the d_i, and of the A_i, in backbone + head.

    Args:
        changes, crossed, heads: [n, n] inner products of the d_i, of d_i with A_j, and of the A_i.
    """
    inner = changes - crossed - crossed.T + heads  # inner products of the R_i
    backbone = _backbone(inner, beta)
    length = math.sqrt(max(float(backbone @ inner @ backbone), 0.0))
    whole = math.sqrt(max(float(heads.sum()), 0.0))
    above = _pairs(heads)
    agreement = float(np.clip(above, 0, None).mean()) if len(above) else float(heads.any())
    head = rho * agreement * length / whole if whole > _SMALL * len(heads) else 0.0
    return backbone, head - backbone


def _backbone(inner: Vector, beta: float) -> Vector:
    """Coefficients of the R_i in the backbone, from their inner products."""
    count, lengths = len(inner), np.sqrt(np.maximum(np.diag(inner), 0.0))
    inverse = np.divide(1, lengths, where=lengths > _SMALL, out=np.zeros(count))
    size = math.sqrt(max(float(inverse @ inner @ inverse), 0.0))
    coherence = size / count
    if coherence <= 1 / math.sqrt(count):
        return np.full(count, 1 / count)
    above = _pairs(inner)
    cosine = float(above.mean()) if len(above) else 1.0
    score = 0.5 * ((cosine + 1) / 2 + (coherence + 1) / 2)
    return np.asarray(inverse / size * coherence ** max(beta - _FALL * score, 0.0) * lengths.mean())


def _pairs(inner: Vector) -> Vector:
    """The cosines of all pairs of vectors, without zero vectors."""
    lengths = np.sqrt(np.maximum(np.diag(inner), 0.0))
    there = lengths > _SMALL
    cosines = inner[np.ix_(there, there)] / np.outer(lengths[there], lengths[there])
    return np.asarray(cosines[np.triu_indices(int(there.sum()), 1)])


def _heads(tensors: Sequence[Tensor], name: str) -> Tensors:
    """The heads and inner products of n sources, for a base and sources as matrices, or as experts of one tensor each.

    Returns:
        left [matrices, rows, n], right [matrices, n, columns]: float32, the A_i as products of their columns and rows.
        changes, crossed, heads: float64 [matrices, n, n], as for ``_mixed``.
    """
    import torch

    from evomerge.merging.arithmetic.spectra import decomposed

    base, *sources = (tensor.view(-1, *tensor.shape[-2:]) for tensor in tensors)
    found: dict[str, list[Tensor]] = {"left": [], "right": [], "changes": [], "crossed": [], "heads": []}
    for matrix in range(len(base)):
        changes = [source[matrix].double() - base[matrix].double() for source in sources]
        parts = [decomposed(change, most=1, name=name) for change in changes]
        left = torch.cat([(u * s).sum(dim=1, keepdim=True) for u, s, _ in parts], dim=1)  # zero if there is none
        right = torch.cat([v.sum(dim=1, keepdim=True) for _, _, v in parts], dim=1)
        flat = torch.stack([change.flatten() for change in changes])
        found["left"].append(left.float())
        found["right"].append(right.T.float())
        found["changes"].append(flat @ flat.T)
        found["crossed"].append(torch.stack([((change @ right) * left).sum(dim=0) for change in changes]))
        found["heads"].append((left.T @ left) * (right.T @ right))
    return {kind: torch.stack(of_each).contiguous() for kind, of_each in found.items()}


RESMERGE = Method(
    "resmerge",
    resmerge,
    (
        # The smaller beta, the longer the backbone; in the paper beta falls from this value by 0.3 as residuals agree.
        MethodParameter("beta", "blend", low=0.0, high=2.0, default=_BETA, limits=(0.0, 100.0)),
        MethodParameter("rho", "blend", low=0.0, high=1.0, default=_RHO),
        scale(searched=True),
    ),
    needs_base=True,
    min_sources=2,
    title="ResMerge",
    reference="arXiv 2606.02252",
)
