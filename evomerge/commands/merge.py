"""The commands that write a model folder without a search: merge, consolidate.

Neither scores anything, so neither imports transformers, which takes longer than most merges. Input errors are detected
before torch is imported.
"""

from __future__ import annotations

import os.path
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from evomerge.blends import check_whole
from evomerge.calibration import Calibration, calibration_from, check_all_have_texts
from evomerge.checkpoints.places import split_reference
from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target, refuse_url
from evomerge.commands.waiting import progress_bar
from evomerge.errors import InputError
from evomerge.faults import NAME_PATTERN
from evomerge.files import absolute_reference, is_model_here, read_text, split_expert, with_expert
from evomerge.mergekit import dump_recipe, load_recipe_file
from evomerge.objects import is_url
from evomerge.plugins import unknown_name
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Role, StackRecipe
from evomerge.recipes.staged import Stage, StagedRecipe
from evomerge.recipes.state_dict import StateDictRecipe
from evomerge.vocabulary import Vocabulary
from evomerge.yaml import dump_yaml, load_documents

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Source
    from evomerge.merging.measured.evidence import Evidence
    from evomerge.search.settings.fitting import FitSplit


_TEXTS = "--calibration"


def calibration_of(given: Sequence[str], prompts: int, tokens: int) -> Calibration | None:
    """The calibration texts on the command line, each given as FILE, or as SOURCE=FILE for a single source.

    A file whose name looks like that is written ``./a=b.txt``.

    Raises:
        InputError: there are two files for the same source.
    """
    files: dict[str | None, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        source = name if equals and re.match(NAME_PATTERN, name) else None
        if source in files:
            raise InputError(_TEXTS, f"is given twice for {source or 'all sources'}", "Put the texts into one file.")
        files[source] = Path(text if source is None else file)
    if not files:
        return None
    own = {source: (file, f"{_TEXTS} {source}") for source, file in files.items() if source is not None}
    return calibration_from(files.get(None), prompts, tokens, _TEXTS, own=own)


def merge(
    path: Path,
    out: str | Path,
    texts: Calibration | None = None,
    fit: Path | None = None,
    keep: Path | None = None,
    keys: str | None = None,
) -> None:
    """Merge one model from a recipe file, into a folder or to a URL in object storage.

    Args:
        texts: calibration texts, for recipes that need them.
        fit: a search file, for recipes with numbers that are fitted to the items of its ``fit`` section.
        keep: the folder in which the stages of a file of several merges are kept.
        keys: the rule for tensors that not all sources have, if tables of tensors are merged.
    """
    split = None if fit is None else _fit_split(fit)
    _check_targets(out, keep)
    root = path.resolve().parent
    if _merged_as_tables(path, root, out, keys):
        return
    if keys is not None:
        raise InputError("--keys", "is for tables of tensors, and these are language models", "Leave it out.")
    made, opened = _read(path, root)
    recipe = _fitted(_calibrated(made, texts, path), split, path)
    for number, blend in enumerate(recipe.blends if isinstance(recipe, StackRecipe) else ()):
        check_whole(blend, f"{path}: blends[{number}]", has_texts=texts is not None, has_fit=recipe.fit is not None)
    for name, reference in recipe.sources.items():
        check_reference(reference, f"{path}: sources.{name}", root)
    import torch

    from evomerge.checkpoints.differences import warnings_across
    from evomerge.commands.delivering import local_folder
    from evomerge.merging.building.builders import BuildContext, find_builder
    from evomerge.report.card import papers
    from evomerge.report.consoles import make_console
    from evomerge.report.serving import say
    from evomerge.search.workers.fitting import AnswersFit

    runs = texts is not None or recipe.fit is not None
    sources = _opened(recipe, opened, path, runs=runs)
    if not isinstance(recipe, StagedRecipe):  # each of its stages has its own sources
        sources = _compatible(recipe, sources)
    recipe = recipe.model_copy(
        update={"sources": {name: _from_anywhere(reference, root) for name, reference in recipe.sources.items()}}
    )
    console = make_console()
    for warning in warnings_across(sources, recipe.tokenizer):
        console.print(f"warning: {warning}", style="yellow")
    with (
        local_folder(out, console) as folder,
        _kept(sources, in_folder=runs) as evidence,
        progress_bar(console, "writing tensors") as update,
    ):
        beside = papers(folder.name, recipe, sources, None, stays=not is_url(str(out)))
        dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
        fitted_to = None if split is None else AnswersFit(split)
        context = BuildContext(
            sources, recipe.tokenizer, evidence, calibration=texts, fit=fitted_to, dtype=dtype, keep=keep
        )
        find_builder(recipe.kind)(context).export(recipe, folder, texts=beside, progress=update)
        counted = _counted(recipe, sources, folder)
    if counted:
        console.print(counted)
    console.print(f"merged into {out}", style="bold")
    say(console, out)


def _check_targets(out: str | Path, keep: Path | None) -> None:
    """Raise InputError if the model or the stages cannot be written where they shall be."""
    if not is_url(str(out)):
        check_target(Path(out))
    if keep is not None:
        refuse_url(keep)


def _read(path: Path, root: Path) -> tuple[Recipe, dict[str, Source]]:
    """The recipe in a file, and the sources that were opened to read it, by reference."""
    opened: dict[str, Source] = {}

    def look(reference: str) -> Mapping[str, Role]:
        if reference not in opened:
            check_reference(reference, str(path), root)
            from evomerge.checkpoints.source import open_source

            opened[reference] = open_source(reference, reference, place=str(path), root=root)
        return opened[reference].roles

    with tempfile.TemporaryDirectory(prefix="evomerge-") as above:
        return load_recipe_file(path, look, _Stages(opened, Path(above))), opened


def _is_of_tables(content: Mapping[str, Any], root: Path) -> bool:
    """Whether the models of a configuration are tables of tensors."""
    from evomerge.raw.references import is_table

    models = content.get("models")
    first = models[0].get("model") if isinstance(models, list) and models and isinstance(models[0], dict) else None
    return isinstance(first, str) and is_table(first, root)


def merge_tables(config: Mapping[str, Any], path: Path, root: Path, out: str | Path, keys: str | None) -> None:
    """Merge tables of tensors by a configuration of mergekit-pytorch."""
    from evomerge.commands.delivering import local_folder
    from evomerge.raw.merging import read_table_merge, summary, write_table_merge
    from evomerge.recipes.state_dict import Keys
    from evomerge.report.consoles import make_console

    known = get_args(Keys)
    if keys is not None and keys not in known:
        raise unknown_name(keys, known, "--keys", "rule for tensors that not all have")
    rule = cast(Keys, keys or known[0])
    made = read_table_merge(config, root, rule, str(path))
    console = make_console()
    for line in summary(made):
        console.print(line, soft_wrap=True)
    with local_folder(out, console) as folder, progress_bar(console, "writing tensors") as update:
        write_table_merge(made, folder, rule, texts={"recipe.yaml": dump_yaml(dict(config))}, progress=update)
    console.print(f"merged into {out}", style="bold")


def merge_state_dicts(path: Path, root: Path, out: str | Path, keys: str | None) -> None:
    """Merge tables of tensors by a recipe, such as the one in a search's export."""
    from evomerge.commands.delivering import local_folder
    from evomerge.merging.building.builders import BuildContext
    from evomerge.raw.builder import StateDictBuilder, table_merge
    from evomerge.raw.merging import check_alike
    from evomerge.raw.table import open_table
    from evomerge.report.consoles import make_console
    from evomerge.report.public_names import movable

    if keys is not None:
        raise InputError("--keys", "is said by the recipe", "Leave it out, or set `keys:` there.")
    recipe = load_recipe_file(path, lambda reference: {}, _Stages({}, root))
    assert isinstance(recipe, StateDictRecipe)
    named = {name: absolute_reference(ref, root) for name, ref in recipe.sources.items()}
    recipe = recipe.model_copy(update={"sources": named})
    tables = {name: open_table(name, ref, root, f"{path}: sources.{name}") for name, ref in named.items()}
    builder = StateDictBuilder(BuildContext({name: t.source for name, t in tables.items()}, recipe.tokenizer))
    used = {name: table for name, table in tables.items() if name in recipe.used_sources()}
    check_alike(used, recipe.keys, table_merge(recipe, used).kept, str(path))
    console = make_console()
    texts = {"recipe.yaml": dump_recipe(movable(recipe, stays=not is_url(str(out))))}
    with local_folder(out, console) as folder, progress_bar(console, "writing tensors") as update:
        builder.export(recipe, folder, texts=texts, progress=update)
    console.print(f"merged into {out}", style="bold")


def _refuse_stages_of_tables(documents: Sequence[Any], path: Path, root: Path) -> None:
    """Raise InputError if one of several merges in a file is of tables of tensors."""
    from evomerge.raw.references import is_table

    for number, document in enumerate(documents, 1):
        models = document.get("models") if isinstance(document, dict) else None
        named = [model.get("model") for model in models or () if isinstance(model, dict)]
        if any(isinstance(reference, str) and is_table(reference, root) for reference in named):
            problem = "is one of several merges, and a file for tables of tensors can have only one"
            hint = (
                "Merge it first, with `dtype: float32`, and name what it wrote in the next: `FOLDER/model.safetensors`."
            )
            raise InputError(f"{path}, document {number}", problem, hint)


def _merged_as_tables(path: Path, root: Path, out: str | Path, keys: str | None) -> bool:
    """Merge by a file about tables of tensors; returns False if it is about language models."""
    documents = load_documents(read_text(path, str(path)), str(path)) if path.is_file() else []
    if len(documents) > 1:
        _refuse_stages_of_tables(documents, path, root)
        return False
    content = documents[0] if documents and isinstance(documents[0], dict) else {}
    if content.get("kind") == StateDictRecipe.kind:
        merge_state_dicts(path, root, out, keys)
    elif _is_of_tables(content, root):
        merge_tables(content, path, root, out, keys)
    else:
        return False
    return True


def _compatible(recipe: Recipe, sources: dict[str, Source]) -> dict[str, Source]:
    """The sources, aligned to the recipe's vocabulary. Raises InputError if they cannot be merged."""
    from evomerge.checkpoints.checks import check_compatible, check_keeps_vision

    check_keeps_vision(sources, recipe.tokenizer)
    stack = recipe if isinstance(recipe, StackRecipe) else None
    vocabulary = stack.vocabulary if stack else Vocabulary()
    if vocabulary != Vocabulary():
        from evomerge.checkpoints.vocabulary import align  # imports transformers, for the tokenizers

        sources = align(sources, recipe.tokenizer, vocabulary)
    check_compatible(sources, stack, same_tokens=vocabulary.kind == "same", same_special=False)
    return sources


class _Stages:
    """Opens stages as they are read, to get the names of their tensors.

    Args:
        opened: the sources by reference, and the stages by name.
        above: the folder in which folders without weights are created.
    """

    def __init__(self, opened: Mapping[str, Source], above: Path) -> None:
        self._opened = opened
        self._stages: dict[str, Source] = {}
        self._above = above

    def __call__(self, stage: Stage, references: Mapping[str, str]) -> Mapping[str, Role]:
        from evomerge.merging.building.staged_source import opened_stage

        sources = {name: self._stages.get(ref) or self._opened[ref] for name, ref in references.items()}
        self._stages[stage.name] = opened_stage(stage, sources, self._above)
        return self._stages[stage.name].roles


def _counted(recipe: Recipe, sources: Mapping[str, Source], folder: Path) -> str:
    """How many tensors were read and written, and how many of them read images; empty for a text-only model."""
    model = sources.get(recipe.tokenizer)
    if model is None or not model.takes_images:
        return ""
    from evomerge.checkpoints.folder import find_tensors

    seeing = sum(role.kind == "vision" for role in model.roles.values())
    counts = [
        f"{len(s.tensors) + len(s.carried) + len(s.doubled):,} of {name}"
        for name, s in sources.items()
        if name in recipe.used_sources() | {recipe.tokenizer}
    ]
    written = len(find_tensors(folder, str(folder)))
    return f"read {' and '.join(counts)}; wrote {written:,} tensors, {seeing:,} of which read images"


def _opened(recipe: Recipe, opened: Mapping[str, Source], path: Path, *, runs: bool) -> dict[str, Source]:
    """The recipe's sources, some of which are already open, by reference.

    Args:
        path: the recipe's file.
        runs: whether sources will be run over texts or answers, long before any tensor is made.

    Raises:
        InputError: a source cannot be opened, or it is broken and would be run.
    """
    from evomerge.checkpoints.checks import check_finite
    from evomerge.checkpoints.source import open_source

    sources = {}
    for name, reference in recipe.sources.items():
        place, root = f"{path}: sources.{name}", path.resolve().parent
        source = opened.get(reference) or open_source(
            name, reference, place=place, root=root, prompts=recipe.takes_prompts
        )
        sources[name] = replace(source, name=name, place=place)
        if runs:
            check_finite(sources[name])
    return sources


def _calibrated(recipe: Recipe, texts: Calibration | None, path: Path) -> Recipe:
    """The recipe with the digest of its calibration texts.

    Raises:
        InputError: the recipe was made with other texts, or they name sources that it does not have.
    """
    if texts is not None:
        check_all_have_texts({name: f"{_TEXTS} {name}" for name in texts.own}, texts.read is not None, recipe.sources)
    digest = None if texts is None else texts.digest
    if recipe.calibration not in (None, digest):
        given = "none are given" if digest is None else f"those given have {digest}"
        problem = f"is made by calibration texts with the digest {recipe.calibration}, and {given}"
        raise InputError(f"{path}: calibration", problem, "Give them, and as much of them: `--calibration FILE`.")
    return recipe.model_copy(update={"calibration": digest})


def _fit_split(path: Path) -> FitSplit:
    """The items of a search file that numbers are fitted to. Raises InputError if it names none."""
    from evomerge.search.settings.search_file import load_search_file  # few merges need it

    if (split := load_search_file(path).fit_split) is None:
        raise InputError(f"--fit {path}", "has no section `fit:`", "Name a search file with a `fit` section.")
    return split


def _fitted(recipe: Recipe, split: FitSplit | None, path: Path) -> Recipe:
    """The recipe with the digest of the items that its numbers are fitted to.

    Raises:
        InputError: the recipe was fitted to other items.
    """
    digest = None if split is None else split.digest
    if recipe.fit not in (None, digest):
        given = "none are given" if digest is None else f"those given have {digest}"
        problem = f"is fitted to items with the digest {recipe.fit}, and {given}"
        raise InputError(
            f"{path}: fit", problem, "Name the file of the search that the recipe comes from: `--fit FILE`."
        )
    return recipe.model_copy(update={"fit": digest})


@contextmanager
def _kept(sources: Mapping[str, Source], *, in_folder: bool) -> Iterator[Evidence]:
    """The evidence about the sources while one model is made: in memory, or in a folder if sources are run."""
    from evomerge.merging.measured.evidence import Evidence

    if not in_folder:  # evidence that is used once is not worth a file
        yield Evidence()
        return
    with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
        yield Evidence(Path(folder), {name: name for name in sources})


def consolidate(checkpoint: Path, out: Path, model: Path) -> None:
    """Write a DeepSpeed ZeRO checkpoint as a model folder."""
    check_target(out)
    from evomerge.checkpoints.zero import consolidate_zero
    from evomerge.report.consoles import make_console

    console = make_console()
    with progress_bar(console, "writing tensors") as update:
        consolidate_zero(checkpoint, out, model, progress=update)
    console.print(f"consolidated into {out}", style="bold")


def _from_anywhere(reference: str, root: Path) -> str:
    """The reference with absolute folders, for the copy of the recipe; a hub id stays as it is."""
    parts = (split_expert(part, root) for part in split_reference(reference, root))
    folders = [(part, Path(os.path.join(root, os.path.expanduser(part))), expert) for part, expert in parts]
    return "+".join(
        with_expert(str(folder) if is_model_here(str(folder)) else part, expert) for part, folder, expert in folders
    )
