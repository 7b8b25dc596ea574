"""The zoo's soft prompts and prefixes are what the example takes them for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.checkpoints.source import Source, open_source
from evomerge.inference.decoding import Decoder
from evomerge.inference.reading import encode
from evomerge.merging.building.builders import BuildContext
from evomerge.prompts.builder import PromptsBuilder
from evomerge.recipes.prompts import PromptRun, PromptsRecipe

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "examples" / "zoo"

sys.path.insert(0, str(ROOT / "scripts"))
import train_prompts  # noqa: E402
import zoo_problems as problems  # noqa: E402


def opened(name: str) -> Source:
    return open_source(name, f"{ZOO / 'base'}+{ZOO / name}", place=name, prompts=True)


@pytest.mark.parametrize("name", train_prompts.PROMPTS)
def test_a_prompt_is_small_and_of_the_base(name: str) -> None:
    assert sum(file.stat().st_size for file in (ZOO / name).iterdir()) <= 16_000
    source, made = opened(name), train_prompts.PROMPTS[name]
    assert source.warnings == ()
    assert source.prompt is not None
    facts = source.prompt.facts
    assert (facts.form, facts.rows) == ("prefix" if made.prefix else "tokens", made.tokens)
    assert facts.start == (None if made.prefix else train_prompts.BEGIN)


def test_the_example_names_every_soft_prompt() -> None:
    sources = yaml.safe_load((ROOT / "examples" / "prompts.yaml").read_text())["sources"]
    soft = {name for name, made in train_prompts.PROMPTS.items() if not made.prefix}
    assert {Path(reference).name for reference in sources.values()} == {"base", *soft}


@pytest.mark.nightly
def test_new_tokens_are_never_said_to_the_tasks() -> None:
    sources = {"base": open_source("base", str(ZOO / "base"), place="base")}
    sources |= {name: opened(name) for name in ("soft_japanese", "soft_english")}
    runs = tuple(PromptRun(weights={name: 1.0}, first=0, rows=12) for name in ("soft_japanese", "soft_english"))
    references = {name: source.reference for name, source in sources.items()}
    recipe = PromptsRecipe(sources=references, tokenizer="base", base="base", form="tokens", runs=runs)
    live = PromptsBuilder(BuildContext(sources, "base")).write(recipe)
    tasks = ROOT / "evaluators" / "tasks" / "data"
    items = [
        json.loads(line)["prompt"]
        for task in problems.TASKS
        for line in (tasks / f"{task}.held_out.jsonl").read_text("utf-8").splitlines()[:100]
    ]
    assert len(items) == 500
    texts = [encode(live.tokenizer, item) for item in items]
    decoder = Decoder(live.model, texts, 24, frozenset(), lambda answers: [False] * len(answers))
    decoder.run(250)
    known = len(live.tokenizer) - recipe.rows
    said = {token for answer in decoder.answers for token in answer}
    assert len(said) > 20
    assert max(said) < known


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["soft_steps", "prefix_japanese"])
def test_training_again_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    made = []
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "base").symlink_to(ZOO / "base")
        train_prompts.make_prompt(name, tmp_path / attempt, steps=3)
        files = (tmp_path / attempt / name).iterdir()
        made.append({file.name: file.read_bytes().replace(attempt.encode(), b"") for file in files})
    assert made[0] == made[1]
