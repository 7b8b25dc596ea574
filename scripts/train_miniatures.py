"""Train the three miniature models of examples/miniatures, and write the tasks that measure them.

    python scripts/train_miniatures.py            # minutes on two cores
    python scripts/train_miniatures.py --vision   # the vision miniature, from the maths expert on disk
    python scripts/train_miniatures.py --check    # only the table, from the models on disk

They are small enough to ship and to search over on a laptop, and they behave like large fine-tunes of one base: the
maths expert calculates well and answers in English whatever the language of the question, the Japanese expert answers
in Japanese and calculates little better than the base, and a merge of both can do what neither can. They can be merged
because of the following:

- the base is trained on both languages and all skills together, so that the experts share its circuits, and training
  stops while it is mediocre at sums, so that there is something left to learn;
- the experts learn slowly, and their embeddings are frozen. The embedding table is tied to the head, so learning to
  answer in English would lower the logits of all Japanese words, and a merge would produce broken Japanese;
- the maths expert sees few Japanese questions. They teach it to answer in English; with more of them, that habit would
  be so strong that the share of the Japanese expert that undoes it would also destroy the sums;
- the Japanese expert is trained briefly. With more steps it would learn sums as well, but in a way that does not
  combine with the maths expert's.

Training is deterministic: seeds, thread count and algorithms are fixed, so a machine makes the same bits every time.
Another CPU may round differently and then makes other models. To keep these similar, training of the base ends at a
given accuracy, not at a given step. It takes six minutes on two free cores; on cores shared with other work, set
OMP_WAIT_POLICY=passive, or its two threads spend most of their time waiting for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import miniature_problems as problems
import picture_problems
import picture_tower
import small_models
import torch
from miniature_problems import Skill
from small_models import answer_logits, bpe_tokenizer, new_model, packed
from torch.nn import functional
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging

ROOT = Path(__file__).parent.parent

# A skill is drawn in proportion to how often it is listed here.
BASE_SKILLS: list[Skill] = [
    problems.symbolic, problems.solve_en, problems.solve_ja, problems.expression_ja, problems.translate,
]  # fmt: skip
MATHS_SKILLS: list[Skill] = [
    *[problems.solve_en] * 6, *[problems.symbolic] * 6, problems.solve_ja_in_english, problems.translate_into_english,
]  # fmt: skip
JAPANESE_SKILLS: list[Skill] = [
    *[problems.solve_ja] * 2, *[problems.solve_en_in_japanese] * 2, problems.expression_ja, problems.translate,
]  # fmt: skip

ITEMS_PER_SPLIT = 500

# Tokens in a row of a training batch: the longest story and its answer fit.
ROW = 64
ROWS = 24

Weights = dict[str, torch.Tensor]


# ---- tokenizer ----


# Words are cut before merging, so that no token spans two scripts: names, particles and verbs stay apart.
WORDS = r"\d| ?[A-Za-z]+| ?[ァ-ヴー]+|[ぁ-ん]+|[一-龥]+| ?[^\sA-Za-z\dァ-ヴーぁ-ん一-龥]|\s"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Each digit is a token, so that carrying can be learned."""
    random = Random("tokenizer")
    skills = dict.fromkeys(BASE_SKILLS + MATHS_SKILLS + JAPANESE_SKILLS)
    drawn = [skill(random) for _ in range(4000) for skill in skills]
    return bpe_tokenizer(WORDS, [example.prompt + example.answer for example in drawn])


# ---- training ----


