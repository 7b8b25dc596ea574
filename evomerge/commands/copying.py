"""Copying a search's folder to object storage while a command drives it, if its search file says so."""

from __future__ import annotations

import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from rich.console import Console

from evomerge.commands.failing import FAILED
from evomerge.errors import InputError
from evomerge.search.opening.artifacts import Artifacts, copy_url
from evomerge.search.opening.claim import TakenUpError
from evomerge.search.settings.search_file import SearchFile


class Copying(AbstractContextManager["Copying"]):
    """The copying of a command, from ``start`` until the context is left, when what remains is copied.

    The context is left after the lease is released, so that nobody is kept waiting.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self._artifacts: Artifacts | None = None
        self._is_incomplete = False

    def start(self, file: SearchFile) -> Artifacts | None:
        """Claim the place and start copying; None if the search file names no place.

        Raises:
            InputError: the place cannot be claimed.
        """
        if file.artifacts is None:
            return None
        artifacts = Artifacts(copy_url(file.artifacts, file.name), self._folder)
        artifacts.take()
        artifacts.start()
        self._artifacts = artifacts
        return artifacts

    def exit_code(self, code: int) -> int:
        """The exit code of a command that ended with ``code``: an incomplete copy is a failure too."""
        return code or (FAILED if self._is_incomplete else 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (artifacts := self._artifacts) is None:
            return
        self._is_incomplete = True
        try:
            with self._console.status(f"copying what is left to {artifacts.url}"):
                fault = artifacts.close()
        except KeyboardInterrupt:
            print(f"error: {self._incomplete(artifacts.url, 'copying was interrupted')}", file=sys.stderr)
            raise
        if fault is not None:
            shown = fault if isinstance(fault, TakenUpError) else self._incomplete(artifacts.url, fault.problem)
            print(f"error: {shown}", file=sys.stderr)
            return
        self._is_incomplete = False
        again = shlex.join(["evomerge", "resume", artifacts.url])
        self._console.print(f"copied; to continue elsewhere: {again}", soft_wrap=True)

    def _incomplete(self, url: str, why: str) -> InputError:
        again = shlex.join(["evomerge", "resume", str(self._folder)])
        hint = f"Nothing is lost: all of the search is in {self._folder}. To copy the rest: {again}"
        return InputError(url, f"the copy of the search is not complete ({why})", hint)
