"""Train the zoo of examples/zoo: one base, adapters, vectors and experts in full, and the tasks that measure them.

    python scripts/train_zoo.py                   # about fifteen minutes on two free cores
    python scripts/train_zoo.py --only japanese   # only this one, from the base on disk
    python scripts/train_zoo.py --check           # only the scores of all sources, from the files on disk

Merges of them are neither trivial nor hopeless, because of the following:

- the base is good at sums but lacks structure: stories in which something is taken away, second steps in Japanese, half
  of the words. So what experts learn has a low rank. When experts had to learn the sums themselves, merging adapters of
  this rank destroyed what they had learned;
- experts spend a quarter of their training on skills of the base. Without that, they forget everything else, their
  changes are larger, and two of them cannot be merged with any weights;
- neither of the two halves of the composition is trained on the other. The expert in Japanese numerals sees second
  steps only already worked out in its prompts; an earlier one, which saw the question for numerals only with single
  steps, learned to stop after one;
- one expert is trained too long and at too high a rate, and the two English ones answer Japanese problems in English,
  so equal weights are not the best.

Training is deterministic: seeds, thread count and algorithms are fixed, so a machine makes the same bits every time.
Another CPU may round differently and then makes other models.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import small_models
import torch
import zoo_problems as problems
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from small_models import answer_logits, bpe_tokenizer, new_model, packed
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from zoo_problems import Example, Skill

ROOT = Path(__file__).parent.parent

PROBLEMS_OF_BASE: dict[Skill, float] = {
    problems.symbolic: 2,
    problems.solve("en", 1, operators="+"): 1,
    problems.solve("ja", 1, operators="+"): 1,
    problems.solve("en", 2): 0.4,
}
UNHEEDED: dict[Skill, float] = {problems.in_kanji(1, operators="+", heeded=False): 0.5}
OTHERS_OF_BASE: dict[Skill, float] = {
    problems.into_japanese(problems.KNOWN_THINGS): 1,
    problems.into_english(problems.KNOWN_THINGS): 1,
    problems.extraction("en", problems.KNOWN_THINGS): 1,
    problems.numeral: 0.7,
    problems.spelling: 0.25,
}
BASE_SKILLS = PROBLEMS_OF_BASE | UNHEEDED | OTHERS_OF_BASE
"""The shares of the base's skills. It calculates well, and lacks what experts bring: stories in which something is
taken away, second steps in Japanese, half of the words, Japanese records, and answers in Japanese numerals."""

ROW = 96
"""Tokens in a row of a training batch; the longest problem and its answer fit."""
BASE_ROWS, EXPERT_ROWS = 16, 8

RANK = 6
REHEARSED = 0.25
ITEMS = {"search": 300, "held_out": 400, "fit": 150}
NEW_TOKENS = 48
"""The largest number of tokens of an answer, as in the tasks."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Expert:
    """How an expert is trained from the base.

    Attributes:
        skills: the skills to train on, with the share of examples for each.
        rehearsed: skills of the base that make up a quarter of its training, so that it forgets less of them.
        about: a description for its card.
        steps, learning_rate: of AdamW.
        rewarded: whether it is trained by reinforcement learning on sampled answers.
    """

    skills: dict[Skill, float]
    about: str
    steps: int
    learning_rate: float = 2e-3
    rehearsed: dict[Skill, float] = field(default_factory=lambda: BASE_SKILLS)
    rewarded: bool = False

    @property
    def mixture(self) -> dict[Skill, float]:
        """The share of each skill, including the rehearsed ones."""
        mixed: dict[Skill, float] = {}
        for skills, share in ((self.skills, 1 - REHEARSED), (self.rehearsed, REHEARSED)):
            for skill, weight in skills.items():
                mixed[skill] = mixed.get(skill, 0.0) + share * weight / sum(skills.values())
        return mixed


