"""The command agreement: grade answers with both scorers of MGSM."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

from evaluators.agreement import agreement as graded_by_both
from evaluators.agreement import report, tables
from evaluators.numerals import Language
from evomerge.plugins import unknown_name
from evomerge.printable import without_nan
from evomerge.report.consoles import make_console


def agreement(file: Path, language: str, *, as_json: bool) -> None:
    """Print how often both scorers agree on a file of answers, and each answer on which they disagree."""
    if language not in get_args(Language):
        raise unknown_name(language, get_args(Language), "--language", "language")
    code = cast(Language, language)
    graded = graded_by_both(file, code)
    if not as_json:
        console = make_console()
        for line in report(graded, code):
            console.print(line, soft_wrap=True)
        return
    named_tables = zip(("acc", f"acc_{code}"), tables(graded), strict=True)
    result = {
        "answers": len(graded),
        "metrics": {name: asdict(table) | {"kappa": table.kappa} for name, table in named_tables},
        "differ": [asdict(answer) | {"right": str(answer.right)} for answer in graded if answer.sakana != answer.exact],
    }
    print(json.dumps(without_nan(result), indent=2, ensure_ascii=False))
