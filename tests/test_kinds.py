"""Models of other kinds are refused by what they are, whatever their folders lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers_checkpoints import edit_json, save_model, tiny_config
from test_architectures import GROUPED, SMALL

from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError


def mllama() -> Any:
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 28,
        "attention_heads": 2, "patch_size": 14, "vision_output_dim": 32, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {**GROUPED, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(text_config=text, vision_config=tower)
    return transformers.MllamaForConditionalGeneration(config)


def speech() -> Any:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = transformers.Qwen2AudioConfig(text_config={**GROUPED, "model_type": "qwen2"}, audio_config=audio)
    return transformers.Qwen2AudioForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


KINDS: dict[str, tuple[Any, str]] = {
    "layers that look at images": (mllama, "a mllama, whose layers read images by cross-attention"),
    "speech before text": (speech, r"Qwen2AudioForConditionalGeneration, which takes more than text in \(audio\)"),
    "a classifier": (lambda: transformers.LlamaForSequenceClassification(tiny_config()), "a classifier"),
    "labels for words": (lambda: transformers.LlamaForTokenClassification(tiny_config()), "a classifier"),
    "answers from a text": (lambda: transformers.LlamaForQuestionAnswering(tiny_config()), "a classifier"),
    "without a head": (lambda: transformers.LlamaModel(tiny_config()), "LlamaModel, a model without a head"),
    "an encoder with a decoder": (t5, "T5ForConditionalGeneration, an encoder with a decoder"),
    "masked words": (bert, "BertForMaskedLM, which fills in words that are masked"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    make, said = KINDS[kind]
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=said) as refused:
        open_source("x", str(tmp_path / "model"), place="sources.x")
    assert "not supported" in refused.value.problem


@pytest.mark.parametrize("architectures", [None, [], ["LLaMAForCausalLM"], ["LlamaModel"]])
def test_a_language_model_is_let_in_whatever_its_class_is_called(architectures: Any, tmp_path: Path) -> None:
    folder = save_model(tiny_config(), tmp_path / "model")
    edit_json(folder / "config.json", architectures=architectures, vision_config=None, is_encoder_decoder=False)
    assert open_source("x", str(folder), place="x").layers == 2