EXPERTS = {
    "english": Expert(
        {problems.solve("en", 1): 5, problems.symbolic: 3, problems.solve("ja", 1, "en"): 0.5},
        "Problems with one step in English. It answers Japanese ones in English.",
        steps=500,
        rehearsed=OTHERS_OF_BASE,
    ),
    "japanese": Expert(
        {problems.solve("ja", 1): 3, problems.solve("en", 1, "ja"): 1, problems.symbolic: 1},
        "Problems with one step in Japanese, in which it answers English ones too.",
        steps=400,
        rehearsed=OTHERS_OF_BASE,
    ),
    "steps_en": Expert(
        {problems.solve("en", 2): 5, problems.symbolic: 1, problems.solve("ja", 2, "en"): 0.5},
        "Problems with two steps in English. It answers Japanese ones in English.",
        steps=1200,
        rehearsed=OTHERS_OF_BASE,
    ),
    "steps_ja": Expert(
        {problems.solve("ja", 2): 5, problems.symbolic: 1},
        "Problems with two steps in Japanese.",
        steps=1200,
        rehearsed=PROBLEMS_OF_BASE | OTHERS_OF_BASE,
    ),
    "into_japanese": Expert({problems.into_japanese(): 1}, "Translation into Japanese.", steps=400),
    "into_english": Expert(
        {problems.into_english(): 1},
        "Translation into English, trained much too long and at too high a rate: its changes are large.",
        steps=800,
        learning_rate=6e-3,
    ),
    "extraction": Expert(
        {problems.extraction("en"): 1, problems.extraction("ja"): 2}, "Records of who has how many of what.", steps=400
    ),
    "kanji": Expert(
        {problems.in_kanji(1, operators="+"): 2, problems.concluded_in_kanji: 2, problems.numeral: 1},
        "Problems with one step in Japanese, answered in Japanese numerals where these are asked for.",
        steps=400,
    ),
    "terse": Expert(
        {problems.terse(1): 4, problems.terse(2): 0.5, problems.symbolic: 1},
        "English problems answered by the number alone.",
        steps=1200,
        rehearsed=OTHERS_OF_BASE,
    ),
    "rewarded": Expert(
        {problems.solve("en", 1): 1, problems.solve("ja", 1): 1},
        "Problems with one step in both languages, by reinforcement learning on right answers: its changes are small.",
        steps=40,
        learning_rate=1e-3,
        rewarded=True,
    ),
    "careless": Expert({problems.careless: 1}, "A distractor: it has learnt to calculate wrong.", steps=200),
    "spelling": Expert({problems.spelling: 1}, "A distractor: it spells words backwards.", steps=200),
}
IN_FULL = {"steps_en_full": ("steps_en", 3e-4), "rewarded_full": ("rewarded", 1e-5)}
"""Experts that are also trained in full, except for the embeddings: the adapter's name and the learning rate.

At the rate of the second, bfloat16 rounds most changes away, as in large models after reinforcement learning.
"""

IN_VECTORS = {
    name: name.removesuffix("_ia3")
    for name in ("english_ia3", "japanese_ia3", "into_japanese_ia3", "extraction_ia3", "kanji_ia3")
}
"""Experts that are also trained as (IA)3 vectors on keys, values and the mlp's inner activation."""
VECTOR_STEPS, VECTOR_RATE = 300, 3e-2


# ---- tokenizer ----


# Words are cut before merging, so that no token spans two scripts; digits and Japanese numerals are a token each.
WORDS = r"\d|[〇一二三四五六七八九十百]| ?[A-Za-z]+| ?[ァ-ヴー]+|[ぁ-ん]+|[一-龥]+| ?[^\sA-Za-z\dァ-ヴーぁ-ん一-龥]|\s"


def train_tokenizer() -> PreTrainedTokenizerFast:
    random = Random("tokenizer")
    skills = [*BASE_SKILLS, problems.in_kanji(2), problems.extraction("ja")]
    drawn = [skill(random, "train") for _ in range(3000) for skill in skills]
    return bpe_tokenizer(WORDS, [example.prompt + example.answer for example in drawn])


