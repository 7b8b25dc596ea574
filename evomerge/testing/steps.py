"""The contract of a step after a merge method, as tests to inherit.

class TestMine(StepContract):
    step = MINE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.arithmetic import jobs
from evomerge.merging.arithmetic.jobs import TensorJob, in_grain
from evomerge.merging.arithmetic.passes import (
    Combine,
    Pass,
    RowFunction,
    Select,
    SparsePart,
    Sparsify,
    TensorFunction,
    call,
)
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.site import Ref, Site
from evomerge.method import Value
from evomerge.recipes.stack import Blend, BlendStep, Role
from evomerge.step import Step, check_step
from evomerge.testing.methods import SEED, TENSOR, THREADS, MadeUpInputs, any_value, tensors

_NAMES = ("b", "s0", "s1")

MADE: Mapping[str, Pass] = {
    "a sum with the base": Combine({"b": 0.25, "s0": 0.5, "s1": 0.25}),
    "a sum without the base": Combine({"s0": 0.5, "s1": 0.25}),
    "masked task vectors": Sparsify("b", (SparsePart("s0", 0.5, low=1.0), SparsePart("s1", 0.25)), elect=True),
    "a mean of masked task vectors": Sparsify(
        "b", (SparsePart("s0", 0.5, share=1.0), SparsePart("s1", 0.5, share=1.0)), elect=True, divide=True, scale=0.5
    ),
    "ranks within rows": Sparsify("b", (SparsePart("s0", 0.5, key=(3, 5), levels=20_000, rise=20_000),)),
    "a selection": Select("b", {"s0": 1.0, "s1": 1.0}, least=0.5),
    "a function of rows": RowFunction(("s1", "b"), lambda given, first: given[1] + 0.5 * (given[0] - given[1])),
    "a function of the whole": TensorFunction(("b", "s0"), lambda given: given[0] + (given[1] - given[0]).clamp(-1, 1)),
}
"""Possible results of a method for the base b and the sources s0 and s1."""


def plan(step: Step, made: Pass, held: Sequence[Tensor], values: Mapping[str, Value]) -> tuple[Pass, list[Tensor]]:
    """The plan of a step after the plan ``made``, and the tensors that it reads.

    Args:
        held: the base and the two sources.
    """
    named: dict[Ref, Tensor] = {(name, TENSOR): tensor for name, tensor in zip(_NAMES, held, strict=True)}
    site = Site(TENSOR, Role("mlp", 0), tuple(held[0].shape), {name: (name, TENSOR) for name in _NAMES})
    inputs = MadeUpInputs(named) if step.needs else None
    facts = Facts(site, Weights(named.__getitem__, THREADS), Evidence(), SEED, inputs)
    blend = Blend(method="task_arithmetic", sources=_NAMES[1:], base=_NAMES[0])
    planned = step.plan(facts, blend, step.values(values), made)
    return planned, [named[site.refs[name]] for name in planned.inputs]


def run(planned: Pass, read: Sequence[Tensor]) -> Tensor:
    """Compute a tensor as in an export or a search, and check that the inputs are not modified."""
    before = [tensor.clone() for tensor in read]
    out = torch.full(read[0].shape, torch.nan, dtype=torch.float32)
    THREADS.run([TensorJob(planned, read, out)])
    assert all(map(torch.equal, before, read)), "the step wrote to its input"
    return out


def plain(planned: Pass, read: Sequence[Tensor]) -> Tensor:
    """The same by the plain definition, on the whole tensor."""
    shape = read[0].shape
    return planned.run([in_grain(planned.grain, x.view(-1), shape) for x in read], 0, call).reshape(shape)


class StepContract:
    """The properties of every step, whatever the method before it. Override what differs for yours.

    Attributes:
        step: the step under test.
        values: values of its parameters at which it has an effect, overriding the defaults.
        tolerance: relative to the largest element, for results that are equal except for rounding.
    """

    step: ClassVar[Step]
    values: ClassVar[Mapping[str, Value]] = {}
    tolerance: ClassVar[float] = 1e-6

    def merge(self, made: Pass, held: Sequence[Tensor], values: Mapping[str, Value] | None = None) -> Tensor:
        """Run the step after a pass."""
        return run(*plan(self.step, made, held, self.values if values is None else values))

    def near(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results are equal except for rounding."""
        return bool((one - other).abs().max() <= self.tolerance * max(1.0, float(other.abs().max())))

    def test_its_parameters_are_let_through_and_lie_within_their_limits(self) -> None:
        blend = Blend(method="task_arithmetic", sources=_NAMES[1:], base=_NAMES[0])
        given = BlendStep(name=self.step.name, parameters=self.step.values(self.values))
        check_step(given, self.step, blend, "blend")
        for p in self.step.parameters:
            if p.kind != "choice":
                low, high = p.limits or (p.low, p.high)
                assert low <= p.low <= float(p.default) <= p.high <= high

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("kind", MADE)
    def test_gives_float32_of_the_same_shape_as_its_plain_definition(self, kind: str, dtype: torch.dtype) -> None:
        for shape in ((), (7,), (6, 8), (9, 5), (2, 3, 4)):
            planned, read = plan(self.step, MADE[kind], tensors(3, shape, dtype=dtype), self.values)
            merged = run(planned, read)
            assert torch.isfinite(merged).all()
            assert self.near(merged, plain(planned, read))

    @pytest.mark.parametrize("kind", MADE)
    def test_pieces_do_not_show(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        held = tensors(3, (40, 6))
        whole = self.merge(MADE[kind], held)
        monkeypatch.setattr(jobs, "PIECE", 4)
        assert torch.equal(self.merge(MADE[kind], held), whole)

    def test_large_tensors_are_made_as_the_plain_definition_makes_them_whole(self) -> None:
        planned, read = plan(self.step, MADE["masked task vectors"], tensors(3, (800, 700)), self.values)
        assert self.near(run(planned, read), plain(planned, read))

    @pytest.mark.parametrize("kind", MADE)
    def test_is_a_function_of_its_arguments(self, kind: str) -> None:
        held = tensors(3)
        first = self.merge(MADE[kind], held)
        torch.rand(3)  # the global generator must not matter
        assert torch.equal(first, self.merge(MADE[kind], held))

    @pytest.mark.parametrize("kind", MADE)
    def test_changes_nothing_where_it_says_so(self, kind: str) -> None:
        if not self.step.neutral:
            pytest.skip("the step has no such values")
        held = tensors(3)
        by_name = dict(zip(_NAMES, held, strict=True))
        made = run(MADE[kind], [by_name[name] for name in MADE[kind].inputs])
        assert torch.equal(self.merge(MADE[kind], held, {**self.values, **self.step.neutral}), made)

    def test_changes_something_elsewhere(self) -> None:
        """Otherwise these tests would check nothing."""
        held, made = tensors(3), MADE["a sum with the base"]
        assert not torch.equal(self.merge(made, held), run(made, held))

    @pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "a sum without the base"])
    def test_what_is_the_base_stays_the_base(self, kind: str) -> None:
        (base,) = tensors(1)
        assert self.near(self.merge(MADE[kind], [base, base.clone(), base.clone()]), base)

    @pytest.mark.parametrize("kind", MADE)
    def test_multiplies_the_change_by_its_factor(self, kind: str) -> None:
        if self.step.factor is None:
            pytest.skip("the step does more than that")
        held = tensors(3)
        by_name = dict(zip(_NAMES, held, strict=True))
        made = run(MADE[kind], [by_name[name] for name in MADE[kind].inputs])
        factor = self.step.factor(self.step.values(self.values))
        assert self.near(self.merge(MADE[kind], held), held[0] + factor * (made - held[0]))

    def test_finite_in_gives_finite_out(self) -> None:
        """For any values within the limits, and any change."""

        # Applied inside, because hypothesis rejects one given test that several classes inherit.
        @settings(max_examples=settings().max_examples // 2, deadline=None)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            element = st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=16))
            rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
            row = st.lists(element, min_size=columns, max_size=columns)
            held = [torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows))) for _ in _NAMES]
            values = data.draw(st.fixed_dictionaries({p.name: any_value(p) for p in self.step.parameters}))
            assert torch.isfinite(self.merge(MADE[data.draw(st.sampled_from(list(MADE)))], held, values)).all()

        check()
