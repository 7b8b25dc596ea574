"""The models that are merged: families of a base and its fine-tunes, small, random, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils.logging import disable_progress_bar

# Odd widths, so that some rows and tensors have an odd number of elements.
_SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 48, "intermediate_size": 67, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_TEXTS = {
    "plain": "a model that reads this text learns to write more of it and the more it reads the better it writes",
    "other": "der Wanderer geht durch den Wald und der Wald wird dunkler je weiter der Wanderer geht und geht",
}
_CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
_OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def make_models(root: Path) -> None:
    """Write every model that the cases name, as ``root/family/model``."""
    disable_progress_bar()
    plain = _tokenizer("plain", 259)
    _family(root / "plain", LlamaConfig(**_SHAPE, tie_word_embeddings=False), plain, seed=1)
    _family(root / "tied", LlamaConfig(**_SHAPE, tie_word_embeddings=True), plain, seed=2)
    # Qwen2's tokenizer adds a token of its own.
    _family(root / "biased", Qwen2Config(**_SHAPE | {"vocab_size": 264}, tie_word_embeddings=False), plain, seed=3)
    # Large enough for the statistics of random methods, and of an even width, for which they have another code path.
    wide = LlamaConfig(**_SHAPE | {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3})
    _family(root / "wide", wide, plain, seed=4)
    deep = LlamaConfig(**_SHAPE | {"num_hidden_layers": 6}, tie_word_embeddings=False)
    _save(_random_model(deep, seed=5), plain, root / "plain/deep")
    _save(_random_model(LlamaConfig(**_SHAPE, tie_word_embeddings=False), seed=7), plain, root / "plain/unrelated")
    _adapter(root / "plain/base", root / "plain/adapter", seed=6)
    _vocabularies(root / "vocabulary")


def _family(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """A base and three fine-tunes, whose task vectors differ in size, mean and sparsity."""
    base = _random_model(config, seed)
    _save(base, tokenizer, folder / "base")
    for number, (name, size, mean, changed) in enumerate(
        [("one", 0.01, 0.3, 1.0), ("two", 0.02, -0.2, 0.7), ("three", 0.015, 0.1, 0.4)]
    ):
        tuned = _tuned(base, 100 * seed + number, size, mean, changed)
        _save(tuned, tokenizer, folder / name)


def _random_model(config: Any, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _tuned(base: PreTrainedModel, seed: int, size: float, mean: float, changed: float) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    tuned = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            delta = size * (torch.randn(parameter.shape, generator=generator) + mean)
            parameter.add_(delta * (torch.rand(parameter.shape, generator=generator) < changed))
    return tuned


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _adapter(base: Path, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        base_model_name_or_path=str(base),
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(str(folder))


def _vocabularies(folder: Path) -> None:
    """Models with different tokens, ids, extra rows and chat templates."""
    for seed, (name, text, size, rows, added, template) in enumerate(
        [
            ("base", "plain", 270, 270, [], None),
            ("tuned", "plain", 270, 272, ["<|call|>", "<|end|>"], _CHATML),
            ("other", "other", 280, 280, [], _OTHER),
            ("padded", "plain", 270, 288, [], _CHATML),
        ]
    ):
        tokenizer = _tokenizer(text, size, added, template)
        config = LlamaConfig(**_SHAPE | {"vocab_size": rows, "num_hidden_layers": 2}, tie_word_embeddings=False)
        _save(_random_model(config, 50 + seed), tokenizer, folder / name)


def _tokenizer(text: str, size: int, added: Sequence[str] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on one sentence."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([_TEXTS[text]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(list(added))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
