"""Training on the same answers: the control for all techniques that follow the gradient of right answers.

A proxy and a fit (docs/scoring.md, docs/fit.md) read right answers, and a simpler use of these is to train an adapter
on them. It has the rank and the training settings of the zoo's own adapters (examples/zoo), starts from the base, and
is trained on the answers that ``search_cost.py`` gives the proxy (1,000) or that ``experts.py`` gives the fit (600),
with equally many forward and backward passes. The learning rate is the best one on the 100 items on which searches
score candidates (these are among the search's answers); the score on the 500 held-out items is reported. A seed
determines the adapter's initial weights and the order of the answers.

    python scripts/bench/trained_adapter.py [--answers search fit] [--seeds 0 1 2]     # ten minutes of a core

Rows of docs/trained_adapter.json that are measured again replace the old ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import mean, stdev

import torch
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from search_cost import HELD_OUT, ZOO, in_turn  # noqa: E402
from small_models import answer_logits, answers_of  # noqa: E402
from torch.nn import functional  # noqa: E402
from train_zoo import NEW_TOKENS, RANK, ROW, learned_by, load_base, quietly  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from evaluators.tasks.zoo import score_mixed  # noqa: E402

OUT = ROOT / "docs" / "trained_adapter.json"
ROWS = 16  # answers in a step
RATES = (1e-3, 3e-3, 1e-2)
PASSES = {"search": 7168, "fit": 1920}  # those of a search with the proxy, and of a fit: 120 steps of 16
ANSWERS = {"search": 1000, "fit": 600}
CHOSEN_ON = 100  # items of the search split

Item = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """The mean held-out score of adapters trained with a number of passes on some answers, with its standard error."""

    answers: str
    passes: int
    seeds: int
    score: float
    error: float

    def __str__(self) -> str:
        return f"{self.answers} answers, {self.passes} passes: {self.score:.3f} ± {self.error:.3f}"


def items_of(split: str, count: int) -> list[Item]:
    """The first items of the four tasks, interleaved."""
    rows = [{"task": task} | json.loads(line) for task, line in in_turn(split)]
    assert len(rows) >= count, f"{split} has {len(rows)} items"
    return rows[:count]


def batch_of(items: Sequence[Item], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, int64 [items, ROW]: one item per row, with only the answer's tokens in the loss."""
    inputs = torch.full((len(items), ROW), tokenizer.pad_token_id)
    labels = torch.full((len(items), ROW), -100)
    for row, item in enumerate(items):
        prompt = tokenizer.encode(item["prompt"])
        answer = [*tokenizer.encode(item["answer"], add_special_tokens=False), tokenizer.eos_token_id]
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> float:
    """The mean score of greedy answers, according to each item's own task."""
    answers = answers_of(model, tokenizer, [i["prompt"] for i in items], new_tokens=NEW_TOKENS, batch_size=250)
    return mean(score_mixed(dict(item), [answer])["acc"] for item, answer in zip(items, answers, strict=True))


def trained(items: Sequence[Item], passes: int, rate: float, seed: int) -> tuple[float, float]:
    """Train one adapter, and return its scores on the items to choose on and on the held-out items."""
    torch.manual_seed(seed)
    random = Random(seed)
    model, tokenizer = load_base(ZOO)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).base_model.model
    optimizer = torch.optim.AdamW(learned_by(adapted), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps, waiting = passes // ROWS, list[Item]()
    adapted.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # as for the zoo's own adapters: warm-up, and decay over the last third
            group["lr"] = rate * min(1.0, step / 30, (steps + 1 - step) / (steps / 3))
        if len(waiting) < ROWS:
            waiting = [*waiting, *random.sample(items, len(items))]
        drawn, waiting = waiting[:ROWS], waiting[ROWS:]
        functional.cross_entropy(*answer_logits(adapted, *batch_of(drawn, tokenizer))).backward()
        torch.nn.utils.clip_grad_norm_(learned_by(adapted), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    return (
        score(adapted, tokenizer, items_of("search", CHOSEN_ON)),
        score(adapted, tokenizer, items_of("held_out", HELD_OUT)),
    )


def measure(split: str, seeds: Sequence[int]) -> Row:
    """Train on the answers of a split with every rate, and take the best rate of each seed."""
    items, passes = items_of(split, ANSWERS[split]), PASSES[split]
    tried = [[trained(items, passes, rate, seed) for rate in RATES] for seed in seeds]
    scores = [max(of_seed, key=lambda found: found[0])[1] for of_seed in tried]
    error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return Row(f"{len(items)} {split}", passes, len(scores), mean(scores), error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", nargs="+", choices=list(ANSWERS), default=list(ANSWERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(3)))
    given = parser.parse_args()
    quietly(1)
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    for split in given.answers:
        row = measure(split, given.seeds)
        print(row, flush=True)
        rows = [of for of in rows if of["answers"] != row.answers] + [asdict(row)]
        OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
