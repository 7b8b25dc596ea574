"""Scoring a candidate: Evomerge against ``lm_eval.simple_evaluate``, on the same task, model and items, in one run.

Figures are seconds of one core per candidate: processor time of this process on one thread, as in a worker, as medians
of runs that take turns. ``simple_evaluate`` gets every advantage: the model is in memory and wrapped once, tasks are
indexed once, it uses the best of several batch sizes, it neither bootstraps nor keeps samples, and its queries about
the machine (pip and git in subprocesses) are omitted. Evomerge runs with its defaults.

In float32 the scores of all items must be equal. In bfloat16, in which most searches run, two tokens are often equally
likely up to rounding, and lm-eval's own scores depend on its batch size, so the items that differ are counted.

A model with random weights and a vocabulary of 50,000, as in real models, is compared with plain transformers: its
``generate`` with the best of three batch sizes for answers, and one batch with the head on only the answers' tokens for
likelihoods. Runs take turns, and a ratio is the median over pairs. ``--vocabulary`` does only this.

Answers alone are timed in three steps: transformers' own batches, finished rows replaced by others, and the common
beginning of all prompts computed once.

    python scripts/bench/scoring.py [--repeats 3] [--items 500] [--output docs/scoring.json] [--vocabulary]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evaluators.base import ItemScores
from evaluators.lm_eval import LmEvalEvaluator, LmEvalSettings
from evaluators.lm_eval_quiet import quiet
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, for_scoring, live_model, load_weights
from evomerge.checkpoints.source import open_source
from evomerge.inference import decoding, generation
from evomerge.inference.prefill import log_likelihoods
from evomerge.inference.reading import Prompt
from evomerge.inference.requests import Likelihood

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "evaluators" / "tasks"
MODEL = ROOT / "examples" / "miniatures" / "japanese"
BATCH_SIZES = (64, 128, 250, 500)
VOCABULARY, NEW_TOKENS = 50_000, 24
STEPS = ("transformers' batches", "rows make room", "and one prefix")

FEWSHOT = """\
task: bench_{shots}
dataset_path: json
dataset_kwargs: {{data_files: {files}}}
validation_split: search
test_split: held_out
fewshot_split: search
fewshot_config: {{sampler: first_n}}
output_type: generate_until
num_fewshot: {shots}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 32}}
process_results: !function miniatures.score_math_ja
metric_list:
  - {{metric: acc_ja, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_task(folder: Path, shots: int) -> str:
    """Write mini_math_ja with worked examples, whose own file fixes their number at 0; return the task's name."""
    shutil.copy(TASKS / "miniatures.py", folder)
    files = json.dumps({split: str(TASKS / "data" / f"mini_math_ja.{split}.jsonl") for split in ("search", "held_out")})
    (folder / f"bench_{shots}.yaml").write_text(FEWSHOT.format(shots=shots, files=files))
    return f"bench_{shots}"


def load(dtype: torch.dtype) -> LiveModel:
    source = open_source("japanese", str(MODEL), place="model")
    live = live_model(source, torch.device("cpu"), dtype)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    return live


class Theirs:
    """``simple_evaluate`` on a task."""

    def __init__(self, live: LiveModel, folder: Path, task: str, items: int) -> None:
        self._live, self._task, self._items = live, task, items
        self._manager = TaskManager(include_path=[str(folder), str(TASKS)], include_defaults=False)
        self._models: dict[int, HFLM] = {}

    def __call__(self, batch_size: int, samples: bool = False) -> dict[int, tuple[float, ...]]:
        """The scores of every item, if samples are kept."""
        if batch_size not in self._models:
            self._models[batch_size] = HFLM(self._live.model, tokenizer=self._live.tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=self._models[batch_size],
            tasks=[self._task],
            task_manager=self._manager,
            bootstrap_iters=0,
            limit=self._items,
            log_samples=samples,
            verbosity="CRITICAL",
        )
        return {s["doc_id"]: (s["acc_ja"], s["acc"]) for s in results["samples"][self._task]} if samples else {}


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def interleaved(repeats: int, works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each function, run in turns after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            lasted = seconds(work)
            if repeat:
                taken[name].append(lasted)
    return {name: statistics.median(times) for name, times in taken.items()}


def unaware() -> Any:
    """Make simple_evaluate omit its queries of pip and git."""
    return mock.patch.multiple("lm_eval.evaluator", add_env_info=lambda *_: None, get_git_commit_hash=lambda *_: None)


def compare(live: LiveModel, folder: Path, task: str, items: int, repeats: int) -> dict[str, Any]:
    """Seconds per candidate, theirs and ours, and the number of items whose scores differ."""
    settings = LmEvalSettings(
        task=task, task_folders=(folder,), allow_task_code=True, search=f"validation[:{items}]",
        held_out=f"test[:{items}]",
    )  # fmt: skip
    ours, theirs = settings.build(), Theirs(live, folder, task, items)

    def scored() -> ItemScores:
        return score(ours, live, "held_out", range(items)).scores

    with unaware():
        kept: dict[int, dict[int, tuple[float, ...]]] = {}
        trial: dict[int, float] = {}
        for size in (*BATCH_SIZES, BATCH_SIZES[0]):  # the first run of all is slow
            started = time.process_time()
            kept[size] = theirs(size, samples=True)
            trial[size] = time.process_time() - started
        best = min(trial, key=lambda size: trial[size])
        taken = interleaved(repeats, {"simple_evaluate": lambda: theirs(best), "evomerge": scored})
    scores = scored()
    mine = {i: (scores["acc_ja"][i], scores["acc"][i]) for i in range(items)}
    differ = {size: sum(mine[i] != kept[size][i] for i in range(items)) for size in BATCH_SIZES}
    if live.model.dtype == torch.float32 and any(differ.values()):
        raise AssertionError(f"{task}: items are scored differently than by simple_evaluate: {differ}")
    return {
        "seconds": taken,
        "times as fast": taken["simple_evaluate"] / taken["evomerge"],
        "simple_evaluate by batch size": trial,
        "batch size of simple_evaluate": best,
        "items that differ": max(differ.values()),
        "items that differ within lm-eval": sum(len({kept[size][i] for size in BATCH_SIZES}) > 1 for i in range(items)),
        "mean acc_ja": float(scores["acc_ja"].mean()),
        "answers alone": answers_alone(live, ours, items, repeats),
    }


def answers_alone(live: LiveModel, evaluator: LmEvalEvaluator, items: int, repeats: int) -> dict[str, float]:
    """Seconds to answer the prompts of the items, for each step."""
    prompts = [live.tokenizer.encode(group[0].args[0]) for group in evaluator._instances["held_out"][:items]]
    batches: Callable[[], Sequence[str]] = lambda: generation._in_batches(live, prompts, 32, ["\n"], "auto")  # noqa: E731
    rows = partial(answer, live, prompts, generation.Decoding(32, ("\n",)))

    def without_prefix() -> Sequence[str]:
        with mock.patch.object(decoding, "_common", return_value=0):
            return rows()

    return interleaved(repeats, dict(zip(STEPS, (batches, without_prefix, rows), strict=True)))


def answer(live: LiveModel, prompts: Sequence[Sequence[int]], how: generation.Decoding) -> list[str]:
    """The answers to prompts of one model."""
    return generation.answer_groups(live, [prompts], how, lambda rows: None)[0]


def large_vocabulary(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds for answers and for likelihoods, with plain transformers and ours, and the median of their ratios."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)  # which does not have most of its tokens
    live = LiveModel(for_scoring(LlamaForCausalLM(config).to(torch.bfloat16)), tokenizer)
    lengths = [40 + number % 12 for number in range(60)]
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    sizes = {rows: seconds(partial(plain_answers, live, prompts, rows)) for rows in (60, 20, 60)}
    best = min(sizes, key=lambda rows: sizes[rows])
    items = [Likelihood(Prompt("", "", ids, 12, None, "")) for ids in prompts]
    return {
        "answers": paired(
            repeats,
            lambda: plain_answers(live, prompts, best),
            lambda: answer(live, prompts, generation.Decoding(NEW_TOKENS)),
        ),
        "likelihoods": paired(
            repeats, lambda: plain_likelihoods(live, prompts, 12), lambda: log_likelihoods(live, items)
        ),
    }


def plain_answers(live: LiveModel, prompts: Sequence[Sequence[int]], rows: int) -> None:
    """Greedy answers from transformers' ``generate``."""
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            live.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=0, do_sample=False
            )


def plain_likelihoods(live: LiveModel, prompts: Sequence[Sequence[int]], scored: int) -> list[float]:
    """The log-likelihood of the last tokens of each text, all in one batch, as in a simple script."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in prompts])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in prompts])
    with torch.inference_mode():
        hidden = live.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        sums = []
        for row, states in zip(prompts, hidden, strict=True):
            first = len(row) - scored
            logs = live.model.lm_head(states[first - 1 : len(row) - 1]).float().log_softmax(-1)
            sums.append(float(logs.gather(1, torch.tensor(row[first:])[:, None]).sum()))
    return sums


def paired(repeats: int, theirs: Callable[[], object], ours: Callable[[], object]) -> dict[str, float]:
    """Median seconds of both, and the median ratio, over turns after one that does not count."""
    turns = [(seconds(theirs), seconds(ours)) for _ in range(repeats + 1)][1:]
    return {
        "transformers": statistics.median(t for t, _ in turns),
        "evomerge": statistics.median(o for _, o in turns),
        "times as fast": statistics.median(t / o for t, o in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument(
        "--shots", type=int, default=3, help="worked examples; the context of 256 tokens has no room for 5"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scoring.json")
    parser.add_argument("--vocabulary", action="store_true", help="only the model with a vocabulary of 50,000")
    given = parser.parse_args()
    torch.set_num_threads(1)
    large = large_vocabulary(given.repeats)
    for what, times in large.items():
        print(
            f"vocabulary of {VOCABULARY:,}, {what}: " + ", ".join(f"{k} {v:.2f}" for k, v in times.items()),
            flush=True,
        )
    if given.vocabulary:
        return
    results: dict[str, dict[str, Any]] = {}
    head = f"{'':34}{'simple_evaluate':>16}{'evomerge':>10}{'ratio':>7}{'differ':>8}   answers alone: " + ", ".join(
        STEPS
    )
    print(head)
    with tempfile.TemporaryDirectory() as folder, quiet():
        tasks = {"no examples": "mini_math_ja", f"{given.shots} examples": write_task(Path(folder), given.shots)}
        for dtype in (torch.float32, torch.bfloat16):
            live = load(dtype)
            for label, task in tasks.items():
                name = f"{task}, {str(dtype).removeprefix('torch.')}, {label}"
                result = results[name] = compare(live, Path(folder), task, given.items, given.repeats)
                taken, alone = result["seconds"], result["answers alone"]
                print(
                    f"{name:34}{taken['simple_evaluate']:15.2f}s{taken['evomerge']:9.2f}s{result['times as fast']:7.1f}"
                    f"{result['items that differ']:8}   " + ", ".join(f"{alone[step]:.2f}s" for step in STEPS),
                    flush=True,
                )
    rounded = json.loads(
        json.dumps(results), parse_float=lambda text: float(np.format_float_positional(float(text), 3))
    )
    given.output.write_text(
        json.dumps(
            {"items": given.items, "repeats": given.repeats, "runs": rounded, f"vocabulary of {VOCABULARY}": large},
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