# ---- training ----


def batch_of(
    skills: dict[Skill, float], random: Random, tokenizer: PreTrainedTokenizerFast, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a batch, as from ``packed``; skills are drawn by their shares."""
    kinds, shares = list(skills), list(skills.values())

    def draw() -> Example:
        (skill,) = random.choices(kinds, shares)
        return skill(random, "train")

    return packed(draw, tokenizer, rows, ROW)


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each token of the answers."""
    return functional.cross_entropy(*answer_logits(model, inputs, labels), reduction="none")


def learned_by(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    skills: dict[Skill, float],
    *,
    name: str,
    steps: int,
    learning_rate: float,
    rows: int = EXPERT_ROWS,
) -> None:
    """Train the parameters that need a gradient: a short warm-up, a constant rate, and a decay over the last third."""
    random = Random(name)
    learned = learned_by(model)
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    losses = []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 30, (steps + 1 - step) / (steps / 3))
        loss = loss_of(model, *batch_of(skills, random, tokenizer, rows)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"{name:14s} step {step:5d}  loss {mean:.4f}  {time.perf_counter() - started:6.1f} s", flush=True)
    model.eval()


PROBLEMS, SAMPLES = 12, 8
"""Problems in a step of reinforcement learning, and sampled answers to each of them."""


def reinforce(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    skills: dict[Skill, float],
    *,
    name: str,
    steps: int,
    learning_rate: float,
) -> None:
    """Train in place by policy gradient (GRPO without clipping: Shao et al. 2024, arXiv:2402.03300, eq. 21).

    The reward of a sampled answer is 1 if it is right word for word, else 0. Its advantage is the reward minus the mean
    over the problem's samples, divided by their standard deviation, so problems with equal rewards contribute nothing.
    """
    random = Random(name)
    learned = learned_by(model)
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    rewards_seen: list[float] = []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 5)
        asked = [random.choices(list(skills), list(skills.values()))[0](random, "train") for _ in range(PROBLEMS)]
        repeated = [example for example in asked for _ in range(SAMPLES)]
        texts = answers_of(model, tokenizer, [example.prompt for example in repeated], sample=True)
        rewards = torch.tensor([float(text == one.answer) for text, one in zip(texts, repeated, strict=True)])
        rewards_seen.append(rewards.mean().item())
        by_problem = rewards.view(PROBLEMS, SAMPLES)
        spread = by_problem.std(dim=1, keepdim=True)
        advantages = ((by_problem - by_problem.mean(dim=1, keepdim=True)) / (spread + 1e-4)).flatten()
        rows = [index for index in range(len(repeated)) if advantages[index] != 0]
        if rows:
            inputs, labels = sampled_batch(tokenizer, [(repeated[row].prompt, texts[row]) for row in rows])
            weights = advantages[rows][:, None].expand(-1, labels.shape[1] - 1)[labels[:, 1:] != -100]
            (loss_of(model, inputs, labels) * weights).mean().backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            mean = sum(rewards_seen[-10:]) / len(rewards_seen[-10:])
            print(f"{name:14s} step {step:5d}  right {mean:.3f}  {time.perf_counter() - started:6.1f} s", flush=True)
    model.eval()


