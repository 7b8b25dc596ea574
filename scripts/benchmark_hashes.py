"""Writes hashes of a public benchmark's test questions, by which a search on them is noticed.

    python scripts/benchmark_hashes.py NAME FILE...

The files hold the test split: JSON objects with a ``question`` (.jsonl), or a question, a tab and an answer (.tsv), one
a line. The hashes go to evaluators/data/NAME.txt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluators.benchmarks import DATA, question_hash


def questions(file: Path) -> Iterator[str]:
    for line in file.read_text("utf-8").split("\n"):
        if line.strip():
            yield line.rpartition("\t")[0] if file.suffix == ".tsv" else json.loads(line)["question"]


def main() -> None:
    name, *files = sys.argv[1:]
    hashes = {question_hash(question) for file in files for question in questions(Path(file))} - {None}
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.txt").write_text("".join(f"{hashed}\n" for hashed in sorted(map(str, hashes))), "ascii")
    print(f"{len(hashes)} questions of {name}")


if __name__ == "__main__":
    main()
