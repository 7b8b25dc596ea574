"""The commands that make a model folder without a search: merge, consolidate.

Neither scores anything, so what they have in common imports no transformers: that takes longer than most merges.
"""

from __future__ import annotations

import tempfile
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
from evomerge.merging.delivery import check_free, upload
from evomerge.merging.export import write_model
from evomerge.objects import Storage, is_url
from evomerge.recipe import Role
from evomerge.report.card import papers
from evomerge.report.screen import make_console
from evomerge.vocabulary import Vocabulary


def merge(path: Path, out: str | Path) -> None:
    """Make one merged model from a recipe file, as a folder or, by its URL, in object storage."""
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
    console = make_console()
    with local_folder(out, console) as folder, progress_bar(console) as update:
        texts = papers(folder.name, recipe, sources, None)
        write_model(recipe, sources, folder, texts=texts, progress=update)
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
def local_folder(out: str | Path, console: Console) -> Iterator[Path]:
    """The folder to make where a model is to be at ``out``: that one, or a temporary one that is uploaded in the end.

    Raises:
        InputError: nothing can be put at this URL.
    """
    if not is_url(str(out)):
        yield Path(out)
        return
    storage = Storage(str(out), "OUT")
    check_free(storage)
    with tempfile.TemporaryDirectory(prefix="evomerge-") as above:
        console.print(f"made in {above} first (TMPDIR names another disk), then uploaded", style="dim", soft_wrap=True)
        folder = Path(above) / storage.name
        yield folder
        with progress_bar(console, "uploading") as update:
            upload(folder, storage, update)


@contextmanager
def progress_bar(console: Console, what: str = "writing tensors") -> Iterator[Callable[[int, int], None]]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield update
