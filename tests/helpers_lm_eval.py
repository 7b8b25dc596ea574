"""A tiny random Llama, a tokenizer of bytes, and small tasks written as files, for the tests of the evaluators."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.checkpoints.live import LiveModel, for_scoring


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after <pad>, <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def tiny_live(seed: int = 0, context: int = 512, vocabulary: int = 259) -> LiveModel:
    """A random Llama with weights large enough that its answers differ from prompt to prompt."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = for_scoring(LlamaForCausalLM(config))
    torch.set_rng_state(torch_state)
    return LiveModel(model, byte_tokenizer())


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, text: str, **splits: Sequence[Mapping[str, Any]]) -> Path:
    """Write a task file and its data; ``text`` is its YAML but for name, data and split names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in splits.items():
        files[split] = folder / f"{name}.{split}.jsonl"
        write_lines(files[split], rows)
    data = json.dumps({split: str(file) for split, file in files.items()})
    roles = "".join(f"{role}_split: {role}\n" for role in ("training", "validation", "test") if role in splits)
    file = folder / f"{name}.yaml"
    head = f"task: {name}\nmetadata: {{version: 1}}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
    file.write_text(head + roles + text)
    return file


def questions(split: str, count: int) -> list[dict[str, Any]]:
    """Sums, with four choices of which one is right; prompts of different lengths."""
    offset = {"training": 0, "validation": 100, "test": 200}[split]
    rows = []
    for number in range(offset, offset + count):
        right = number * 7 % 13 + number
        rows.append(
            {
                "question": f"{'so ' * (number % 5)}what is {number * 7 % 13} + {number}?",
                "answer": str(right),
                "choices": [str(right + step) for step in (-1, 0, 1, 2)],
                "gold": 1,
            }
        )
    return rows


GENERATE = """\
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", "e", "</s>"]
  max_gen_toks: 8
"""

CHOOSE = """\
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""

LIKELIHOOD = """\
output_type: loglikelihood
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: " {{answer}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""

COUNTS = """\
process_results: !function counting.count
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
  - metric: sum_of_codes
    aggregation: mean
    higher_is_better: false
"""

COUNTING_CODE = """\
def count(doc, results):
    return {"letters": len(results[0]), "sum_of_codes": sum(map(ord, results[0])) % 97 / 97}
"""


def write_all(folder: Path, count: int = 12) -> None:
    """One task of each kind, whose scores differ from item to item under a random model."""
    splits = {split: questions(split, count) for split in ("training", "validation", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counting.py").write_text(COUNTING_CODE)
    write_task(folder, "generate", GENERATE + COUNTS, **splits)
    for sampler in ("default", "first_n"):
        shots = f"num_fewshot: 2\nfewshot_split: training\nfewshot_config: {{sampler: {sampler}}}\n"
        write_task(folder, f"generate_{sampler}", GENERATE + COUNTS + shots, **splits)
        write_task(folder, f"choose_{sampler}", CHOOSE + shots, **splits)
        write_task(folder, f"likelihood_{sampler}", LIKELIHOOD + shots, **splits)
    write_task(folder, "choose", CHOOSE, **splits)
    write_task(folder, "rolling", ROLLING, **splits)
