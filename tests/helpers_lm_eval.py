"""Small tasks written as files, for the tests of the evaluators."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "evaluators" / "tasks"


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, text: str, **splits: Sequence[Mapping[str, Any]]) -> Path:
    """Write a task file and its data; ``text`` is its YAML without name, data and split names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in splits.items():
        files[split] = folder / f"{name}.{split}.jsonl"
        write_lines(files[split], rows)
    data = json.dumps({split: str(file) for split, file in files.items()})
    roles = "".join(f"{role}_split: {role}\n" for role in ("training", "validation", "test") if role in splits)
    file = folder / f"{name}.yaml"
    head = f"task: {name}\nmetadata: {{version: 1}}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
    file.write_text(head + roles + text)
    return file


def questions(split: str, count: int) -> list[dict[str, Any]]:
    """Sums with four choices, one of them right; prompts have different lengths."""
    offset = {"training": 0, "validation": 100, "test": 200}[split]
    rows = []
    for number in range(offset, offset + count):
        right = number * 7 % 13 + number
        rows.append(
            {
                "question": f"{'so ' * (number % 5)}what is {number * 7 % 13} + {number}?",
                "answer": str(right),
                "choices": [str(right + step) for step in (-1, 0, 1, 2)],
                "gold": 1,
            }
        )
    return rows


GENERATE = """\
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", "e", "</s>"]
  max_gen_toks: 8
"""

CHOOSE = """\
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""

LIKELIHOOD = """\
output_type: loglikelihood
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: " {{answer}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""

COUNTS = """\
process_results: !function counting.count
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
  - metric: sum_of_codes
    aggregation: mean
    higher_is_better: false
"""

COUNTING_CODE = """\
def count(doc, results):
    return {"letters": len(results[0]), "sum_of_codes": sum(map(ord, results[0])) % 97 / 97}
"""


def write_all(folder: Path, count: int = 12) -> None:
    """One task of each kind, whose scores differ from item to item under a random model."""
    splits = {split: questions(split, count) for split in ("training", "validation", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counting.py").write_text(COUNTING_CODE)
    write_task(folder, "generate", GENERATE + COUNTS, **splits)
    for sampler in ("default", "first_n"):
        shots = f"num_fewshot: 2\nfewshot_split: training\nfewshot_config: {{sampler: {sampler}}}\n"
        write_task(folder, f"generate_{sampler}", GENERATE + COUNTS + shots, **splits)
        write_task(folder, f"choose_{sampler}", CHOOSE + shots, **splits)
        write_task(folder, f"likelihood_{sampler}", LIKELIHOOD + shots, **splits)
    write_task(folder, "choose", CHOOSE, **splits)
    write_task(folder, "rolling", ROLLING, **splits)


def shipped_items(task: str, split: str) -> list[dict[str, Any]]:
    """The items of a task that ships with the project, as in its file."""
    lines = (SHIPPED / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shipped_tasks(names: Iterable[str]) -> dict[str, Any]:
    """Tasks that ship with the project as lm-eval loads them, from a current directory that is not the repository."""
    from lm_eval.tasks import TaskManager

    before = Path.cwd()
    os.chdir("/")
    try:
        loaded = TaskManager(include_path=str(SHIPPED), include_defaults=False).load(list(names))
    finally:
        os.chdir(before)
    return dict(loaded["tasks"])
