"""Soft prompts and prefixes as sources, against peft's own reading of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import edit_json, save_model, tiny_config
from helpers_prompts import (
    prompted,
    save_encoded_prompt,
    save_multitask_prompt,
    save_prefix,
    save_prompt,
    save_started_prompt,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.fingerprints import fingerprint
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.report.closeness import shown
from evomerge.report.inspection import inspect_models

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "PROMPT_TUNING": save_prompt,
    "P_TUNING": save_encoded_prompt,
    "MULTITASK_PROMPT_TUNING": save_multitask_prompt,
    "PREFIX_TUNING": save_prefix,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    above = tmp_path_factory.mktemp("prompts")
    return {kind: save(base, above / kind) for kind, save in KINDS.items()}


def opened(base: Path, folder: Path) -> Source:
    return open_source("maths", f"{base}+{folder}", place="sources.maths", prompts=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_peft_gives_the_model(base: Path, folders: dict[str, Path], kind: str) -> None:
    source = opened(base, folders[kind])
    assert source.prompt is not None
    facts, rows = source.prompt.facts, source.prompt.read()
    assert (facts.kind, facts.rows) == (kind, 4)
    reference = prompted(base, folders[kind], torch.float32)
    tasks = torch.tensor([0]) if kind.startswith("MULTITASK") else None
    given = reference.get_prompt(1, tasks)
    if facts.form == "prefix":  # of each layer keys and values, [1, heads, rows, width]
        pairs = [part for layer in given.layers for part in (layer.keys, layer.values)]
        assert given.layers[0].keys.shape == (1, 2, 4, 4)  # heads of keys, not of queries
        given = torch.stack([part[0].transpose(0, 1) for part in pairs], dim=1).flatten(1)[None]
    assert torch.equal(rows, given[0].detach())


def test_how_a_prompt_began_is_known_of_a_text_alone(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    started = opened(base, save_started_prompt(base, tmp_path / "started"))
    assert started.prompt is not None
    assert started.prompt.facts.start == "w1 w2 w3"
    for folder in folders.values():
        prompt = opened(base, folder).prompt
        assert prompt is not None
        assert prompt.facts.start is None


def test_its_files_are_looked_after_and_its_weights_are_the_bases(base: Path, folders: dict[str, Path]) -> None:
    source, alone = opened(base, folders["P_TUNING"]), open_source("base", str(base), place="base")
    assert {Path(file).name for file in fingerprint(source)} >= {CONFIG, WEIGHTS}
    assert all(torch.equal(source.read(name), alone.read(name)) for name in alone.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_wants_weights_is_told(base: Path, folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(InputError, match=r"which changes no weights.*kind: prompts") as caught:
        open_source("maths", f"{base}+{folders[kind]}", place="sources.maths")
    assert caught.value.place == "sources.maths"


def test_inspect_tells_what_it_is(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    started = save_started_prompt(base, tmp_path / "started")
    alone = inspect_models([f"{base}+{started}"], None)
    assert alone.models[0].prompt == "a soft prompt of 4 tokens (PROMPT_TUNING), which began as 'w1 w2 w3'"
    assert shown(alone, 100)
    two = inspect_models([str(base), f"{base}+{folders['PREFIX_TUNING']}"], None)
    assert any("a prefix of keys and values for 4 tokens (PREFIX_TUNING)" in warning for warning in two.warnings)


Harm = Callable[[Path], Any]


def config(**changes: Any) -> Harm:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def harm(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return harm


BAD: dict[str, tuple[str, Harm, str]] = {
    "rows of none": ("PROMPT_TUNING", config(num_virtual_tokens=0), "num_virtual_tokens is 0"),
    "other rows": ("PROMPT_TUNING", config(num_virtual_tokens=5), r"is 5, but .* has shape \[4, 16\]"),
    "other task": ("P_TUNING", config(task_type="SEQ_2_SEQ_LM"), "task_type is 'SEQ_2_SEQ_LM'"),
    "two halves": ("P_TUNING", config(num_transformer_submodules=2), "num_transformer_submodules is 2"),
    "several tasks": ("MULTITASK_PROMPT_TUNING", config(num_tasks=2), "num_tasks is 2, so it is several prompts"),
    "task of another size": (
        "MULTITASK_PROMPT_TUNING", tensors(lambda t: t.update(prefix_task_cols=torch.ones(1, 3, 2))), "not one task's",
    ),
    "no task": ("MULTITASK_PROMPT_TUNING", tensors(lambda t: t.pop("prefix_task_rows")), "holds prefix_task_cols"),
    "other width": (
        "PROMPT_TUNING", tensors(lambda t: t.update(prompt_embeddings=torch.ones(4, 20))), "model has a width of 16",
    ),
    "other tensors": ("PROMPT_TUNING", tensors(lambda t: t.update(more=torch.ones(1))), "holds more, prompt_emb"),
    "integers": (
        "PROMPT_TUNING", tensors(lambda t: t.update(prompt_embeddings=torch.ones(4, 16, dtype=torch.int8))),
        "stored as I8",
    ),
    "other heads": ("PREFIX_TUNING", config(num_attention_heads=4), "for 4 key-value heads .* the model has 2"),
    "other layers": ("PREFIX_TUNING", config(num_layers=3), "for 3 layers .* the model has 2"),
    "other keys": ("PREFIX_TUNING", config(token_dim=16), "for 16 numbers a key .* the model has 8"),
    "rows of other layers": (
        "PREFIX_TUNING", tensors(lambda t: t.update(prompt_embeddings=torch.ones(4, 24))), "rows of 24 numbers",
    ),
    "no weights": ("PREFIX_TUNING", lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_refused(base: Path, folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, harm, words = BAD[case]
    folder = tmp_path / "prompt"
    shutil.copytree(folders[kind], folder)
    opened(base, folder)
    harm(folder)
    with pytest.raises(InputError, match=re.compile(words, re.DOTALL)) as caught:
        opened(base, folder)
    assert caught.value.place == "sources.maths"


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_stands_beside_no_adapter(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=1, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    prompt = folders["PROMPT_TUNING"]
    for names in ((tmp_path / "lora", prompt), (prompt, tmp_path / "lora"), (prompt, prompt)):
        reference = "+".join(map(str, (base, *names)))
        with pytest.raises(InputError, match=r"is given with it.*Name one prompt a source"):
            open_source("maths", reference, place="sources.maths", prompts=True)


def test_nan_is_told(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "prompt"
    shutil.copytree(folders["PROMPT_TUNING"], folder)
    tensors(lambda t: t.update(prompt_embeddings=torch.full((4, 16), torch.nan)))(folder)
    with pytest.raises(InputError, match="NaN or Inf"):
        inspect_models([f"{base}+{folder}"], None)
