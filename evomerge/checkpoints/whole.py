"""Creates a folder atomically, from files that others write."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from evomerge.checkpoints.target import check_target, existing_parent
from evomerge.errors import InputError
from evomerge.files import sync


@contextmanager
def whole_folder(out: Path, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """The folder under a temporary name next to ``out``, to which it is renamed at the end; removed after an error.

    Args:
        out: the folder to create. It may exist if it is empty.
        sources: folders of models that must not be written into.

    Raises:
        InputError: it cannot be created there, the disk is full, or another process created it in the meantime.
    """
    out = out.absolute()
    check_target(out, sources)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            number = stale.name.rpartition("-")[2]
            if number.isdecimal() and not (psutil.pid_exists(int(number)) and int(number) != os.getpid()):
                shutil.rmtree(stale, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        partial.rename(out)  # also replaces an empty folder
        sync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                str(out), "was created by another process in the meantime", "Choose another folder."
            ) from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(existing_parent(out)).free
        problem = f"the disk is full: {free / 1e6:,.1f} MB are free now"
        hint = "Free some space, or choose a folder on another disk. Nothing was left behind."
        raise InputError(str(out), problem, hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
