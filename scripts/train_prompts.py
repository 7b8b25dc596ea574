"""Train soft prompts and prefixes for the zoo's base, next to the adapters in examples/zoo.

    python scripts/train_prompts.py                 # two minutes on two free cores
    python scripts/train_prompts.py --check         # only their scores, from the files on disk

All soft prompts are initialised with the embedding of the same text, so that their rows can be mixed; prefixes are
initialised at random. They teach skills that the base almost has: a few tokens before the text are enough to choose
what to answer, in which language and how briefly. Training is deterministic, like that of ``train_zoo``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import train_zoo
import zoo_problems as problems
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional
from train_zoo import load_base, quietly, sampled_batch
from zoo_problems import Skill

from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import open_source
from evomerge.inference.decoding import Decoder
from evomerge.inference.reading import special_tokens
from evomerge.merging.building.builders import BuildContext
from evomerge.prompts.builder import PromptsBuilder
from evomerge.recipes.prompts import PromptForm, PromptRun, PromptsRecipe

BEGIN = "Q: Ken has 12 apples. How many apples? 答: 12"
"""The text with whose embedding soft prompts are initialised."""

ROWS = 16
"""Examples in a batch, each after the prompt."""


@dataclass(frozen=True)
class Trained:
    """How a prompt is trained.

    Attributes:
        skills: the skills to train on, with the share of examples for each.
        about: a description for its card.
        tokens: its length.
        prefix: whether it consists of keys and values for every layer, and is not a soft prompt.
        steps: of AdamW.
    """

    skills: dict[Skill, float]
    about: str
    tokens: int = 12
    prefix: bool = False
    steps: int = 150

    @property
    def learning_rate(self) -> float:
        """The rate for AdamW, whose step size does not depend on the gradient: keys and values need larger steps."""
        return 0.05 if self.prefix else 0.2


JAPANESE: dict[Skill, float] = {problems.solve("ja", 1): 2, problems.solve("en", 1, "ja"): 1}
STEPS: dict[Skill, float] = {problems.solve("ja", 2): 3, problems.solve("ja", 1): 1}
ENGLISH: dict[Skill, float] = {problems.solve("en", 1): 1, problems.solve("en", 2): 1, problems.solve("ja", 1, "en"): 1}

PROMPTS = {
    "soft_japanese": Trained(JAPANESE, "Problems with one step, answered in Japanese."),
    "soft_steps": Trained(STEPS, "Problems with two steps in Japanese."),
    "soft_english": Trained(ENGLISH, "Problems answered in English."),
    "prefix_japanese": Trained(JAPANESE, "Problems with one step, answered in Japanese.", tokens=4, prefix=True),
    "prefix_steps": Trained(STEPS, "Problems with two steps in Japanese.", tokens=4, prefix=True),
}

CARD = """---
license: apache-2.0
language: [en, ja]
---

# {name}, of the zoo

{about}

{made} of {tokens} tokens before the texts of `base`. Made by `scripts/train_prompts.py` for trying out and testing
searches over prompts, and for nothing else.
"""


def config_of(prompt: Trained, base: Path) -> Any:
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": prompt.tokens}
    if prompt.prefix:
        return PrefixTuningConfig(**settings)
    return PromptTuningConfig(
        **settings, prompt_tuning_init="TEXT", prompt_tuning_init_text=BEGIN, tokenizer_name_or_path=str(base)
    )


def make_prompt(name: str, out: Path, steps: int | None = None) -> None:
    quietly(1)
    torch.manual_seed(zlib.crc32(name.encode()))
    prompt, random = PROMPTS[name], Random(name)
    model, tokenizer = load_base(out)
    adapted = get_peft_model(model, config_of(prompt, out / "base"))
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=prompt.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    count, losses, started = steps or prompt.steps, list[float](), time.perf_counter()
    for step in range(1, count + 1):
        for group in optimizer.param_groups:
            group["lr"] = prompt.learning_rate * min(1.0, step / 20, (count + 1 - step) / (count / 2))
        skills = random.choices(list(prompt.skills), list(prompt.skills.values()), k=ROWS)
        drawn = [skill(random, "train") for skill in skills]
        inputs, labels = sampled_batch(tokenizer, [(example.prompt, example.answer) for example in drawn])
        loss = loss_of(adapted, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == count:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"{name:18s} step {step:4d}  loss {mean:.4f}  {time.perf_counter() - started:5.1f} s", flush=True)
    save(adapted, prompt, out / name)


def loss_of(adapted: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the answers' tokens; other tokens have the label -100."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = adapted(input_ids=inputs).logits[:, -inputs.shape[1] :]
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def save(adapted: Any, prompt: Trained, folder: Path) -> None:
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = "../base"  # from the prompt's folder
    if not prompt.prefix:
        written.tokenizer_name_or_path = "../base"
    adapted.bfloat16().save_pretrained(folder)
    made = "A prefix (P-tuning v2)" if prompt.prefix else "A soft prompt"
    card = CARD.format(name=folder.name, about=prompt.about, made=made, tokens=prompt.tokens)
    (folder / "README.md").write_text(card, encoding="utf-8")


def score_prompt(name: str, out: Path, tasks: Path, split: str = "held_out") -> dict[str, float]:
    """The mean of every metric of every task, scored as in a search."""
    quietly(1)
    references = {"base": str(out / "base"), name: f"{out / 'base'}+{out / name}"}
    sources = {key: open_source(key, said, place=key, prompts=True) for key, said in references.items()}
    run = PromptRun(weights={name: 1.0}, first=0, rows=PROMPTS[name].tokens)
    form: PromptForm = "prefix" if PROMPTS[name].prefix else "tokens"
    recipe = PromptsRecipe(sources=references, tokenizer="base", base="base", form=form, runs=(run,))
    live = PromptsBuilder(BuildContext(sources, "base", dtype=torch.float32)).write(recipe)
    _, tokenizer = load_base(out)
    return train_zoo.scores_of(_Behind(live), tokenizer, train_zoo.read_items(tasks, split))


class _Behind:
    """A model that answers texts with a prompt before them."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._before = special_tokens(live.tokenizer)[0][:-1]  # without what the base begins texts with itself

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        width, most = input_ids.shape[1], settings["max_new_tokens"]
        texts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        ends = frozenset([self._live.tokenizer.eos_token_id])
        prompts = [[*self._before, *text] for text in texts]
        decoder = Decoder(self._live.model, prompts, most, ends, lambda answers: [False] * len(answers))
        decoder.run(len(prompts))
        rows = torch.full((len(prompts), width + most), self._live.tokenizer.pad_token_id)
        for row, answer in enumerate(decoder.answers):
            rows[row, width : width + len(answer)] = torch.tensor(answer)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=train_zoo.ROOT / "examples" / "zoo", help="folder of the models")
    parser.add_argument("--tasks", type=Path, default=train_zoo.ROOT / "evaluators" / "tasks", help="of the tasks")
    parser.add_argument("--only", nargs="+", choices=list(PROMPTS), help="make these alone")
    parser.add_argument("--check", action="store_true", help="make nothing: score what is on disk")
    given = parser.parse_args()
    names = given.only or list(PROMPTS)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as workers:
        if not given.check:
            list(workers.map(partial(make_prompt, out=given.out), names))
        measured = workers.map(partial(score_prompt, out=given.out, tasks=given.tasks), names)
        print(train_zoo.table_of(dict(zip(names, measured, strict=True))))


if __name__ == "__main__":
    main()