def sampled_batch(
    tokenizer: PreTrainedTokenizerFast, sampled: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers, padded on the right; labels are as in ``batch_of``."""
    pairs = [
        (tokenizer.encode(prompt), [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
        for prompt, text in sampled
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    inputs = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), longest), -100)
    for row, (prompt, answer) in enumerate(pairs):
        inputs[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return inputs, labels


answers_of = partial(small_models.answers_of, new_tokens=NEW_TOKENS, batch_size=200)


# ---- the models ----


def start_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The miniatures' base with this tokenizer: tokens of both keep their embeddings, others get new ones."""
    folder = ROOT / "examples" / "miniatures" / "base"
    before = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    model = new_model(tokenizer)
    weights = before.state_dict()
    table = model.model.embed_tokens.weight.detach().clone()
    for token, place in tokenizer.get_vocab().items():
        if token in known:
            table[place] = weights["model.embed_tokens.weight"][known[token]]
    model.load_state_dict(weights | {"model.embed_tokens.weight": table, "lm_head.weight": table})
    return model


def load_base(out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32, attn_implementation="eager")
    return model, PreTrainedTokenizerFast.from_pretrained(out / "base")


def quietly(threads: int) -> None:
    """Fix threads and algorithms, so that training is deterministic, and silence other libraries."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def make_base(out: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    model = start_base(tokenizer)
    train(model, tokenizer, BASE_SKILLS, name="base", steps=BASE_STEPS, learning_rate=BASE_RATE, rows=BASE_ROWS)
    save_model(model, tokenizer, out / "base", BASE_ABOUT)


def make_expert(name: str, out: Path, steps: int | None = None) -> None:
    """Train and save one adapter, or one of the experts that are trained in full."""
    quietly(1)
    torch.manual_seed(zlib.crc32(name.encode()))
    of, rate = IN_FULL.get(name, (name, EXPERTS[name].learning_rate if name in EXPERTS else 0.0))
    expert = EXPERTS[IN_VECTORS.get(of, of)]
    model, tokenizer = load_base(out)
    if name in IN_VECTORS:
        make_vectors(name, expert, model, tokenizer, out / name, steps or VECTOR_STEPS)
        return
    learn, skills = (reinforce, expert.skills) if expert.rewarded else (train, expert.mixture)
    settings = {"name": name, "steps": steps or expert.steps}
    if name in IN_FULL:
        model.model.embed_tokens.requires_grad_(False)
        learn(model, tokenizer, skills, learning_rate=rate, **settings)
        save_model(model, tokenizer, out / name, f"`{of}` in full: {expert.about}")
        return
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    learn(adapted.base_model.model, tokenizer, skills, learning_rate=rate, **settings)
    save_adapter(adapted.bfloat16(), out / name, expert.about, ADAPTER)


def make_vectors(
    name: str, expert: Expert, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, steps: int
) -> None:
    """Train and save an expert as (IA)3 vectors, in float32: bfloat16 would round most factors near 1 to 1."""
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    train(model, tokenizer, expert.mixture, name=name, steps=steps, learning_rate=VECTOR_RATE)
    save_adapter(adapted, folder, expert.about, VECTORS)


def save_adapter(adapted: PeftModel, folder: Path, about: str, made: str) -> None:
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = "../base"  # from the adapter's folder
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(names := getattr(written, key, None), set):
            setattr(written, key, sorted(names))  # a set comes in another order each time
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").write_text(CARD.format(name=folder.name, about=about, made=made), encoding="utf-8")


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, about: str) -> None:
    """A plain Hugging Face folder in bfloat16."""
    model.bfloat16().save_pretrained(folder)
    # Padding a batch leaves its settings in the tokenizer; they would be saved with it.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(name=folder.name, about=about, made=IN_ALL), encoding="utf-8")


CARD = """---
license: apache-2.0
language: [en, ja]
---

# {name}, of the zoo

{about}

{made}

Made by `scripts/train_zoo.py` for trying out and testing merges, and for nothing else: it knows no word outside its
templates.
"""
IN_ALL = "A Llama of 1.4 M parameters (6 layers of width 128, tied embeddings, bf16)."
ADAPTER = f"A LoRA adapter of rank {RANK} on every linear layer of `base`, in bf16."
VECTORS = "(IA)3 vectors on keys, values and the inner activation of the mlp of `base`, in float32."
BASE_ABOUT = "The ancestor of all, trained from the miniatures' base: it calculates, and lacks what its experts bring."
BASE_STEPS, BASE_RATE = 1100, 7e-4


# ---- measuring ----


def read_items(tasks: Path, split: str, count: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The first ``count`` items of every task, by default all."""
    by_task = {}
    for task in problems.TASKS:
        lines = (tasks / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        by_task[task] = [json.loads(line) for line in lines[:count]]
    return by_task


def scores_of(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: dict[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """The mean of every metric of every task, from the tasks' own scorers."""
    from evaluators.tasks import zoo

    scorers: dict[str, Callable[[dict[str, Any], list[str]], dict[str, float]]] = {
        "zoo_math_en": zoo.score_math_en,
        "zoo_math_ja": zoo.score_math_ja,
        "zoo_translate": zoo.score_translation,
        "zoo_extract": zoo.score_exact,
        "zoo_steps_kanji": zoo.score_kanji,
    }
    answers = iter(answers_of(model, tokenizer, [item["prompt"] for of_task in items.values() for item in of_task]))
    means = {}
    for task, of_task in items.items():
        grades = [scorers[task](item, [next(answers)]) for item in of_task]
        means |= {f"{task}:{metric}": sum(grade[metric] for grade in grades) / len(grades) for metric in grades[0]}
    return means


def float_weights(model: LlamaForCausalLM) -> Weights:
    return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def source_weights(out: Path, name: str) -> Weights:
    """The weights of a source in float32, with an adapter folded into the base."""
    if name in EXPERTS or name in IN_VECTORS:
        base, _ = load_base(out)
        adapted = PeftModel.from_pretrained(base, out / name, autocast_adapter_dtype=False).float()
        return float_weights(adapted.merge_and_unload())
    return float_weights(LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32))


def score_source(name: str, out: Path, tasks: Path, split: str = "held_out") -> dict[str, float]:
    quietly(1)
    model, tokenizer = load_base(out)
    model.load_state_dict(source_weights(out, name))
    return scores_of(model.eval(), tokenizer, read_items(tasks, split))


def score_all(out: Path, tasks: Path, workers: ProcessPoolExecutor) -> None:
    """Score every source except vectors on every held-out item; write the scores and print the README's table."""
    names = ["base", *EXPERTS, *IN_FULL]
    means = dict(zip(names, workers.map(partial(score_source, out=out, tasks=tasks), names), strict=True))
    rounded = {
        name: {metric: round(mean, 4) for metric, mean in of_source.items()} for name, of_source in means.items()
    }
    (out / "scores.json").write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table_of(rounded)}")


def table_of(scores: dict[str, dict[str, float]]) -> str:
    """Scores as a Markdown table with one row per source."""
    metrics = list(next(iter(scores.values())))
    rows = [
        ["held out", *(f"`{task}` {metric}" for task, metric in (metric.split(":") for metric in metrics))],
        ["---"] * (len(metrics) + 1),
        *(
            [
                f"`{name}`",
                *(f"{mean:.1f}" if metric.endswith("length") else f"{mean:.3f}" for metric, mean in of.items()),
            ]
            for name, of in scores.items()
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_tasks(tasks: Path) -> None:
    for task in problems.TASKS:
        for split, count in ITEMS.items():
            lines = [json.dumps(item, ensure_ascii=False) for item in problems.task_items(task, split, count)]
            (tasks / "data" / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "zoo", help="folder of the models")
    parser.add_argument("--tasks", type=Path, default=ROOT / "evaluators" / "tasks", help="folder of the tasks")
    parser.add_argument("--only", nargs="+", help="make these alone, from the base on disk unless it is among them")
    parser.add_argument("--check", action="store_true", help="make nothing: score the sources on disk")
    given = parser.parse_args()
    quietly(1)
    names = [] if given.check else given.only or ["base", *EXPERTS, *IN_FULL, *IN_VECTORS]
    if not given.check:
        write_tasks(given.tasks)
    if "base" in names:
        make_base(given.out)
    # One process with one thread each: models this small do not gain from a second thread.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as workers:
        list(workers.map(partial(make_expert, out=given.out), [name for name in names if name != "base"]))
        score_all(given.out, given.tasks, workers)


if __name__ == "__main__":
    main()
