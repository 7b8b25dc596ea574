"""A child process of ``children``: runs rows and reports them on its standard output.

python child.py FOLDER [--small] [NAME...]
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from kit import CPU, Row, Setting, WrongError
from results import selected
from rows import all_rows


def main() -> None:
    small = "--small" in sys.argv
    folder, *wanted = (argument for argument in sys.argv[1:] if argument != "--small")
    if not (small or torch.cuda.is_available()):
        raise SystemExit("there is no CUDA device here; --small is the CPU form")
    setting = Setting(CPU if small else torch.device("cuda"), small, Path(folder))
    rows = {row.name: row for row in all_rows()}
    try:
        names = selected(list(rows), wanted)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    # Output of a row must not be taken for a report.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**report: Any) -> None:
        print(json.dumps(report), file=reports, flush=True)

    say(rows=names)
    threads = torch.get_num_threads()
    for name in names:
        say(starts=name)
        report = guarded(rows[name], setting)
        sys.stdout.flush()
        sys.stderr.flush()
        say(**report, printed=os.fstat(2).st_size)
        torch.set_num_threads(threads)  # a search sets its own
        gc.collect()
        if not (report["ok"] or is_usable(setting.device)):
            return


def guarded(row: Row, setting: Setting) -> dict[str, Any]:
    """Run a row and return its report, whatever it raises."""
    started = time.perf_counter()
    try:
        figure, ok = row.run(setting), True
        setting.wait()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit of a command
        figure, ok = first_line(error), False
        traceback.print_exc()
    return {"name": row.name, "ok": ok, "figure": figure, "seconds": time.perf_counter() - started}


def first_line(error: BaseException) -> str:
    """The first line of an error."""
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, WrongError) else f"{type(error).__name__}: {said}".removesuffix(": ")


def is_usable(device: torch.device) -> bool:
    """Whether the device still works in this process: after some errors, every later call of CUDA fails."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


if __name__ == "__main__":
    main()
