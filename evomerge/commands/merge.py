"""The commands that make a model folder without a search: merge, consolidate.

Neither scores anything, so what they have in common imports no transformers: that takes longer than most merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.places import split_reference
from evomerge.checkpoints.source import Source, open_source
from evomerge.mergekit import load_recipe_file
from evomerge.merging.export import write_model
from evomerge.recipe import Role
from evomerge.report.card import papers
from evomerge.report.screen import make_console
from evomerge.vocabulary import Vocabulary


def merge(path: Path, out: Path) -> None:
    """Make one merged model from a recipe file."""
    root = path.resolve().parent
    opened: dict[str, Source] = {}

    def look(reference: str) -> Mapping[str, Role]:
        if reference not in opened:
            opened[reference] = open_source(reference, reference, place=str(path), root=root)
        return opened[reference].roles

    recipe = load_recipe_file(path, look)
    sources: dict[str, Source] = {}
    for name, reference in recipe.sources.items():
        place = f"{path}: sources.{name}"
        source = opened.get(reference) or open_source(name, reference, place=place, root=root)
        sources[name] = replace(source, name=name, place=place)
    if recipe.vocabulary != Vocabulary():
        from evomerge.checkpoints.vocabulary import align  # tokenizers are loaded with transformers

        sources = align(sources, recipe.tokenizer, recipe.vocabulary)
    check_compatible(sources, recipe, same_tokens=recipe.vocabulary.kind == "same", same_special=False)
    recipe = recipe.model_copy(
        update={"sources": {name: _from_anywhere(reference, root) for name, reference in recipe.sources.items()}}
    )
    texts = papers(out.name, recipe, sources, None)
    console = make_console()
    with progress_bar(console) as update:
        write_model(recipe, sources, out, texts=texts, progress=update)
    console.print(f"merged into {out}", style="bold")


def consolidate(checkpoint: Path, out: Path, model: Path) -> None:
    """Put a DeepSpeed ZeRO checkpoint together as a model folder."""
    from evomerge.checkpoints.zero import consolidate_zero

    console = make_console()
    with progress_bar(console) as update:
        consolidate_zero(checkpoint, out, model, progress=update)
    console.print(f"consolidated into {out}", style="bold")


def _from_anywhere(reference: str, root: Path) -> str:
    """The reference with its folders absolute, for the copy of the recipe; a hub id does as it is."""
    folders = [(part, root / Path(part).expanduser()) for part in split_reference(reference, root)]
    return "+".join(str(folder) if folder.is_dir() else part for part, folder in folders)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("writing tensors", total=None)

        def update(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield update
