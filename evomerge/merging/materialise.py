"""From a recipe to tensors: one code path for the live model of a search and for the exported one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.blends import check_whole, planned, stepped
from evomerge.checkpoints.checks import check_vision
from evomerge.checkpoints.finite import all_finite
from evomerge.checkpoints.parts import fold_in
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.device import DeviceRunner, DeviceRunners, Residency
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.core_space import CoreSpace, check_core, steps_in_core
from evomerge.merging.layer_buffers import Held, Made, assign, tensors_made
from evomerge.merging.measured.change import ChangeMeter, Written
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, IdentifiedFit, Weights
from evomerge.merging.measured.inputs import Inputs
from evomerge.merging.measured.merged_inputs import MergedInputs
from evomerge.merging.path import (
    Merged,
    check_order,
    check_places,
    giver,
    is_made_in_order,
    is_plain,
    merged_tensors,
    needs_merged_inputs,
    site_of,
)
from evomerge.merging.site import Ref
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe

if TYPE_CHECKING:  # a live model needs transformers, which takes seconds to import; a merge to a folder does not
    from evomerge.checkpoints.live import LiveModel
    from evomerge.checkpoints.stack import Stack


_Changed = tuple[Made, Held, Tensor, torch.device]
"""A tensor of the live model that must be made: from what, where that is noted, and where it is written."""

_CPU = torch.device("cpu")


def check_opened(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Refuse a recipe with a source that is not open. Raises InputError."""
    if missing := sorted((recipe.used_sources() | {recipe.tokenizer}) - set(sources)):
        opened = ", ".join(sorted(sources))
        raise InputError(f"recipe.sources.{missing[0]}", "is not among the opened sources", f"These are: {opened}.")


