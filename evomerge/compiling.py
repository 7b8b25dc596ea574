"""Functions compiled by numba, with an on-disk cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from numba import config, njit
from platformdirs import user_cache_path

Function = Callable[..., Any]


def compiler(files: Sequence[Path]) -> Callable[[Function], Function]:
    """A decorator that compiles without the GIL, and caches the machine code in the user's cache if possible.

    numba detects changes to a function's own file, but not to code in other files that the function calls; so the cache
    folder is named after the content of all of these files.

    Args:
        files: the files with the functions and everything they call.
    """
    version = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    kept = str(user_cache_path("evomerge") / "compiled" / version)

    def compiled(function: Function) -> Function:
        folder, config.CACHE_DIR = config.CACHE_DIR, kept
        try:
            made = njit(nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # the folder cannot be created, as in some containers
            made = njit(nogil=True, error_model="numpy")(function)
        finally:
            config.CACHE_DIR = folder
        return cast(Function, made)

    return compiled
