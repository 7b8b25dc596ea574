"""Writing a model to a folder or to object storage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from evomerge.commands.waiting import progress_bar
from evomerge.merging.building.delivery import check_free, upload
from evomerge.objects import Storage, is_url


@contextmanager
def local_folder(out: str | Path, console: Console) -> Iterator[Path]:
    """The local folder to write for ``out``: the folder itself, or a temporary one that is uploaded at the end.

    Raises:
        InputError: the URL cannot be written to.
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