def check_stack(recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
    """Refuse a recipe that cannot be made from these sources. Opens no tensor.

    Raises:
        InputError: an unknown method or step, a blend that it cannot compute, a source that is not open, or a layer
            that a source does not have.
    """
    check_opened(recipe, sources)
    for number, blend in enumerate(recipe.blends):
        place = f"recipe.blends[{number}]"
        check_whole(blend, place, has_texts=recipe.calibration is not None, has_fit=recipe.fit is not None)
        if blend.basis == "core":
            check_core(blend, recipe, sources, f"{place}.basis")
    _check_scales(recipe, sources[recipe.tokenizer])
    check_order(recipe, sources)
    check_vision(sources, recipe)
    for number, hop in enumerate(recipe.hops):
        for index in {hop.attention, hop.mlp, hop.norm}:
            blend = recipe.blends[index]
            for name in (*blend.sources, *((blend.base,) if blend.base else ())):
                if hop.layer_of(name) >= sources[name].layers:
                    raise InputError(
                        f"recipe.hops[{number}]",
                        f"takes layer {hop.layer_of(name)} of {name}, which has {sources[name].layers} layers",
                    )
    if not is_plain(recipe, sources) and any(sources[giver(hop, recipe)].reordering_problem for hop in recipe.hops):
        check_places(recipe, sources)  # other layers can be anywhere, which need not be checked for every candidate


def _check_scales(recipe: StackRecipe, model: Source) -> None:
    if not recipe.is_scaled:
        return
    kind = model.config["model_type"]
    if not model.folds:
        problem = f"its hops have scales, and it is not known where the layers of a {kind} write to the residual stream"
        raise InputError("recipe.hops", problem, "Search without them: `scale: none`.")
    if recipe.scaling == "stream" and not model.normed:
        problem = f"scales the stream, but the layers of a {kind} read it without a norm, so that its size matters"
        raise InputError("recipe.scaling", problem, "Scale what layers add: `scaling: update`.")


_PLANNED_BYTES = 1 << 28
"""The size of tensors that are planned ahead: a plan may itself hold tensors of that size."""


def _batches(changed: Iterable[_Changed]) -> Iterator[list[_Changed]]:
    batch: list[_Changed] = []
    planned = 0
    for entry in changed:
        _, _, target, _ = entry
        if batch and planned + target.nbytes > _PLANNED_BYTES:
            yield batch
            batch, planned = [], 0
        batch.append(entry)
        planned += target.nbytes
    if batch:
        yield batch


def _not_finite(name: str) -> InputError:
    return InputError("recipe", f"gives NaN or Inf in {name}", "Its numbers are too large for the dtype.")


def _check_digest(key: str, what: str, wanted: str, digest: str | None) -> None:
    """Refuse a recipe that was made with other texts or items than those given. Raises InputError."""
    if wanted != digest:
        has = "there is none here" if digest is None else f"what is here has {digest}"
        problem = f"is made by {what} with the digest {wanted}, and {has}"
        raise InputError(f"recipe.{key}", problem, "Give the ones that the recipe was made with.")


class Materialiser:
    """Makes the tensors of recipes from opened sources.

    Args:
        sources: by the names that recipes use.
        evidence: of these sources, shared with other processes; None keeps it for this process alone.
        residency: where sources are kept for a model on a GPU; see ``device``.
        inputs: of the sources' layers, for recipes that need calibration texts.
        fitted: the numbers fitted to right answers, for recipes that need them.
        device: of the live models that ``tensors`` must equal bit for bit: another one may round differently.
        base: the source that models' changes are measured from.
        live: returns the live model if ``tensors`` are made in it, as for layers that must be made in order.

    Attributes:
        change: the distance of the last written model from the base; None without a base.
        core_space: merges in core space.
        beside: additions to the last written model apart from its weights, such as hooks on its modules; closed before
            another is written.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        evidence: Evidence | None = None,
        residency: Residency | None = None,
        inputs: Inputs | None = None,
        fitted: IdentifiedFit | None = None,
        device: torch.device = _CPU,
        base: str | None = None,
        live: Callable[[], LiveModel] | None = None,
    ) -> None:
        self._device = device
        self._make_live = live
        self.change: float | None = None
        self.beside = ExitStack()
        self._sources = sources
        self._inputs = inputs
        self._fitted = fitted
        self._threads = WorkerThreads()
        self._residency = residency
        self._runner: DeviceRunners | None = None
        self._views: dict[Ref, Tensor] = {}
        self._folds: dict[Ref, Tensor] = {}
        self._weights = Weights(self.read, self._threads, lambda name: sources[name].tensors)
        self._evidence = evidence or Evidence()
        self.core_space = CoreSpace(sources, self._evidence, self._threads)
        self._held: list[Held] = []  # by layer buffer; the last entry is for tensors outside the stack
        self._live: LiveModel | None = None
        self._meter = None if base is None else ChangeMeter(sources[base], self.read_on, self._weights)

    @property
    def sources(self) -> Mapping[str, Source]:
        """By the names that recipes use."""
        return self._sources

    def read(self, ref: Ref) -> Tensor:
        """A tensor of a source, contiguous. Caches views of mapped files, and as many folds as there are sources."""
        for known in (self._views, self._folds):
            if ref in known:
                return known[ref]
        source, name = ref
        tensor = self._sources[source].read(name).contiguous()
        if self._sources[source].is_mapped(name):
            self._views[ref] = tensor
            return tensor
        # A plan may ask for it several times; caching all would be a float32 copy of each adapted model.
        while len(self._folds) >= len(self._sources):
            self._folds.pop(next(iter(self._folds)))
        self._folds[ref] = tensor
        return tensor

    def write(self, recipe: StackRecipe, live: LiveModel) -> None:
        """Write the merged model in place into ``live``, without new memory, and set up its path of hops.

        Tensors that the same model already holds from an earlier recipe are left as they are, and equal hops share a
        layer's memory.

        Raises:
            InputError: the recipe cannot be made from these sources, has more different layers than the model has room
                for, or scales hops of an architecture whose writes to the residual stream are unknown.
        """
        self.check(recipe)
        self.beside.close()
        stack = self._stack(live)
        outside, hops = tensors_made(recipe, self._sources)
        path = assign(recipe, hops, stack, self._held[:-1])
        changed: list[_Changed] = []
        self._compare(outside, self._held[-1], live.outside, live.device, changed)
        in_order = is_made_in_order(recipe)
        seen = set()
        for number, step in enumerate(() if in_order else path):
            if step.layer_buffer not in seen:
                targets, device = dict(stack.tensors_of(number, step)), stack.devices[step.layer_buffer]
                self._compare(hops[number], self._held[step.layer_buffer], targets, device, changed)
                seen.add(step.layer_buffer)
        self._write_changed(changed, recipe)
        stack.lay(path)
        if in_order:
            self._write_in_order(recipe, live, hops)
        self.change = self.change_of(self._written(recipe, outside, hops, live))
        self._folds.clear()

    def _write_changed(
        self, changed: Sequence[_Changed], recipe: StackRecipe, merged_inputs: MergedInputs | None = None
    ) -> None:
        for some in _batches(changed):
            self._make(
                [
                    (*self.planned(made.merged, recipe, merged_inputs), target, device)
                    for made, _, target, device in some
                ]
            )
        for made, held, _, _ in changed:
            held[made.place] = made.way

    def _write_in_order(self, recipe: StackRecipe, live: LiveModel, hops: Sequence[Sequence[Made]]) -> None:
        """Write the layers of the path one after another, from what earlier layers pass to the sources' layers."""
        stack = self._stack(live)
        targets = [dict(stack.tensors_of(number, step)) for number, step in enumerate(stack.path)]
        devices = [stack.devices[step.layer_buffer] for step in stack.path]

        def copy_layer(source: str, layer: int) -> None:
            copies = Combine({source: 1.0})
            self._make(
                [
                    (copies, [(source, made.merged.stored)], targets[layer][made.merged.name], devices[layer])
                    for made in hops[layer]
                ]
            )

        mixed = dict.fromkeys(name for blend in recipe.blends if needs_merged_inputs(blend) for name in blend.sources)
        assert self._inputs is not None  # such a recipe has calibration texts, which were checked
        inputs = MergedInputs(live, self._sources, recipe.tokenizer, list(mixed), self._inputs, copy_layer)
        for number, step in enumerate(stack.path):
            held, changed = self._held[step.layer_buffer], list[_Changed]()
            self._compare(hops[number], held, targets[number], devices[number], changed)
            if any(needs_merged_inputs(recipe.blend_for(m.merged.role, m.merged.name)) for m, *_ in changed):
                held.clear()  # the layer's tensors are overwritten, also unchanged ones
                inputs.observe(number)
                changed = []
                self._compare(hops[number], held, targets[number], devices[number], changed)
            self._write_changed(changed, recipe, inputs)

    def _written(
        self, recipe: StackRecipe, outside: Sequence[Made], hops: Sequence[Sequence[Made]], live: LiveModel
    ) -> Iterator[Written]:
        """The tensors of the model in ``live``, those of each hop under their names in an export."""
        assert live.stack is not None
        for made in outside:
            yield Written(made.merged.name, live.outside[made.merged.name], made.way)
        for number, (step, hop, factor) in enumerate(zip(live.stack.path, hops, recipe.factors, strict=True)):
            targets = dict(live.stack.tensors_of(number, step))
            folds = self._sources[giver(recipe.hops[number], recipe)].folds if factor != 1.0 else {}
            for made in hop:
                name, fold = made.merged.name, folds.get(made.merged.stored)
                own = 1.0 if fold is None else factor
                yield Written(name, targets[name], made.way, own, fold or "times")

    def change_of(self, model: Iterable[Written]) -> float | None:
        """A model's distance from the base; None without a base."""
        return None if self._meter is None else self._meter.of(model)

    def read_on(self, ref: Ref, device: torch.device) -> Tensor:
        """A tensor of a source on the device where models are written."""
        return self.read(ref) if self._runner is None or device == _CPU else self._runner.tensor(ref, device)

    def check(self, recipe: StackRecipe) -> None:
        """Refuse a recipe that cannot be made from these sources, calibration texts and fit. Raises InputError."""
        check_stack(recipe, self._sources)
        if recipe.calibration is not None:
            digest = None if self._inputs is None else self._inputs.digest
            _check_digest("calibration", "the calibration texts", recipe.calibration, digest)
        self.fitted_for(recipe)

    def fitted_for(self, recipe: Recipe) -> IdentifiedFit | None:
        """The numbers fitted to right answers. Raises InputError: the recipe was made with another fit."""
        if recipe.fit is not None:
            _check_digest("fit", "a fit", recipe.fit, None if self._fitted is None else self._fitted.digest)
        return self._fitted

    def _make(self, planned: Sequence[tuple[Pass, list[Ref], Tensor, torch.device]]) -> None:
        """Make tensors of the live model from their plans and inputs."""
        if self._runner is None:
            # Made one by one as threads reach them: adapters are folded then, and released afterwards.
            self._threads.run(TensorJob(plan, [self.read(ref) for ref in refs], out) for plan, refs, out, _ in planned)
        else:
            for plan, refs, out, device in planned:
                self._runner.run(plan, refs, out, device)

    def _stack(self, live: LiveModel) -> Stack:
        """The layers of the live model; if it is another one than last time, its contents count as unknown."""
        if live.stack is None:
            raise ValueError("this model cannot be written to")
        if live is not self._live:
            self._live = live
            devices = live.stack.devices[: live.stack.depth]
            self._runner = None if {live.device, *devices} == {_CPU} else self._on(live.device, devices)
            self._held = [{} for _ in (None, *live.stack.layer_buffers)]
        return live.stack

    @staticmethod
    def _compare(
        wanted: Sequence[Made],
        held: Held,
        targets: Mapping[str, Tensor],
        device: torch.device,
        changed: list[_Changed],
    ) -> None:
        """List what must be written, and forget what is there: after an error half way its content is unknown."""
        for made in wanted:
            if held.get(made.place) != made.way:
                held.pop(made.place, None)
                changed.append((made, held, targets[made.merged.name], device))

    def tensors(self, recipe: StackRecipe, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The merged model's tensors except those named in ``without``, one at a time, in the order of ``layout``.

        The memory needed is that of one tensor and of the sources' pages that it is made from.

        Raises:
            InputError: the recipe cannot be made of these sources, or a tensor has NaN or Inf.
        """
        self.check(recipe)
        if is_made_in_order(recipe):
            yield from self._tensors_in_order(recipe, without)
            return
        for merged, (name, shape, dtype) in zip(
            merged_tensors(recipe, self._sources), self.layout(recipe), strict=True
        ):
            if name in without:
                continue
            yield name, self.scaled(merged, recipe, shape, dtype)

    def scaled(self, merged: Merged, recipe: StackRecipe, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One tensor of a merged model, as ``tensor``, with the scale of its hop."""
        out = self.tensor(merged, recipe, shape, dtype)
        layer = merged.role.layer
        if layer is not None and (factor := recipe.factors[layer]) != 1.0:
            folds = self._sources[giver(recipe.hops[layer], recipe)].folds
            if merged.stored in folds:
                fold_in(out, factor, folds[merged.stored])
                if not all_finite(out):
                    raise _not_finite(merged.name)
        return out

    def tensor(self, merged: Merged, recipe: StackRecipe, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One tensor of a merged model, without the scale of its hop, on the CPU; its inputs are released.

        Raises:
            InputError: it has NaN or Inf.
        """
        plan, refs = self.planned(merged, recipe)
        read = [self.read(ref) for ref in refs]
        out = self._made(plan, refs, read, shape, dtype)
        self._check_finite(merged.name, out, plan, read)
        for source, stored in {*refs, *self._views}:
            self._sources[source].release(stored)
        self._views.clear()
        self._folds.clear()
        return out

    def make(self, wanted: Iterable[tuple[Merged, StackRecipe, Tensor]]) -> None:
        """Make single tensors of merged models in place, in the caller's memory, on any device.

        They equal the results of ``tensor``, bit for bit.
        """
        planned: list[tuple[Pass, list[Ref], Tensor, torch.device]] = []
        size = 0
        for merged, recipe, target in wanted:
            if planned and size + target.nbytes > _PLANNED_BYTES:
                self._make(planned)
                planned, size = [], 0
            if self._runner is None and target.device != _CPU:
                self._runner = self._on(target.device)
            planned.append((*self.planned(merged, recipe), target, target.device))
            size += target.nbytes
        self._make(planned)
        self._folds.clear()

    def _tensors_in_order(self, recipe: StackRecipe, without: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As ``tensors``, but made in the live model and read from it."""
        if self._make_live is None:
            raise ValueError("layers that are made in order need a live model")
        from evomerge.checkpoints.live import NotFiniteError

        live = self._make_live()
        try:
            self.write(recipe, live)
        except NotFiniteError as error:
            raise InputError("recipe", f"gives {error}", "Its numbers are too large for the dtype.") from None
        written = live.tensors
        for name, _, dtype in self.layout(recipe):
            if name in without:
                continue
            out = written[name].to(_CPU, dtype).contiguous()
            if not all_finite(out):
                raise _not_finite(name)
            yield name, out

    def _made(
        self, plan: Pass, refs: Sequence[Ref], read: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """A tensor made as it would be in a live model, on the CPU."""
        out = torch.empty(shape, dtype=dtype, device=self._device)
        if self._exporter is None:
            self._threads.run([TensorJob(plan, read, out)])
        else:
            self._exporter.run(plan, refs, out)
        return out.to(_CPU)

    @cached_property
    def _exporter(self) -> DeviceRunner | None:
        """Makes tensors one at a time on the device of live models; None if that is the CPU."""
        return None if self._device.type == "cpu" else DeviceRunner(self._device, self.read, [], "mapped")

    def _check_finite(self, name: str, out: Tensor, plan: Pass, read: Sequence[Tensor]) -> None:
        if all_finite(out) and isinstance(plan, Combine):  # other plans may skip broken elements, as a mask does
            return
        for source, tensor in zip(plan.inputs, read, strict=True):
            if not all_finite(tensor):
                place, hint = self._sources[source].place, "The model is broken; download or train it again."
                raise InputError(place, f"has NaN or Inf in what {name} is merged from", hint)
        if not all_finite(out):
            raise _not_finite(name)

    def layout(self, recipe: StackRecipe) -> list[tuple[str, Sequence[int], torch.dtype]]:
        """Name, shape and dtype of each of the merged model's tensors.

        The dtype is the recipe's, or that in which the tokenizer's source stores the tensor. What transformers keeps in
        float32, whatever the dtype of the model, is written in float32, as in a live model.
        """
        layout: list[tuple[str, Sequence[int], torch.dtype]] = []
        model = self._sources[recipe.tokenizer]
        dtype: torch.dtype | None = getattr(torch, recipe.dtype) if recipe.dtype else None
        for merged in merged_tensors(recipe, self._sources):
            source = next(s for s in (model, *self._sources.values()) if merged.stored in s.tensors)
            shape = source.tensors[merged.stored].shape
            layout.append((merged.name, shape, source.dtype_of(merged.stored, dtype, dtype or model.dtype)))
        return layout

    def _on(self, first: torch.device, layers: Sequence[torch.device] = ()) -> DeviceRunners:
        """Makes tensors on devices: those of the layers by number, and the first device for all else."""
        homes = {}
        for name, source in self._sources.items():
            for tensor in source.tensors:
                layer = source.roles[tensor].layer
                homes[name, tensor] = layers[layer % len(layers)] if layers and layer is not None else first
        return DeviceRunners(homes, self.read, self._residency)

    def planned(
        self, merged: Merged, recipe: StackRecipe, merged_inputs: MergedInputs | None = None
    ) -> tuple[Pass, list[Ref]]:
        """How a tensor is made, and the tensors that it is made from."""
        blend, facts = recipe.blend_for(merged.role, merged.name), self.facts(merged, recipe, merged_inputs)
        if blend.basis == "core":
            made = self.core_space.planned(merged, blend, recipe.seed)
            plan = stepped(facts, blend, made, blend.steps[steps_in_core(blend) :])
        else:
            plan = planned(facts, blend)
        return plan, [facts.site.refs[name] for name in plan.inputs]

    def facts(self, merged: Merged, recipe: StackRecipe, merged_inputs: MergedInputs | None = None) -> Facts:
        """The facts available to a tensor's plan."""
        site = site_of(merged, recipe, recipe.blend_for(merged.role, merged.name), self._sources)
        return Facts(site, self._weights, self._evidence, recipe.seed, self._inputs, merged_inputs, self._fitted)
