"""The command report: a search as one HTML file."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from evomerge.errors import InputError
from evomerge.search.settings.folder import open_store
from evomerge.service.report import report_html


def report(folder: Path, out: Path | None) -> None:
    """Write the report of a search, by default into its folder. An existing file is replaced atomically.

    Raises:
        InputError: there is no search in the folder, or the file cannot be written.
    """
    with open_store(folder) as store:
        page = report_html(store, folder)
    out = out or folder / "report.html"
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise InputError(str(out), f"cannot be written ({error.strerror})", "Name another with --out.") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    print(f"written to {out}", file=sys.stderr)
