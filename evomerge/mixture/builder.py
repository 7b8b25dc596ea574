"""The builder of mixtures: one live model in the mixture's own architecture, and plain folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.checkpoints.finite import all_finite
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.writer import Layout
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.export import add_companions, export_key, writing
from evomerge.merging.building.stack_builder import stack_builder
from evomerge.merging.materialise import Materialiser, check_stack
from evomerge.merging.measured.change import Written
from evomerge.merging.path import is_made_in_order
from evomerge.mixture.architectures import ARCHITECTURES
from evomerge.mixture.layout import Cell, Skeleton, cells_of, check_mixture, config_of, dtype_of, has_bias, skeleton_of
from evomerge.mixture.routers import ReferenceMixture, Rows, gate_modules, rows_of
from evomerge.recipes.mixture import MixtureRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


_NOTHING = object()
"""Marks a tensor that has not been written."""


class MixtureBuilder:
    """Builds mixtures of experts; see ``Builder``. All candidates of a search have the same number of slots."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._stack = stack_builder(context)
        self._live: _LiveMixture | None = None
        self._found: dict[str, Rows] = {}

    @staticmethod
    def check(recipe: MixtureRecipe, sources: Mapping[str, Source]) -> None:
        """Reject a mixture that its architecture cannot represent, or with blends that cannot be computed."""
        check_mixture(recipe, sources)
        for slot in (*recipe.slots, *([None] if recipe.shared is not None else [])):
            dense = recipe.dense(slot)
            check_stack(dense, sources)
            if is_made_in_order(dense):
                problem = "has a method that computes layers in order, which a mixture does not support"
                raise InputError("recipe.blends", problem, "Choose a method that needs no merged inputs.")

    def start(self) -> None:
        """Nothing to do: the mixture's form is only known with the first recipe."""

    def calibrate(self, recipe: MixtureRecipe, source: str) -> None:
        """Record the inputs of a source's layers, as far as blends of the recipe need them."""
        self._stack.record([recipe.dense(slot) for slot in recipe.slots], source)

    def fit(self, recipe: MixtureRecipe) -> None:
        """Fit the router rows, if the recipe's are fitted, and cache them."""
        self._check(recipe)
        if recipe.router.kind == "fitted":
            self._rows(recipe)

    def write(self, recipe: MixtureRecipe) -> LiveModel:
        """The live mixture with the recipe's weights, routers and top-k."""
        from evomerge.checkpoints.live import check_live

        self._check(recipe)
        rows = self._rows(recipe)
        mixture = self._mixture(recipe)
        mixture.write(recipe, rows)
        for source in self._context.sources.values():
            source.release_files()
        check_live(mixture.live)
        return mixture.live

    def export(
        self,
        recipe: MixtureRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Export a plain Hugging Face folder, with one tensor per expert and the classic names."""
        self._check(recipe)
        self.export_with(self._rows(recipe), recipe, out, texts=texts, check=check, progress=progress)

    def export_with(
        self,
        rows: Rows,
        recipe: MixtureRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """The same with routers provided by the caller."""
        self.check(recipe, self._context.sources)
        sources, model = self._context.sources, self._context.sources[recipe.tokenizer]
        skeleton = skeleton_of(config_of(recipe, model), model.place)
        cells = {cell.name: cell for cell in cells_of(recipe, skeleton, sources)}
        routers = router_tensors(recipe, rows, skeleton)
        layout: Layout = [
            (name, shape, dtype_of(cells.get(name, Cell(name)), recipe, skeleton, model))
            for name, shape in skeleton.shapes.items()
        ]
        make = partial(self._tensors, cells, routers, layout)
        key = export_key(recipe, sources, layout, 0)
        with writing(out, layout, make, sources=sources, key=key, progress=progress) as folder:
            add_companions(folder, model, {"config.json": json.dumps(skeleton.config, indent=2) + "\n", **texts})
            if check is not None:
                check(folder.complete())

    def reload(self, folder: Path) -> LiveModel:
        """Load the folder with plain transformers."""
        from evomerge.checkpoints.plain import plain_model
        from evomerge.checkpoints.source import open_source

        return plain_model(open_source("export", str(folder), place=str(folder)), self._context.devices, None)

    def _tensors(
        self, cells: Mapping[str, Cell], routers: Mapping[str, Tensor], layout: Layout, without: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype in layout:
            if name in without:
                continue
            if name in routers:
                yield name, routers[name].to(dtype)
                continue
            cell = cells[name]
            if cell.made is None or cell.recipe is None:
                yield name, torch.zeros(shape, dtype=dtype)
                continue
            out = self._stack.materialiser.tensor(cell.made.merged, cell.recipe, shape, dtype)
            if cell.factor != 1.0:
                out.mul_(cell.factor)
            if not all_finite(out):
                raise InputError("recipe", f"gives NaN or Inf in {name}", "Its numbers are too large for the dtype.")
            yield name, out

    def _check(self, recipe: MixtureRecipe) -> None:
        self.check(recipe, self._context.sources)
        for slot in recipe.slots:
            self._stack.materialiser.check(recipe.dense(slot))
        fit = None if self._context.fit is None else self._context.fit.digest
        if recipe.router.kind == "fitted" and recipe.fit != fit:
            has = "there are none here" if fit is None else f"these have {fit}"
            problem = f"has routers fitted to items with the digest {recipe.fit}, and {has}"
            raise InputError("recipe.fit", problem, "Give those that the recipe was made by.")

    def _mixture(self, recipe: MixtureRecipe) -> _LiveMixture:
        """The live mixture, rebuilt if a recipe has a different form than the previous one."""
        if self._context.engine is not None:
            problem = "answers with models of the sources' own architecture, and a mixture is another"
            raise InputError("engine", problem, "Leave it at transformers; what is exported can be served by vLLM.")
        form = (recipe.architecture, recipe.slots, recipe.shared is not None)
        if self._live is None or self._live.form != form:
            self._live = None  # so that memory never holds both
            self._live = _LiveMixture(form, recipe, self._context, self._stack.materialiser)
        return self._live

    def _rows(self, recipe: MixtureRecipe) -> Rows:
        context, said = self._context, recipe.reference_mixture()
        model, used = context.sources[recipe.tokenizer], sorted(recipe.used_sources())
        contents = tuple(context.evidence.content_of(name) for name in (recipe.tokenizer, *used))
        dtype = str(context.dtype or model.dtype)
        key = f"{recipe.fit} {recipe.seed} {said.model_dump_json()}"
        if key not in self._found:
            self._found[key] = rows_of(
                recipe,
                model.config["hidden_size"],
                context.evidence,
                (dtype, *contents),
                context.fit,
                partial(self._reference, said),
            )
        return self._found[key]

    def _reference(self, said: MixtureRecipe) -> ReferenceMixture:
        mixture = self._mixture(said)
        width = self._context.sources[said.tokenizer].config["hidden_size"]
        none = Rows(torch.zeros(said.layers, len(said.slots), width), torch.zeros(said.layers, len(said.slots)))

        def tokens_of(name: str) -> list[Tensor]:
            assert self._stack.inputs is not None  # such a recipe has texts, and they were checked
            return self._stack.inputs.tokens_of(name, mixture.live, said.tokenizer)

        return ReferenceMixture(
            said, mixture.live, mixture.gates, lambda recipe: mixture.write(recipe, none), tokens_of
        )


class _LiveMixture:
    """A model in a mixture's architecture in memory, and the current content of its tensors.

    Args:
        form: what all recipes that are written into it have in common.
    """

    def __init__(
        self, form: Hashable, recipe: MixtureRecipe, context: BuildContext, materialiser: Materialiser
    ) -> None:
        from evomerge.checkpoints.live import LiveModel, unwritten_model
        from evomerge.checkpoints.placement import as_devices
        from evomerge.checkpoints.structure import stored_tensors
        from evomerge.checkpoints.tokenizer_files import load_tokenizer

        source = context.sources[recipe.tokenizer]
        devices = as_devices(context.devices)
        self.form = form
        self._sources, self._materialiser = context.sources, materialiser
        self._skeleton = skeleton_of(config_of(recipe, source), source.place)
        model, _ = unwritten_model(self._skeleton.parsed, source, devices, context.dtype or source.dtype)
        self.live = LiveModel(model, load_tokenizer(source), devices=devices)
        stored = stored_tensors(model)
        self._targets = {name: part.of(stored[part.tensor]) for name, part in self._skeleton.parts.items()}
        self._held: dict[str, Hashable] = {}
        names = ARCHITECTURES[recipe.architecture]
        gates = {layer: self._skeleton.parts[names.gate(layer)].tensor for layer in range(recipe.layers)}
        self.gates = gate_modules(self.live, gates)

    @torch.no_grad()
    def write(self, recipe: MixtureRecipe, rows: Rows) -> None:
        """Write the tensors that differ from the current content."""
        cells = cells_of(recipe, self._skeleton, self._sources)
        changed = [cell for cell in cells if self._held.get(cell.name, _NOTHING) != cell.way]
        for cell in changed:
            self._held.pop(cell.name, None)  # after an error its content is unknown
        self._materialiser.make(
            (cell.made.merged, cell.recipe, self._targets[cell.name])
            for cell in changed
            if cell.made is not None and cell.recipe is not None
        )
        for cell in changed:
            if cell.made is None:
                self._targets[cell.name].zero_()
            elif cell.factor != 1.0:
                self._targets[cell.name].mul_(cell.factor)
            self._held[cell.name] = cell.way
        for name, tensor in router_tensors(recipe, rows, self._skeleton).items():
            self._targets[name].copy_(tensor)
        self._keep(recipe.top_k, recipe.normalised)
        # A shared expert's output is added to that of slots, so neither corresponds to the dense mlp.
        self.live.change = None if recipe.shared else self._materialiser.change_of(self._written(recipe, cells))

    def _written(self, recipe: MixtureRecipe, cells: Sequence[Cell]) -> Iterator[Written]:
        """The content by the dense model's names. All slots of a layer correspond to its mlp."""
        for cell in cells:
            if cell.made is not None and (cell.is_slot or cell.name == cell.made.merged.name):  # not a head twice
                merged, layer = cell.made.merged, cell.made.merged.role.layer
                slots = recipe.group_of(layer).slots if cell.is_slot and layer is not None else ()
                yield Written(merged.name, self._targets[cell.name], cell.way, share=1.0 / max(1, len(slots)))

    def _keep(self, top_k: int, normalised: bool) -> None:
        """Set how many slots each token uses, and how they are weighted, as in the recipe."""
        model: Any = self.live.model
        model.config.num_experts_per_tok, model.config.norm_topk_prob = top_k, normalised
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = top_k
            if hasattr(module, "norm_topk_prob"):
                module.norm_topk_prob = normalised


def router_tensors(recipe: MixtureRecipe, rows: Rows, skeleton: Skeleton) -> dict[str, Tensor]:
    """The float32 tensors of all routers, by their names in the files."""
    names, tensors = ARCHITECTURES[recipe.architecture], {}
    for layer in range(recipe.layers):
        group = recipe.group_of(layer)
        tensors[names.gate(layer)] = rows.weight(layer, group, recipe.slots)
        if has_bias(recipe):
            tensors[names.bias(layer)] = rows.bias(layer, group, recipe.slots)
    assert tensors.keys() <= skeleton.parts.keys()
    return tensors
