"""Results of rows, as text and as JSON."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """The result of one row.

    Attributes:
        name: of the row.
        ok: whether all of its checks hold.
        figure: what was measured, or what is wrong, in one line.
        seconds: its duration.
        log: its output.
    """

    name: str
    ok: bool
    figure: str
    seconds: float = 0.0
    log: str = ""


def as_json(results: Sequence[Result]) -> str:
    """``rows`` of {name, ok, figure}."""
    rows = [{"name": result.name, "ok": result.ok, "figure": result.figure} for result in results]
    return json.dumps({"rows": rows}, indent=2)


def table_line(result: Result) -> str:
    """The result as a line of the table."""
    verdict = "ok" if result.ok else "FAILED"
    return f"{result.name:36} {verdict:6} {result.seconds:6.1f} s  {result.figure}"


def summary(results: Sequence[Result], command: str) -> str:
    """How many rows hold, and how to run each failed one again."""
    failed = [result for result in results if not result.ok]
    lines = [f"{len(results) - len(failed)} of {len(results)} rows hold, {sum(r.seconds for r in results):.0f} s"]
    for result in failed:
        lines += ["", f'FAILED {result.name}; again: {command} --row "{result.name}"']
        if result.log:
            lines.append(result.log.rstrip())
    return "\n".join(lines)


def selected(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The ``wanted`` ones of ``names``; all if none are given.

    Raises:
        ValueError: there is no such row; the message suggests the nearest name, or lists all.
    """
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise ValueError(f"there is no row {name!r}; {hint}")
    return [name for name in names if not wanted or name in wanted]
