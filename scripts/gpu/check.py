"""The command line of the GPU kit; see ``check`` in this folder."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from children import NothingRanError, run_rows
from results import as_json, summary, table_line

CHILD = Path(__file__).resolve().with_name("child.py")
LIMIT_S = 240.0  # of a row; all of them together take less than twice that on an H200


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu/check", description="Checks Evomerge on a GPU against the CPU.")
    parser.add_argument("--small", action="store_true", help="the CPU form: the same rows, small")
    parser.add_argument("--json", action="store_true", help="print rows of {name, ok, figure}, and no table")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; may be repeated")
    given = parser.parse_args()
    form, results = ["--small"] if given.small else [], []
    with tempfile.TemporaryDirectory(prefix="evomerge-gpu-") as folder:

        def command(names: Sequence[str]) -> list[str]:
            return [sys.executable, str(CHILD), folder, *form, *names]

        try:
            for result in run_rows(given.row, command, LIMIT_S):
                results.append(result)
                if not given.json:
                    print(table_line(result), flush=True)
        except NothingRanError as error:
            parser.error(str(error).strip())
    print(as_json(results) if given.json else summary(results, shlex.join(["scripts/gpu/check", *form])))
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
