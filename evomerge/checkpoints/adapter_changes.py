"""The changes that adapters make to a stored tensor. With W [out, in], factors A and B of rank r and a scaling s:

    LoRA     W + s B A                                           arXiv:2106.09685, section 4.1
    DoRA     m (W + s B A) / ||W + s B A||, norms of rows        arXiv:2402.09353, equation 5
    (IA)3    diag(l) W, or W diag(l) in the last map of an mlp   arXiv:2205.05638, section 3.3
    AdaLoRA  W + s B diag(e) A                                   arXiv:2303.10512, equation 3
    VeRA     W + diag(b) B diag(d) A, all layers share A and B   arXiv:2310.11454, equation 2
    PiSSA    W - W_r + s B A, W_r of r singular values           arXiv:2404.02948, section 3
    OLoRA    W - s Q_r R_r + s B A, with W = Q R                 arXiv:2406.01775, section 3
    LoHa     W + s (B1 A1) * (B2 A2), element by element         arXiv:2108.06098, equation 2
    LoKr     W + s kron(W1, W2), each whole or a product         arXiv:2309.14859, section 3.2
    OFT      W R^T, R orthogonal of blocks                       arXiv:2306.07280, section 4
    BOFT     diag(s) W R^T                                       arXiv:2311.06243, section 5

Everything is computed in float32, like PEFT's ``merge_and_unload``. Tensors remain in their memory-mapped files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from evomerge.checkpoints.headers import TensorEntry, map_file, view_entry

View: TypeAlias = Callable[[TensorEntry], torch.Tensor]
"""Returns the tensor of an entry."""


@dataclass(frozen=True)
class LowRank:
    """A change that adds a product of two thin matrices to a weight: LoRA, DoRA, and the similar kinds in this file.

    Attributes:
        down, up: the entries of the factors A (rank by inputs) and B (outputs by rank).
        scale: s above.
        transposed: the weight is stored transposed, as inputs by outputs: embeddings, and GPT-2's Conv1D.
        magnitude: DoRA's m, one number per output.
        router: for one of several experts in a folder: the router [experts, inputs] that was trained with them, and
            the index of this expert's row.
    """

    down: TensorEntry
    up: TensorEntry
    scale: float
    transposed: bool
    magnitude: TensorEntry | None = None
    router: tuple[TensorEntry, int] | None = None

    @property
    def made(self) -> tuple[int, int]:
        """Outputs and inputs of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def misfit(self) -> str:
        """Why its tensors do not fit together; empty if they do."""
        return "" if self.up.shape[1] == self.down.shape[0] else "its factors have other ranks"

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, inputs] and B [outputs, rank]: float32."""
        return view(self.down).float(), view(self.up).float()

    def factors(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """L [rows, rank] and R [rank, columns] for the weight as stored, to which s L R is added: float32."""
        down, up = self.pair(view)
        return (down.T, up.T) if self.transposed else (up, down)

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Apply the change to a weight in place.

        Args:
            weight: float32, with all previous adapters applied.
            stored: the weight without any adapter.
            view: returns the tensor of an entry.
            first: there are no previous adapters.
        """
        left, right = self.factors(view)
        weight.addmm_(left, right, alpha=self.scale)
        if self.magnitude is None:
            return
        # Each DoRA was trained on the base without the other adapters, so the norm is that of the stored weight.
        alone = weight if first else torch.addmm(stored.float(), left, right, alpha=self.scale)
        norm = torch.linalg.vector_norm(alone, dim=0 if self.transposed else 1, keepdim=True)
        weight.mul_(view(self.magnitude).float().reshape(norm.shape) / norm)


@dataclass(frozen=True)
class OfExpert(LowRank):
    """One expert's part of the factors of all experts of a layer (``target_parameters``).

    Attributes:
        expert, experts: its index, and the number of experts.
        rows: which outputs of its matrix the tensor holds, if the model combines several in one; None for all.
    """

    expert: int = 0
    experts: int = 1
    rows: tuple[int, int] | None = None

    @property
    def made(self) -> tuple[int, int]:
        outputs, inputs = super().made
        return (outputs if self.rows is None else self.rows[1] - self.rows[0]), inputs

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = super().pair(view)
        rank = len(down) // self.experts
        # In PEFT's layout, experts are the outer dimension of A and the inner dimension of B.
        mine = up.view(len(up), rank, self.experts)[..., self.expert]
        return down[self.expert * rank : (self.expert + 1) * rank], mine if self.rows is None else mine[
            slice(*self.rows)
        ]


