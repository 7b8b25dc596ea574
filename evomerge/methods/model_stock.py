"""Model Stock: from the base towards the mean of the sources, by a distance that follows from their angles.

Jang et al., "Model Stock: all we need is just a few fine-tuned models" (arXiv 2403.19522).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import LAMBDA, Grammar, Setting
from evomerge.merging.arithmetic import sphere
from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.plans import added, base_of, number, switch
from evomerge.method import Method
from evomerge.methods.parameters import scale
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts


def model_stock(facts: Facts, blend: Blend) -> Pass:
    """b + lambda t (mean_i x_i - b), with t from the angles between the task vectors; see ``sphere.stock_ratio``.

    lambda is 1 in the paper. ``filter_wise: true`` gives each row of a matrix its own t.
    """
    base, factor, count = base_of(blend), number(blend, "lambda", 1.0), len(blend.sources)
    if not switch(blend, "filter_wise", False):
        ratio = sphere.stock_ratio(facts.deltas(base, blend.sources))
        return added(base, blend.sources, [factor * ratio / count] * count)
    import torch

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        deltas = torch.stack([x - tensors[0] for x in tensors[1:]], dim=1)  # [rows, sources, length]
        inner = (deltas.double() @ deltas.double().transpose(1, 2)).cpu().numpy()
        ratios = [sphere.stock_ratio(products) for products in inner]
        of_rows = torch.tensor(ratios, dtype=torch.float32, device=deltas.device)
        return tensors[0] + factor * of_rows[:, None] * deltas.mean(dim=1)

    return RowFunction((base, *blend.sources), rows)


MODEL_STOCK = Method(
    "model_stock",
    model_stock,
    (scale(searched=True),),
    needs_base=True,
    min_sources=2,
    switches={"filter_wise": False},
    mergekit=Grammar("apart", (Setting("filter_wise", "filter_wise", False, absent=False),), least=2, unsaid=(LAMBDA,)),
    title="Model Stock",
    reference="arXiv 2403.19522",
)
