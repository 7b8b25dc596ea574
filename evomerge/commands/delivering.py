"""Writing a model to a folder or to object storage, and uploading a folder."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from evomerge.commands.waiting import progress_bar
from evomerge.errors import InputError
from evomerge.merging.building.delivery import check_free, check_model, upload
from evomerge.objects import Storage, StorageError, is_url
from evomerge.report.consoles import make_console


@contextmanager
def local_folder(out: str | Path, console: Console) -> Iterator[Path]:
    """The local folder to write for ``out``: the folder itself, or a temporary one that is uploaded at the end.

    Raises:
        InputError: the URL cannot be written to. If the model is made by then, its folder is kept, and the message says
            how to continue.
    """
    if not is_url(str(out)):
        yield Path(out)
        return
    storage = Storage(str(out), "OUT")
    check_free(storage)
    above = Path(tempfile.mkdtemp(prefix="evomerge-"))
    console.print(f"made in {above} first (TMPDIR names another disk), then uploaded", style="dim", soft_wrap=True)
    folder = above / storage.name
    try:
        yield folder
    except BaseException:
        shutil.rmtree(above, ignore_errors=True)
        raise
    _upload(folder, storage, console)
    shutil.rmtree(above, ignore_errors=True)


def upload_folder(folder: Path, url: str) -> None:
    """Copy a model folder to object storage, or continue an interrupted upload of it.

    Raises:
        InputError: it is not the folder of a model, or the URL cannot be written to.
    """
    check_model(folder)
    storage, console = Storage(url, "URL"), make_console()
    check_free(storage)
    _upload(folder, storage, console)
    console.print(f"uploaded to {storage.url}", style="bold")


def _upload(folder: Path, storage: Storage, console: Console) -> None:
    again = shlex.join(["evomerge", "upload", str(folder), storage.url])
    hint = f"Nothing is lost: all of it is in {folder}. To upload the rest: {again}"
    try:
        with progress_bar(console, "uploading") as update:
            upload(folder, storage, update)
    except StorageError as error:
        raise InputError(storage.url, f"the model there is not complete: it {error.problem}", hint) from None
    except OSError as error:
        problem = f"the model there is not complete: {error.filename or folder} cannot be read ({error.strerror})"
        raise InputError(storage.url, problem, hint) from None
    except KeyboardInterrupt:
        print(f"interrupted: the model at {storage.url} is not complete. {hint}", file=sys.stderr)
        raise
