"""The builder of tables of tensors: each candidate is written to disk, where a user's function reads it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext, BuilderBase
from evomerge.merging.materialise import Materialiser, check_opened, check_stack
from evomerge.raw.blocks import blocks_of, grouped
from evomerge.raw.merging import TableMerge, fill_folder, labelled, write_table_merge
from evomerge.raw.table import Table, open_table
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.recipes.state_dict import StateDictRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


class StateDictBuilder(BuilderBase):
    """Builds tables of tensors; see ``Builder``. Only the candidate that was written last is on disk."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._tables: dict[str, Table] = {}

    @cached_property
    def _above(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="evomerge-table-")

    @property
    def _candidate(self) -> Path:
        return Path(self._above.name) / "candidate"

    @cached_property
    def _materialiser(self) -> Materialiser:
        return Materialiser(self._context.sources, evidence=self._context.evidence)

    @staticmethod
    def check(recipe: StateDictRecipe, sources: Mapping[str, Source]) -> None:
        """Reject blends that cannot be computed, and sources that are not tables."""
        check_opened(recipe, sources)
        for name in sorted(recipe.used_sources()):
            if not sources[name].is_table:
                problem = f"{name} is a model of transformers, and this merges tables of tensors"
                raise InputError(sources[name].place, problem, "Search over weights: `kind: parameter_space`.")
        for blend in _blends(recipe):
            check_stack(_as_stack(recipe, blend, {}), sources)

    def start(self) -> None:
        """Create the folder for candidates."""
        self._candidate.mkdir(exist_ok=True)

    def write(self, recipe: StateDictRecipe) -> LiveModel:
        """Write the table, replacing the previous one."""
        from evomerge.raw.written import written_table

        shutil.rmtree(self._candidate, ignore_errors=True)
        self._candidate.mkdir()
        fill_folder(self._merge(recipe), self._candidate, recipe.keys, self._materialiser)
        return written_table(self._candidate)

    def export(
        self,
        recipe: StateDictRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """A folder with ``model.safetensors``, or in the format of diffusers, depending on the first source."""
        merge, known = self._merge(recipe), self._materialiser
        write_table_merge(merge, out, recipe.keys, texts=texts, materialiser=known, check=check, progress=progress)

    def reload(self, folder: Path) -> LiveModel:
        from evomerge.raw.written import written_table

        return written_table(folder)

    def _merge(self, recipe: StateDictRecipe) -> TableMerge:
        self.check(recipe, self._context.sources)
        return table_merge(recipe, {name: self._table(name) for name in recipe.used_sources()})

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            source = self._context.sources[name]
            self._tables[name] = open_table(name, source.reference, Path(), source.place)
        return self._tables[name]


def table_merge(recipe: StateDictRecipe, tables: Mapping[str, Table]) -> TableMerge:
    """The merge of opened tables, given by the recipe's names for sources."""
    tables = {name: tables[name] for name in (recipe.tokenizer, *(n for n in recipe.sources if n in tables))}
    names = list(dict.fromkeys(name for table in tables.values() for name in table.source.tensors))
    labels = {name: labelled(name, block) for name, block in blocks_of(names).items()}
    groups = grouped(names, {group.name: group.patterns for group in recipe.groups})
    blends = {group.name: group.blend for group in recipe.groups}
    tensors = {labels[name]: blends[group] for name, group in groups.items()}
    stack = _as_stack(recipe, Blend.copy_of(recipe.tokenizer), tensors)
    dtype: torch.dtype | None = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    return TableMerge(stack, tables, labels, frozenset(names) - groups.keys(), dtype)


def _blends(recipe: StateDictRecipe) -> list[Blend]:
    """The distinct blends."""
    different: list[Blend] = []
    for group in recipe.groups:
        if group.blend not in different:
            different.append(group.blend)
    return different


def _as_stack(recipe: StateDictRecipe, rest: Blend, tensors: Mapping[str, Blend]) -> StackRecipe:
    """The recipe as one for a model without layers, with blends for its tensors by their labelled names."""
    return StackRecipe.compose(
        sources=recipe.sources, tokenizer=recipe.tokenizer, embedding=rest, hops=(), norm=rest, head=rest,
        tensors=tensors, seed=recipe.seed, dtype=recipe.dtype,
    )  # fmt: skip