@dataclass(frozen=True)
class OfExperts:
    """The factors of all experts of a layer, for the tensor that holds all of them: [experts, out, in], or transposed.

    Attributes:
        down, up: A and B, as for ``OfExpert``.
    """

    down: TensorEntry
    up: TensorEntry
    scale: float
    transposed: bool

    def words(self, tensor: str) -> str:
        """A description of the change, for messages."""
        return f"changes all experts of {tensor} at once (target_parameters)"

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Apply the change to a tensor in place; arguments as for ``LowRank``."""
        down, up = view(self.down).float(), view(self.up).float()
        downs, ups = down.view(len(weight), -1, down.shape[1]), up.view(len(up), -1, len(weight)).permute(2, 0, 1)
        left, right = (downs.mT, ups.mT) if self.transposed else (ups, downs)
        weight.baddbmm_(left, right, alpha=self.scale)


@dataclass(frozen=True)
class Scaled(LowRank):
    """Factors with additional trained scales for each rank and for each output: AdaLoRA and VeRA.

    Attributes:
        inner: multiplies each row of A.
        outer: multiplies each row of B; None if there is none.
        size: outputs and inputs, if the factors are larger.
    """

    inner: TensorEntry | None = None
    outer: TensorEntry | None = None
    size: tuple[int, int] | None = None

    @property
    def made(self) -> tuple[int, int]:
        return self.size or super().made

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = super().pair(view)
        outputs, inputs = self.made
        down, up = down[:, :inputs], up[:outputs]
        if self.inner is not None:
            down = down * view(self.inner).float().view(-1, 1)
        if self.outer is not None:
            up = up * view(self.outer).float().view(-1, 1)
        return down, up


@dataclass(frozen=True)
class Started(LowRank):
    """A LoRA that was initialised with a part of the weight, which was removed from the base.

    Attributes:
        start: which part: the one of the largest singular values, or of the first columns of Q.
        weight: the weight that it was initialised from.
    """

    start: Literal["pissa", "olora"] = "pissa"
    weight: TensorEntry | None = None

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = super().pair(view)
        assert self.weight is not None
        began = _began(self.weight, self.start, len(down), self.scale, self.transposed)
        return torch.cat([down, began[0]]), torch.cat([up, -began[1]], dim=1)


@functools.lru_cache(4096)
def _began(
    entry: TensorEntry, start: str, rank: int, scale: float, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, inputs] and B [outputs, rank] that a LoRA was initialised with, computed from the weight: float32."""
    weight = view_entry(entry, map_file(entry.file)).float()
    if start == "olora":
        left, right = torch.linalg.qr(weight)
        return right[:rank].clone(), left[:, :rank].clone()
    left, sizes, right = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
    roots = (sizes[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


@dataclass(frozen=True)
class Hadamard(LowRank):
    """A LoHa: an element-wise product of two products, so its rank is up to the product of their ranks.

    Attributes:
        down2, up2: A2 and B2; ``down`` and ``up`` are the first pair.
    """

    down2: TensorEntry | None = None
    up2: TensorEntry | None = None

    @property
    def misfit(self) -> str:
        assert self.down2 is not None
        assert self.up2 is not None
        same = self.down.shape == self.down2.shape and self.up.shape == self.up2.shape
        return super().misfit or ("" if same else "its two products have other shapes")

    def _parts(self, view: View) -> tuple[torch.Tensor, ...]:
        entries = (self.up, self.down, self.up2, self.down2)
        return tuple(view(entry).float() for entry in entries if entry is not None)

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        up, down, up2, down2 = self._parts(view)
        outer_up = (up[:, :, None] * up2[:, None, :]).flatten(1)
        return (down[:, None, :] * down2[None, :, :]).flatten(0, 1), outer_up

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        up, down, up2, down2 = self._parts(view)
        change = (up @ down) * (up2 @ down2) * self.scale
        weight.add_(change.T if self.transposed else change)


@dataclass(frozen=True)
class Kronecker(LowRank):
    """A LoKr: a Kronecker product in which each factor may be a matrix product itself.

    Attributes:
        one, two: W1 and W2, each as one tensor or as the two factors of a product; ``down`` and ``up`` are the last and
            the first of these tensors.
        size: outputs and inputs.
    """

    one: tuple[TensorEntry, ...] = ()
    two: tuple[TensorEntry, ...] = ()

    @property
    def made(self) -> tuple[int, int]:
        return self.one[0].shape[0] * self.two[0].shape[0], self.one[-1].shape[1] * self.two[-1].shape[1]

    @property
    def misfit(self) -> str:
        sides = (side for side in (self.one, self.two) if len(side) == 2)
        return "its factors have other ranks" if any(a.shape[1] != b.shape[0] for a, b in sides) else ""

    def pair(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        (up1, down1), (up2, down2) = (self._halves(side, view) for side in (self.one, self.two))
        return torch.kron(down1, down2), torch.kron(up1, up2)

    def _halves(self, side: tuple[TensorEntry, ...], view: View) -> tuple[torch.Tensor, torch.Tensor]:
        first = view(side[0]).float()
        if len(side) == 2:
            return first, view(side[1]).float()
        whole = torch.eye(min(first.shape))
        return (whole, first) if first.shape[0] < first.shape[1] else (first, whole)

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        sides = [functools.reduce(torch.mm, [view(entry).float() for entry in side]) for side in (self.one, self.two)]
        change = torch.kron(*sides) * self.scale
        weight.add_(change.T if self.transposed else change)


@dataclass(frozen=True)
class Shift:
    """A bias of B (``lora_bias``), which adds s times itself to the layer's own bias."""

    by: TensorEntry
    scale: float

    def words(self, tensor: str) -> str:
        """A description of the change, for messages."""
        return f"moves the bias {tensor} (lora_bias)"

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Apply the change to a bias in place; arguments as for ``LowRank``."""
        weight.add_(self.scale * view(self.by).float())


@dataclass(frozen=True)
class Vector:
    """An (IA)3 vector for one weight: multiplies each of its outputs, or each of its inputs.

    Attributes:
        by: the vector, of any shape.
        inputs: it multiplies the inputs (a module in PEFT's ``feedforward_modules``), else the outputs including bias.
        transposed: the weight is stored as inputs by outputs.
    """

    by: TensorEntry
    inputs: bool
    transposed: bool

    @property
    def of_columns(self) -> bool:
        """Whether it multiplies the columns of the weight as stored; otherwise the rows."""
        return self.inputs != self.transposed

    def vector(self, view: View) -> torch.Tensor:
        """l: float32 [inputs] or [outputs].

        Args:
            view: returns the tensor of an entry.
        """
        return view(self.by).float().flatten()

    def words(self, tensor: str) -> str:
        """A description of the change, for messages."""
        return f"multiplies {tensor} by a vector ((IA)3)"

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Apply the change to a weight, or to the bias of a layer with scaled outputs; arguments as for ``LowRank``."""
        vector = self.vector(view)
        weight.mul_(vector if self.of_columns or weight.dim() == 1 else vector[:, None])


@dataclass(frozen=True)
class Rotation:
    """An OFT or BOFT: rotates the inputs in blocks, and for BOFT scales the outputs.

    Attributes:
        by: for OFT the upper triangles of the blocks' skew-symmetric matrices, [blocks, b (b - 1) / 2]; for BOFT
            matrices [1, blocks, b, b], of which only the skew-symmetric part is used. If shared, a single block.
        outputs: multiplies each output; None if there is none.
        terms: number of terms of the series that approximates the Cayley transform; None for the exact transform.
        bound: maximum norm of a block's skew-symmetric matrix (constrained OFT); None if unconstrained.
    """

    by: TensorEntry
    outputs: TensorEntry | None = None
    terms: int | None = None
    bound: float | None = None

    @property
    def block(self) -> int:
        """b, the number of inputs of a block."""
        if self.outputs is not None:
            return self.by.shape[-1]
        return (1 + math.isqrt(1 + 8 * self.by.shape[1])) // 2

    @property
    def blocks(self) -> int:
        """How many blocks are stored."""
        return self.by.shape[1 if self.outputs is not None else 0]

    def words(self, tensor: str) -> str:
        """A description of the change, for messages."""
        return f"turns the inputs of {tensor} (OFT, BOFT)"

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Apply the change to a weight [out, in] in place; arguments as for ``LowRank``."""
        turns = self._cayley(self._skew(view(self.by).float()))
        columns = weight.view(len(weight), -1, self.block).transpose(0, 1)  # [blocks, out, b]
        weight.copy_((columns @ turns.mT).transpose(0, 1).reshape(weight.shape))
        if self.outputs is not None:
            weight.mul_(view(self.outputs).float().view(-1, 1))

    def _skew(self, numbers: torch.Tensor) -> torch.Tensor:
        """[blocks, b, b]"""
        if self.outputs is not None:
            return 0.5 * (numbers[0] - numbers[0].mT)
        size = self.block
        skew = numbers.new_zeros(len(numbers), size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        skew[:, rows, columns] = numbers
        skew = skew - skew.mT
        if self.bound is not None:
            norms = torch.linalg.matrix_norm(skew, keepdim=True)
            skew = torch.where(norms <= self.bound, skew, self.bound * skew / norms)
        return skew

    def _cayley(self, skew: torch.Tensor) -> torch.Tensor:
        """R of each block, [blocks, b, b]; as in PEFT, the series approximates the transpose of the transform."""
        one = torch.eye(skew.shape[-1])
        turn: torch.Tensor
        if self.terms is None:
            turn = torch.linalg.solve(one + skew, one - skew, left=False)
            return turn
        turn, power = one.repeat(len(skew), 1, 1), one
        last = max(self.terms, 4) - 1 if self.terms > 2 else 0  # PEFT's series of three terms has four
        for _ in range(1, last or self.terms):
            power = power @ skew
            turn = turn + 2.0 * power
        return turn + power @ skew if last else turn


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding or a head that were trained separately (``trainable_token_indices``), replacing its own.

    Attributes:
        by: the rows, [tokens, width].
        tokens: the token ids of the rows.
    """

    by: TensorEntry
    tokens: tuple[int, ...]

    def words(self, tensor: str) -> str:
        """A description of the change, for messages."""
        return f"holds rows of {tensor} in full (trainable_token_indices)"

    def apply(self, weight: torch.Tensor, stored: torch.Tensor, view: View, *, first: bool) -> None:
        """Replace the rows of a weight in place; arguments as for ``LowRank``."""
        weight[list(self.tokens)] = view(self.by).float()


Change: TypeAlias = LowRank | OfExperts | Shift | Vector | Rotation | Rows
