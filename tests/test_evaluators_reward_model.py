"""Rewards of answers: as plain transformers computes them, in any batch and with any padding; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from evaluators import evaluator_settings
from evaluators.base import MODEL, EvaluatorSettings
from evaluators.reward_model import RewardModelSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.transformers_engine import generate
from evomerge.testing.evaluators import HARMLESS, EvaluatorContract
from evomerge.testing.models import byte_tokenizer, tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
ITEMS = [{"prompt": f"{'so ' * (n % 5)}what is {n} + {n * n}?"} for n in range(16)]
SHAPE: dict[str, Any] = {"max_new_tokens": 12, "stop": ("e",), "batch_size": 5}


def judge(folder: Path, pad: int | None = 0, labels: int = 1, chat: str | None = None, context: int = 512) -> Path:
    """A random reward model whose rewards differ from text to text."""
    state = torch.get_rng_state()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
        pad_token_id=pad, num_labels=labels,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    torch.set_rng_state(state)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def items(folder: Path, found: Sequence[Any] = ITEMS, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(item) + "\n" for item in found))
    return path


def settings_of(folder: Path, **changes: Any) -> RewardModelSettings:
    return RewardModelSettings(**{"file": items(folder), "model": str(folder / "judge"), **SHAPE, **changes})


def plain(folder: Path, text: str, special: bool = True) -> float:
    """A text's reward as anybody would compute it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        given = tokenizer(text, return_tensors="pt", add_special_tokens=special)
        return float(model(input_ids=given.input_ids, attention_mask=given.attention_mask).logits[0, 0])


def refusal(settings: EvaluatorSettings) -> str:
    with pytest.raises(InputError) as caught:
        settings.build()
    return str(caught.value)


class TestContract(EvaluatorContract):
    harmless = HARMLESS | {"answer"}  # no right answer is asked for where no examples are

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        judge(tmp_path / "judge")
        return settings_of(tmp_path)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


@pytest.mark.parametrize("pad", [0, 2, 100, None])
@pytest.mark.parametrize("template", [None, "Q: {prompt} A: {answer}</s>"])
def test_it_is_the_logit_of_plain_transformers(tmp_path: Path, pad: int | None, template: str | None) -> None:
    """Also where padding is the end token, a letter of the texts ("a"), or there is none."""
    folder = judge(tmp_path / "judge", pad)
    evaluator = settings_of(tmp_path, template=template).build()
    found = score(evaluator, tiny_live(), "search", range(len(evaluator.items("search")))).scores["reward"]
    prompts = [item.prompt for item in evaluator._questions["search"]]
    answers = generate(tiny_live(), prompts, 12, ["e"], 5)
    texts = [(template or "{prompt}{answer}").format(prompt=p, answer=a) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(found, [plain(folder, text) for text in texts], rtol=1e-4, atol=1e-5)
    assert len(set(found)) == len(found)


def test_the_chat_template_puts_them_together(tmp_path: Path) -> None:
    folder = judge(tmp_path / "judge", chat=CHAT)
    evaluator = settings_of(tmp_path).build()
    found = score(evaluator, tiny_live(), "search", [0, 1]).scores["reward"]
    for item, reward in zip(evaluator._questions["search"], found, strict=False):
        (answer,) = generate(tiny_live(), [item.prompt], 12, ["e"], 5)
        text = f"<s>user: {item.prompt}</s><s>assistant: {answer}</s>"
        assert reward == pytest.approx(plain(folder, text, special=False), abs=1e-5)


@pytest.mark.parametrize("pad", [0, None])
def test_batches_move_nothing(tmp_path: Path, pad: int | None) -> None:
    judge(tmp_path / "judge", pad)
    whole = range(len(settings_of(tmp_path).build().items("search")))
    one, many = (
        score(settings_of(tmp_path, batch_size=size).build(), tiny_live(), "search", whole).scores["reward"]
        for size in (1, 50)
    )
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)


def test_a_text_too_long_keeps_its_first_token_and_its_end(tmp_path: Path) -> None:
    folder = judge(tmp_path / "judge", context=40)
    long = items(tmp_path, [{"prompt": "x" * 60 + str(n)} for n in range(9)], "long.jsonl")
    evaluator = settings_of(tmp_path, file=long).build()
    live = tiny_live()
    reward = score(evaluator, live, "search", [0]).scores["reward"][0]
    prompt = evaluator._questions["search"][0].prompt
    (answer,) = generate(live, [prompt], 12, ["e"], 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(prompt + answer)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert reward == pytest.approx(float(model(torch.tensor([[ids[0], *ids[-39:]]])).logits[0, 0]), abs=1e-5)


def test_the_version_is_of_the_files_too(tmp_path: Path) -> None:
    folder = judge(tmp_path / "judge")
    first = settings_of(tmp_path).build().version
    assert settings_of(tmp_path, batch_size=2).build().version == first
    assert settings_of(tmp_path, template="{prompt} {answer}").build().version != first
    moved = folder.rename(tmp_path / "moved")
    assert settings_of(tmp_path, model=str(moved)).build().version == first
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    changed = settings_of(tmp_path, model=str(moved)).build().version
    judge(moved, chat=CHAT)
    assert len({first, changed, settings_of(tmp_path, model=str(moved)).build().version}) == 3


def test_models_that_are_none(tmp_path: Path) -> None:
    said = refusal(settings_of(tmp_path, model=str(tmp_path / "nowhere")))
    assert "model: there is no folder" in said
    judge(tmp_path / "judge", labels=2)
    assert "its head has 2 labels; a reward is one number" in refusal(settings_of(tmp_path))
    folder = tmp_path / "judge"
    live = tiny_live()
    live.model.save_pretrained(folder)
    assert "architectures is LlamaForCausalLM, which is not a reward model" in refusal(settings_of(tmp_path))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    judge(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds pickled weights only" in refusal(settings_of(tmp_path))
    config = json.loads((judge(folder) / "config.json").read_text())
    for changes, wanted in (
        ({"auto_map": {"AutoModel": "code.Model"}}, "can make transformers run code"),
        ({"architectures": None}, "architectures is none"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert wanted in refusal(settings_of(tmp_path))
    judge(folder)
    for changes in ({"auto_map": {}}, {"auto_map": {"AutoTokenizer": ["code.T", None]}}):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert "tokenizer_config.json: auto_map asks for code" in refusal(settings_of(tmp_path))


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    """A head that no file holds would be random."""
    live = tiny_live()
    live.model.save_pretrained(judge(tmp_path / "judge"))
    config = tmp_path / "judge" / "config.json"
    content = json.loads(config.read_text()) | {
        "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"},
    }  # fmt: skip
    config.write_text(json.dumps(content))
    evaluator = settings_of(tmp_path).build()
    with pytest.raises(InputError, match=r"model: its files lack the weight score\.weight"):
        score(evaluator, live, "search", [0])


def test_settings() -> None:
    assert evaluator_settings("reward_model", "here") is RewardModelSettings
    assert MODEL in RewardModelSettings.model_fields["model"].metadata
    for template in ("{prompt}", "{answer} {other}", "{"):
        with pytest.raises(ValidationError):
            RewardModelSettings(file=Path("a"), model="b", template=template)
