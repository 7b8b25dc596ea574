"""Results of rows, and how they are shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """How one row ended.

    Attributes:
        name: of the row.
        ok: whether all that it checks holds.
        figure: what was measured, or what is wrong, in a line.
        seconds: that it took.
        log: what it printed.
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
    """A line of the table."""
    verdict = "ok" if result.ok else "FAILED"
    return f"{result.name:36} {verdict:6} {result.seconds:6.1f} s  {result.figure}"


def summary(results: Sequence[Result], command: str) -> str:
    """How many rows hold, and how to run each of the others again."""
    failed = [result for result in results if not result.ok]
    lines = [f"{len(results) - len(failed)} of {len(results)} rows hold, {sum(r.seconds for r in results):.0f} s"]
    for result in failed:
        lines += ["", f'FAILED {result.name}; again: {command} --row "{result.name}"']
        if result.log:
            lines.append(result.log.rstrip())
    return "\n".join(lines)


def selected(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of ``names`` that are ``wanted``, or all where nothing is.

    Raises:
        ValueError: there is no such row; says the nearest, or all.
    """
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise ValueError(f"there is no row {name!r}; {hint}")
    return [name for name in names if not wanted or name in wanted]
