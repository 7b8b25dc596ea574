"""Writing one merged model as a plain Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from evomerge import __version__
from evomerge.checkpoints.checks import check_written
from evomerge.checkpoints.folder import companion_files, tokenizer_files
from evomerge.checkpoints.headers import STORED_DTYPES
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.writer import SHARD_BYTES, FolderWriter, Layout
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import check_places, is_plain, merged_config, merged_tensors
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe

_WRITERS = 2
_AHEAD_BYTES = 256_000_000


def write_model(
    recipe: StackRecipe,
    sources: Mapping[str, Source],
    out: Path,
    *,
    texts: Mapping[str, str],
    materialiser: Materialiser | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    shard_bytes: int = SHARD_BYTES,
    follows: str = "",
) -> None:
    """Make the folder ``out``: weights, configuration, tokenizer, generation settings, and ``texts`` by file name.

    Peak memory is that of one tensor of every source and a quarter of a gigabyte. The folder appears once everything is
    written and ``check``, called with the complete folder under its temporary name, has not raised. A killed process
    leaves its complete weight files beside ``out``, and the same call continues from them.

    Args:
        materialiser: of these sources; a new one if None.
        progress: called with the number of written tensors and of all tensors.
        follows: what the bytes depend on apart from the recipe and the files of its sources.

    Raises:
        InputError: ``out`` cannot be written, the disk is too small, or the recipe does not fit the sources.
    """
    materialiser = materialiser or Materialiser(sources)
    model = sources[recipe.tokenizer]
    names = written_names(recipe, sources)
    layout = [(names[name], shape, dtype) for name, shape, dtype in materialiser.layout(recipe)]
    layout += _beside(model, layout)
    if not is_plain(recipe, sources):
        check_places(recipe, sources)
    check_written(merged_config(recipe, sources), {name: tuple(shape) for name, shape, _ in layout}, model.place)
    key = export_key(recipe, sources, layout, shard_bytes) + follows
    tensors = partial(_tensors, recipe, model, names, materialiser)
    with writing(out, layout, tensors, sources=sources, key=key, progress=progress, shard_bytes=shard_bytes) as folder:
        add_companions(folder, model, {"config.json": config_text(recipe, sources), **texts})
        if check is not None:
            check(folder.complete())


def written_names(recipe: StackRecipe, sources: Mapping[str, Source]) -> dict[str, str]:
    """The name of each tensor of a recipe's model in the files."""
    model = sources[recipe.tokenizer]
    return {m.name: model.written_as(m.name, m.role) for m in merged_tensors(recipe, sources)}


def _beside(model: Source, layout: Layout) -> Layout:
    """The layout of the other tensors in the files of the tokenizer's source, which a merge copies."""
    by_name = {name: (shape, dtype) for name, shape, dtype in layout}
    doubled = [(copy, *by_name[model.written[name]]) for copy, name in model.doubled.items()]
    carried = [(name, entry.shape, STORED_DTYPES[entry.dtype]) for name, entry in model.carried.items()]
    return [*doubled, *carried]


def _tensors(
    recipe: StackRecipe, model: Source, names: Mapping[str, str], materialiser: Materialiser, done: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layout and the copied ones, by their names in the files, except those that are done."""
    copies = {name: copy for copy, name in model.doubled.items() if copy not in done}
    without = {name for name, written in names.items() if written in done and name not in copies}
    for name, tensor in materialiser.tensors(recipe, without):
        if names[name] not in done:
            yield names[name], tensor
        if name in copies:
            yield copies[name], tensor
    for name in model.carried:
        if name not in done:
            yield name, model.read_carried(name)


@contextmanager
def writing(
    out: Path,
    layout: Layout,
    tensors: Callable[[set[str]], Iterator[tuple[str, Tensor]]],
    *,
    sources: Mapping[str, Source],
    key: str | None,
    progress: Callable[[int, int], None],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[FolderWriter]:
    """A folder in which all tensors of a layout are written; the caller adds everything else.

    Args:
        tensors: yields those that are not among some names, in the order of the layout.
        key: see ``FolderWriter``.
    """
    folders = [source.folder for source in sources.values()]
    with (
        FolderWriter(out, layout, shard_bytes, sources=folders, key=key) as folder,
        ThreadPoolExecutor(_WRITERS) as pool,
    ):
        done = folder.done
        waiting: deque[tuple[int, Future[None]]] = deque()
        for number, (name, tensor) in enumerate(tensors(done), start=len(done) + 1):
            # Allocating the pages of a new file takes the system longer than a merge, so it is done in parallel, but
            # without holding many tensors in memory.
            while waiting and sum(size for size, _ in waiting) + tensor.nbytes > _AHEAD_BYTES:
                waiting.popleft()[1].result()
            waiting.append((tensor.nbytes, pool.submit(folder.write, name, tensor)))
            progress(number, len(layout))
        for _, written in waiting:
            written.result()
        yield folder


def add_companions(folder: FolderWriter, model: Source, texts: Mapping[str, str]) -> None:
    """Add texts by file name, a source's tokenizer, and the other files of its folder that are copied."""
    ours = {**model.tokenizer_texts, **texts}
    for file in companions(model):
        if (name := file.relative_to(model.folder).as_posix()) not in ours:
            folder.add_file(file, name)
    for name, text in ours.items():
        folder.add_text(name, text)


def export_key(recipe: Recipe, sources: Mapping[str, Source], layout: Layout, shard_bytes: int) -> str:
    """What an export's bytes depend on: the recipe, and the names, sizes and times of its sources' files."""
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for _, s in sorted(sources.items()) for f in s.files]
    content = repr((__version__, recipe.canonical(), files, list(layout), shard_bytes))
    return "k" + hashlib.sha256(content.encode()).hexdigest()[:16]


def companions(model: Source) -> list[Path]:
    """The files of a source's folder that are copied; without tokenizer files if the tokenizer was rebuilt."""
    remade = {*tokenizer_files(model.folder), model.folder / "chat_template.json"} if model.tokenizer_texts else set()
    return [file for file in companion_files(model.folder) if file not in remade]


def config_text(recipe: StackRecipe, sources: Mapping[str, Source]) -> str:
    """The text of the merged model's config.json."""
    return json.dumps(merged_config(recipe, sources), indent=2, ensure_ascii=False) + "\n"
