"""Exact singular values and right singular vectors of low-rank changes."""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.routed.factors import LowRankFactors


def right_singular(factors: LowRankFactors) -> tuple[Tensor, Tensor]:
    """S and V^T of the change B A: float32 [rank] in descending order, and [rank, inputs].

    With the QR decompositions A^T = Q_A R_A and B = Q_B R_B it is B A = Q_B (R_B R_A^T) Q_A^T, and the SVD of the small
    matrix in the middle gives that of the whole. The sign of each row of V^T makes its largest number positive.

    Call this with torch limited to one thread (``WorkerThreads``): several take thirty times as long for thin matrices.
    """
    inner, upper = torch.linalg.qr(factors.down.double().T)
    lower = torch.linalg.qr(factors.up.double(), mode="r").R
    _, values, right = torch.linalg.svd(lower @ upper.T, full_matrices=False)
    rows = right @ inner.T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values.float(), (rows * torch.where(largest < 0, -1.0, 1.0)).float()