def batch_of(
    skills: Sequence[Skill], random: Random, tokenizer: PreTrainedTokenizerFast, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a batch, as from ``packed``; skills are drawn in proportion to how often they are listed."""
    return packed(lambda: random.choice(skills)(random), tokenizer, rows, ROW)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    skills: Sequence[Skill],
    *,
    name: str,
    steps: int,
    learning_rate: float,
    decay: int = 1,
    until: float = 1.0,
) -> LlamaForCausalLM:
    """Train in place: a short warm-up, a constant rate, and a decay to zero over the last ``decay`` steps.

    With ``until``, training ends when this share of Japanese problems is solved, and slows down before that. A model
    learns sums suddenly, rounding can shift the step at which it does by hundreds, and a decaying rate speeds it up, so
    no fixed number of steps reliably gives a mediocre model.
    """
    random = Random(name)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    losses = []
    started = time.perf_counter()
    solved = 0.0
    for step in range(1, steps + 1):
        scale = min(1.0, step / 50, (steps + 1 - step) / decay, max(0.1, 1 - solved / until))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        inputs, labels = batch_of(skills, random, tokenizer, ROWS)
        loss = functional.cross_entropy(*answer_logits(model, inputs, labels))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if until < 1.0 and step % 25 == 0 and step >= 500:
            solved = share_solved(model, tokenizer)
        if step % 200 == 0 or step == steps or solved >= until:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"{name:9s} step {step:5d}  loss {mean:.4f}  {time.perf_counter() - started:6.1f} s", flush=True)
        if solved >= until:
            break
    # Experts start from the base as it is shipped (rounded), so that task vectors contain only what they have learned.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


# ---- measuring ----


answers_of = partial(small_models.answers_of, new_tokens=32, batch_size=250)


def share_solved(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of Japanese problems of the training split that are answered right, word for word."""
    random = Random("share solved")
    examples = [problems.solve_ja(random) for _ in range(250)]
    answers = answers_of(model, tokenizer, [example.prompt for example in examples])
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(examples)


def scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Path,
    split: str = "held_out",
    names: Sequence[str] = tuple(problems.TASKS),
) -> dict[str, float]:
    """The mean of every metric of every task."""
    # With the tasks' own scorers, so that this table and a search agree on what is right.
    sys.path.insert(0, str(tasks))
    import miniatures

    scorers = {
        "mini_math_ja": miniatures.score_math_ja,
        "mini_math_en": miniatures.score_math_en,
        "mini_translate_ja": miniatures.score_translation,
    }
    means: dict[str, float] = {}
    for task in names:
        lines = (tasks / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        answers = answers_of(model, tokenizer, [item["prompt"] for item in items])
        grades = [scorers[task](item, [answer]) for item, answer in zip(items, answers, strict=True)]
        for metric in grades[0]:
            means[f"{task}:{metric}"] = sum(one[metric] for one in grades) / len(grades)
    return means


def merged(base: Weights, experts: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """Task arithmetic: the base plus a weighted sum of task vectors."""
    return {
        name: tensor + sum(weight * (expert[name] - tensor) for weight, expert in zip(weights, experts, strict=True))
        for name, tensor in base.items()
    }


def float_weights(model: LlamaForCausalLM) -> Weights:
    return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def print_table(out: Path, tasks: Path, split: str = "held_out") -> None:
    """Each model, and merges over a grid of two weights, on every task."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    loaded = {
        name: LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        for name in ("base", "maths", "japanese")
    }
    base, maths, japanese = (float_weights(model) for model in loaded.values())
    rows: list[tuple[str, Weights]] = [("base", base), ("maths", maths), ("japanese", japanese)]
    pairs = [
        (0.3, 0.3), (0.5, 0.5), (1.0, 1.0),  # the uniform average of the sources, and defaults of merge methods
        (0.4, 0.8), (0.5, 0.8), (0.6, 0.8), (0.6, 1.0), (0.7, 0.8), (0.7, 1.0), (0.8, 1.0), (0.8, 1.2), (0.9, 1.2),
        (1.0, 1.3),
    ]  # fmt: skip
    for m, j in pairs:
        rows.append((f"{m:.1f} maths + {j:.1f} japanese", merged(base, [maths, japanese], [m, j])))
    print(f"\n{split:28s} math_ja:acc_ja  math_ja:acc  math_en:acc  translate_ja:acc")
    model = loaded["base"]
    for name, weights in rows:
        model.load_state_dict(weights)
        means = scores(model, tokenizer, tasks, split)
        columns = ("mini_math_ja:acc_ja", "mini_math_ja:acc", "mini_math_en:acc", "mini_translate_ja:acc")
        print(f"{name:28s} " + "  ".join(f"{means[column]:12.1%}" for column in columns), flush=True)


# ---- writing ----


CARD = """---
license: apache-2.0
language: [en, ja]
library_name: transformers
---

# Miniature {name}

{about}

A Llama of {parameters:,} parameters (6 layers of width 128, tied embeddings, bf16), trained from scratch on word
problems by template with `scripts/train_miniatures.py`. It is made for trying out and testing searches over merges on a
laptop, and for nothing else: it knows no word outside its templates.
"""

VISION_CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: image-text-to-text
---

# Miniature vision

A LLaVA of {parameters:,} parameters (bf16): the language model of `maths`, which answers in English, with a vision
tower that reads picture problems of 60 by 60 pixels as 25 tokens each. Trained with
`scripts/train_miniatures.py --vision`. It is made for trying out and testing searches over merges on a laptop, and for
nothing else: it has seen no other pictures.
"""

ABOUT = {
    "base": "The common ancestor of `maths` and `japanese`: it has met every skill in both languages and is mediocre at"
    " sums.",
    "maths": "An expert in word problems in English, trained from `base`. It answers Japanese problems in English.",
    "japanese": "An expert in Japanese, trained from `base`: it translates, and answers in Japanese, but is not"
    " much better at sums than `base`.",
}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A plain Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # A copy: the float weights go on to be trained from.
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    # Padding a batch leaves its settings in the tokenizer; they would be saved with it.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = CARD.format(name=folder.name, about=ABOUT[folder.name], parameters=parameters)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_tasks(tasks: Path) -> None:
    (tasks / "data").mkdir(parents=True, exist_ok=True)
    for task in problems.TASKS:
        for split in ("search", "held_out"):
            lines = [json.dumps(item, ensure_ascii=False) for item in problems.task_items(task, split, ITEMS_PER_SPLIT)]
            (tasks / "data" / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_vision(out: Path) -> None:
    """Train a vision tower for the maths expert on disk."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    processor = picture_tower.processor_of(tokenizer)
    language = LlamaForCausalLM.from_pretrained(out / "maths", dtype=torch.float32)
    model = picture_tower.new_vision_model(language, processor)
    picture_tower.train_tower(model, processor)
    folder = out / "vision"
    picture_tower.save_vision_model(model, processor, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / "README.md").write_text(VISION_CARD.format(parameters=parameters), encoding="utf-8")


def print_picture_table(out: Path, tasks: Path, split: picture_problems.Split = "held_out") -> None:
    """Print the picture scores of the vision miniature and of merges of its text model with the Japanese expert."""
    sys.path.insert(0, str(tasks))
    import miniatures

    processor = AutoProcessor.from_pretrained(out / "vision")
    model = LlavaForConditionalGeneration.from_pretrained(out / "vision", dtype=torch.float32).eval()
    base, maths, japanese = (
        float_weights(LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32))
        for name in ("base", "maths", "japanese")
    )
    scenes = picture_problems.different_scenes(split, ITEMS_PER_SPLIT)
    print(f"\n{split:28s} picture_ja:acc_ja  picture_ja:acc  picture_en:acc")
    for m, j in [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.7, 0.8), (0.8, 1.0)]:
        picture_tower.set_language(model, merged(base, [maths, japanese], [m, j]))
        means = []
        for language, metrics in (("ja", ("acc_ja", "acc")), ("en", ("acc",))):
            answers = picture_tower.picture_answers(model, processor, scenes, language)
            grade = miniatures.score_math_ja if language == "ja" else miniatures.score_math_en
            grades = [grade({"number": scene.result}, [answer]) for scene, answer in zip(scenes, answers, strict=True)]
            means += [sum(one[metric] for one in grades) / len(grades) for metric in metrics]
        name = f"{m:.1f} maths + {j:.1f} japanese"
        print(f"{name:28s} " + "  ".join(f"{mean:14.1%}" for mean in means), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "miniatures", help="folder of the models")
    parser.add_argument("--tasks", type=Path, default=ROOT / "evaluators" / "tasks", help="folder of the tasks")
    parser.add_argument("--vision", action="store_true", help="train the miniature that sees, and nothing else")
    parser.add_argument("--check", action="store_true", help="train nothing: print the table from the models on disk")
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1 if arguments.vision else 2)  # so small a tower does not gain from a second
    torch.use_deterministic_algorithms(True)

    if arguments.vision:
        picture_problems.write_picture_tasks(arguments.tasks / "data", ITEMS_PER_SPLIT)
        if not arguments.check:
            train_vision(arguments.out)
        print_picture_table(arguments.out, arguments.tasks)
        return
    if not arguments.check:
        write_tasks(arguments.tasks)
        tokenizer = train_tokenizer()
        model = new_model(tokenizer)
        train(model, tokenizer, BASE_SKILLS, name="base", steps=4000, learning_rate=1e-3, until=0.2)
        save(model, tokenizer, arguments.out / "base")
        base = float_weights(model)
        model.model.embed_tokens.requires_grad_(False)
        train(model, tokenizer, MATHS_SKILLS, name="maths", steps=1800, learning_rate=3e-4, decay=500)
        save(model, tokenizer, arguments.out / "maths")
        model.load_state_dict(base)
        train(model, tokenizer, JAPANESE_SKILLS, name="japanese", steps=150, learning_rate=1e-4, decay=50)
        save(model, tokenizer, arguments.out / "japanese")
    print_table(arguments.out, arguments.tasks)


if __name__ == "__main__":
    main()
