"""The contract of a merge method, as tests to inherit.

class TestMine(MethodContract):
    method = MINE
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.arithmetic import jobs
from evomerge.merging.arithmetic.changes import differentiable
from evomerge.merging.arithmetic.derivatives import derivatives_of, with_every_source
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads, in_grain
from evomerge.merging.arithmetic.passes import Pass, call
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.measured.inputs import LayerInput
from evomerge.merging.site import Ref, Site
from evomerge.method import Method, MethodParameter, Point, Value, check_blend, default_parameters, plan_of, value_at
from evomerge.recipes.stack import Blend, Role

SEED, TENSOR, ROLE = 7, "model.layers.0.mlp.up_proj.weight", Role("mlp", 0)
THREADS = WorkerThreads(2)


Models = Mapping[str, Mapping[str, Tensor]]
"""All tensors of each model, by name."""


def plan(
    method: Method, base: Tensor | None, sources: Sequence[Tensor], blend: Blend, models: Models | None = None
) -> tuple[Pass, list[Tensor]]:
    """A method's plan for these tensors, which are ``blend.base`` and ``blend.sources``, and the tensors it reads.

    Args:
        models: the other tensors of the models, for facts about whole models; none if None.
    """
    held: dict[Ref, Tensor] = {(name, TENSOR): x for name, x in zip(blend.sources, sources, strict=True)}
    if base is not None and blend.base is not None:
        held[blend.base, TENSOR] = base
    refs = {source: (source, tensor) for source, tensor in held}
    site = Site(TENSOR, ROLE, tuple(sources[0].shape), refs)
    made_up = MadeUpInputs(held)
    own, merged = (made_up if need in method.needs else None for need in ("calibration", "merged_inputs"))
    beside = {(name, tensor): x for name, model in (models or {}).items() for tensor, x in model.items()}
    known = beside | held
    weights = Weights(known.__getitem__, THREADS, lambda source: [tensor for name, tensor in known if name == source])
    fitted = MadeUpCoefficients() if "fit" in method.needs else None
    planned = plan_of(method, Facts(site, weights, Evidence(), SEED, own, merged, fitted), blend)
    return planned, [held[refs[name]] for name in planned.inputs]


class MadeUpInputs:
    """Inputs of layers with weights [out, in], different for every source but deterministic."""

    def __init__(self, held: Mapping[Ref, Tensor]) -> None:
        self._held = held

    def of(self, ref: Ref) -> LayerInput:
        """Random inputs with the width of the tensor."""
        width = self._held[ref].shape[-1]
        generator = torch.Generator().manual_seed(zlib.crc32(ref[0].encode()))
        rows = torch.randn((2 * width, width), generator=generator)
        return LayerInput(rows.T @ rows / len(rows), rows.abs().mean(0), axis=1)

    def channels(self, ref: Ref) -> Tensor:
        """The channel sizes of these inputs."""
        return self.of(ref).size


class MadeUpCoefficients:
    """Coefficients, different for every source but deterministic."""

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        """Multiples of an eighth between 0 and 2."""
        return [zlib.crc32(name.encode()) % 17 / 8 for name in sources]


def merge(
    method: Method,
    base: Tensor | None,
    sources: Sequence[Tensor],
    blend: Blend,
    dtype: torch.dtype = torch.float32,
    models: Models | None = None,
) -> Tensor:
    """One tensor, merged as in an export or a search; ``models`` as for ``plan``."""
    planned, read = plan(method, base, sources, blend, models)
    out = torch.full(sources[0].shape, torch.nan, dtype=dtype)
    THREADS.run([TensorJob(planned, read, out)])
    return out


def tensors(
    count: int, shape: Sequence[int] = (6, 5), seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random tensors whose values are multiples of 1/8 in [-4, 4]: sums of a few are exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-32, 33, tuple(shape), generator=generator) / 8).to(dtype) for _ in range(count)]


def _step(parameter: MethodParameter, fraction: float) -> Value:
    """The value at this fraction of the range of a parameter."""
    if parameter.kind == "choice":
        return parameter.choices[int(fraction * (len(parameter.choices) - 1))]
    value = parameter.low + (parameter.high - parameter.low) * fraction
    return float(round(value)) if parameter.kind == "int" else value


def any_value(parameter: MethodParameter) -> st.SearchStrategy[Value]:
    """Any value within the limits of a parameter, often the ends and the default."""
    if parameter.kind == "choice":
        return st.sampled_from(parameter.choices)
    low, high = parameter.limits or (parameter.low, parameter.high)
    between = st.integers(int(low), int(high)).map(float) if parameter.kind == "int" else st.floats(low, high)
    return st.one_of(st.sampled_from([low, high, parameter.default]), between)


_WHOLE = (
    "large tensors are made in pieces of rows, so what needs more than a row is a TensorFunction, not a RowFunction"
)


def _far(one: Tensor, other: Tensor) -> str:
    return f"elements differ by up to {float((one - other).abs().max()):.3g}"


class MethodContract:
    """The properties of every merge method. Override what differs for yours.

    Attributes:
        method: the method under test.
        symmetric: whether the order of sources is irrelevant, if their numbers are permuted along.
        whole: values by which a single source is returned unchanged. None if a method has no such values.
        tolerance: relative to the largest element, for results that are equal except for rounding. Decompositions need
            a larger one than sums.
    """

    method: ClassVar[Method]
    symmetric: ClassVar[bool] = True
    whole: ClassVar[Mapping[str, float] | None] = {"weight": 1.0, "density": 1.0, "scale": 1.0}
    tolerance: ClassVar[float] = 1e-6

    @property
    def count(self) -> int:
        """How many sources the tests mix."""
        return min(max(3, self.method.min_sources), self.method.max_sources or 3)

    def blend(self, values: Mapping[str, float] | None = None, count: int | None = None) -> Blend:
        """A blend of sources s0, s1, ... with the method's defaults, overridden by ``values``."""
        method = self.method
        names = tuple(f"s{i}" for i in range(self.count if count is None else count))
        parameters = default_parameters(method, names)
        for p in method.parameters:
            if values is not None and p.name in values:
                parameters[p.name] = dict.fromkeys(names, values[p.name]) if p.scope == "source" else values[p.name]
        return Blend(method=method.name, sources=names, base="b" if method.needs_base else None, parameters=parameters)

    def merge(self, base: Tensor, sources: Sequence[Tensor], blend: Blend) -> Tensor:
        """Run the method, and check that it does not modify its inputs."""
        before = [tensor.clone() for tensor in (base, *sources)]
        merged = merge(self.method, base, sources, blend)
        for old, new in zip(before, (base, *sources), strict=True):
            assert torch.equal(old, new), "the method wrote to its input"
        return merged

    def near(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results are equal except for rounding."""
        return bool((one - other).abs().max() <= self.tolerance * max(1.0, float(other.abs().max())))

    def test_defaults_are_a_blend_that_is_let_through(self) -> None:
        check_blend(self.blend(), self.method, "blend")

    def test_defaults_lie_in_the_ranges_and_the_ranges_in_the_limits(self) -> None:
        for p in self.method.parameters:
            if p.kind != "choice":
                assert p.low <= float(p.default) <= p.high
                low, high = p.limits or (p.low, p.high)
                assert low <= p.low <= p.high <= high

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 5), (2, 3, 4)])
    def test_gives_float32_of_the_same_shape(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        base, *sources = tensors(1 + self.count, shape, dtype=dtype)
        merged = self.merge(base, sources, self.blend())
        assert merged.dtype == torch.float32
        assert merged.shape == shape
        assert torch.isfinite(merged).all()

    def test_computes_in_float32_whatever_the_inputs_are_stored_as(self) -> None:
        base, *sources = tensors(1 + self.count, dtype=torch.bfloat16)
        wide = self.merge(base.float(), [x.float() for x in sources], self.blend())
        assert torch.equal(self.merge(base, sources, self.blend()), wide)

    @pytest.mark.parametrize("shape", [(7,), (40, 6), (9, 5)])
    def test_pieces_do_not_show(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        base, *sources = tensors(1 + self.count, shape)
        whole = self.merge(base, sources, self.blend())
        planned, _ = plan(self.method, base, sources, self.blend())
        monkeypatch.setattr(jobs, "PIECE", 4)
        cut = self.merge(base, sources, self.blend())
        # torch's powers, sigmoids and long sums round the last elements of a run differently; compiled code does not.
        same = self.near(cut, whole) if planned.kernel() is None else torch.equal(cut, whole)
        assert same, f"{_far(cut, whole)}: {_WHOLE}"

    def test_large_tensors_are_made_as_the_plain_definition_makes_them_whole(self) -> None:
        """Tensors above ``jobs.PIECE`` are split: a method that needs whole rows or the whole tensor must say so."""
        shape = (800, 701)
        base, *sources = tensors(1 + self.count, shape)
        planned, read = plan(self.method, base, sources, self._graded(self.blend()))
        whole = planned.run([in_grain(planned.grain, x.view(-1), shape) for x in read], 0, call).reshape(shape)
        merged = merge(self.method, base, sources, self._graded(self.blend()))
        assert self.near(merged, whole), f"{_far(merged, whole)}: {_WHOLE}"

    @pytest.mark.parametrize("shape", [(7,), (6, 8), (9, 5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_what_is_compiled_equals_the_plain_definition(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        base, *sources = tensors(1 + self.count, shape, dtype=dtype)
        planned, read = plan(self.method, base, sources, self._graded(self.blend()))
        rows = [in_grain(planned.grain, x.view(-1), shape) for x in read]
        merged = merge(self.method, base, sources, self._graded(self.blend()))
        assert self.near(merged, planned.run(rows, 0, call).reshape(shape))

    def test_sources_of_different_dtypes_are_mixed_as_they_are(self) -> None:
        base, *sources = tensors(1 + self.count)
        mixed = [x.to(d) for x, d in zip(sources, [torch.bfloat16, torch.float16, torch.float32], strict=False)]
        assert torch.equal(self.merge(base, mixed, self.blend()), self.merge(base, sources, self.blend()))

    def test_weights_of_zero_leave_the_base(self) -> None:
        if not self.method.needs_base or "weight" not in {p.name for p in self.method.parameters}:
            pytest.skip("the method has no weights, or no base")
        base, *sources = tensors(1 + self.count)
        merged = self.merge(base, sources, self.blend({"weight": 0.0}))
        assert torch.equal(merged, base), (
            f"{_far(merged, base)}; what is named weight says how much of a change is taken"
        )

    def test_is_a_function_of_its_arguments(self) -> None:
        base, *sources = tensors(1 + self.count)
        first = self.merge(base, sources, self.blend())
        torch.rand(3)  # the global generator must not matter
        again = self.merge(base, sources, self.blend())
        assert torch.equal(first, again), f"{_far(first, again)}: what is random follows from `facts.stream(source)`"

    def test_order_of_sources_does_not_matter(self) -> None:
        if not self.symmetric:
            pytest.skip("the method says that its sources differ in their parts")
        base, *sources = tensors(1 + self.count)
        blend = self._graded(self.blend())
        order = list(reversed(range(self.count)))
        turned = blend.model_copy(update={"sources": tuple(blend.sources[i] for i in order)})
        merged, other = self.merge(base, sources, blend), self.merge(base, [sources[i] for i in order], turned)
        assert self.near(merged, other), f"{_far(merged, other)}; where it should matter: symmetric = False"

    def _graded(self, blend: Blend) -> Blend:
        """Different numbers for different sources: quarters of the range of each parameter, if those are exact."""
        parameters = dict(blend.parameters)
        for p in self.method.parameters:
            if p.scope == "source":
                steps = [_step(p, (i + 1) / 4) for i in range(len(blend.sources))]
                parameters[p.name] = dict(zip(blend.sources, steps, strict=True))
        return blend.model_copy(update={"parameters": parameters})

    def test_one_source_taken_whole_comes_out_as_it_was(self) -> None:
        if self.method.min_sources > 1 or self.whole is None:
            pytest.skip("the method mixes several sources, or takes none whole")
        base, source = tensors(2)
        merged = self.merge(base, [source], self.blend(self.whole, count=1))
        assert torch.equal(merged, source), f"{_far(merged, source)} at {self.whole}; without such values: whole = None"

    def at(self, point: Point) -> Blend:
        """A blend with the values of a point, and the method's defaults for the others."""
        blend = self.blend()
        names = {p.name: p.scope for p in self.method.parameters}
        assert set(point) <= set(names), "the point has values of what is not a parameter"
        values = {
            name: {source: value_at(point, name, source) for source in blend.sources}
            if names[name] == "source"
            else value_at(point, name, None)
            for name in point
        }
        return blend.model_copy(update={"parameters": {**blend.parameters, **values}})

    def test_where_it_says_that_a_source_is_alone_it_is(self) -> None:
        if self.method.alone is None:
            pytest.skip("the method has no such point")
        base, *sources = tensors(1 + self.count)
        names = self.blend().sources
        for name, source in zip(names, sources, strict=True):
            self._is(self.merge(base, sources, self.at(self.method.alone(names, name))), source)
        if self.method.needs_base:
            self._is(self.merge(base, sources, self.at(self.method.alone(names, None))), base)

    def _is(self, merged: Tensor, wanted: Tensor) -> None:
        assert self.near(merged, wanted), f"{_far(merged, wanted)}; rounding alone gives {self.tolerance:g}"

    def test_where_it_says_that_it_is_the_average_it_is(self) -> None:
        if self.method.uniform is None:
            pytest.skip("the method has no such point")
        base, *sources = tensors(1 + self.count)
        merged = self.merge(base, sources, self.at(self.method.uniform(self.blend().sources)))
        self._is(merged, torch.stack(sources).mean(dim=0))

    def test_where_it_says_that_it_is_task_arithmetic_it_is(self) -> None:
        if self.method.arithmetic is None:
            pytest.skip("the method has no such point")
        base, *sources = tensors(1 + self.count)
        merged = self.merge(base, sources, self.at(self.method.arithmetic(self.blend().sources, 0.7)))
        self._is(merged, base + 0.7 * sum(source - base for source in sources))

    def test_derivatives_are_what_differences_say(self) -> None:
        """For a loss that is a random mean of the elements, if the method says that derivatives exist."""
        if self.method.differentiable is None:
            pytest.skip("the method says that it has no derivatives")
        generator = torch.Generator().manual_seed(1)
        base, *sources = torch.randn((1 + self.count, 24, 32), generator=generator)
        gradient, blend = torch.rand(base.shape, generator=generator), self._graded(self.blend())
        centre, read = plan(self.method, base, sources, blend)
        slopes = derivatives_of(differentiable(with_every_source(centre)), read, gradient).numpy()
        known = {p.name: p for p in self.method.parameters}
        assert set(self.method.differentiable) <= set(known)
        for name in self.method.differentiable:
            width = 1e-3 * (known[name].high - known[name].low)
            beside = [self._moved(blend, name, side * width) for side in (-1.0, 1.0)]
            losses = [(gradient.double() * self.merge(base, sources, one)).sum().item() for one in beside]
            passes = [differentiable(with_every_source(plan(self.method, base, sources, one)[0])) for one in beside]
            found = float(slopes @ (passes[1].numbers - passes[0].numbers))
            assert found == pytest.approx(losses[1] - losses[0], rel=0.05, abs=1e-3 * width * gradient.numel())

    @staticmethod
    def _moved(blend: Blend, name: str, by: float) -> Blend:
        """The blend with one parameter changed; for the first source, if there is one per source."""
        value = blend.parameters[name]
        if isinstance(value, dict):
            first = blend.sources[0]
            moved: Any = {**value, first: float(value[first]) + by}
        else:
            moved = float(value) + by
        return blend.model_copy(update={"parameters": {**blend.parameters, name: moved}})

    def test_says_how_much_it_takes_of_every_source(self) -> None:
        blend = self._graded(self.blend())
        shares = self.method.shares(blend) if self.method.shares is not None else dict.fromkeys(blend.sources, 1.0)
        assert list(shares) == list(blend.sources)
        assert all(math.isfinite(share) for share in shares.values())

    def test_sources_equal_to_the_base_give_the_base(self) -> None:
        (base,) = tensors(1)
        merged = self.merge(base, [base.clone() for _ in range(self.count)], self.blend())
        assert self.near(merged, base)

    def test_finite_in_gives_finite_out(self) -> None:
        """For any numbers within the limits, including zeros, and any switches."""

        # Applied inside, because hypothesis rejects one given test that several classes inherit.
        @settings(max_examples=settings().max_examples // 2, deadline=None)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            element = st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=16))
            size = data.draw(st.integers(1, 6), "size")
            row = st.lists(element, min_size=size, max_size=size)
            base, *sources = (torch.tensor(data.draw(row)) for _ in range(1 + self.count))
            assert torch.isfinite(self.merge(base, sources, self._any_blend(data))).all()

        check()

    def _any_blend(self, data: st.DataObject) -> Blend:
        blend = self.blend()
        drawn: dict[str, st.SearchStrategy[object]] = dict.fromkeys(self.method.switches, st.booleans())
        for p in self.method.parameters:
            value = any_value(p)
            of_sources = dict.fromkeys(blend.sources, value)
            drawn[p.name] = st.fixed_dictionaries(of_sources) if p.scope == "source" else value
        return blend.model_copy(update={"parameters": data.draw(st.fixed_dictionaries(drawn), "parameters")})
