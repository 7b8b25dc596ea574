"""Building blocks of the models that ship with the project: a tokenizer, a small Llama, batches, answers.

``train_miniatures`` and ``train_zoo`` determine what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import torch
from miniature_problems import Example
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def bpe_tokenizer(words: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback, which can encode any text.

    Args:
        words: a regular expression for words; no token spans two of its matches.
        texts: to train on.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Bytes are added after training: the trainer would make them special tokens, which decoding leaves out.
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = trained["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [(left, right) for left, right in trained["merges"]]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.4 M parameters with tied embeddings: at this size a second table would not help."""
    config = LlamaConfig(
        # Plain attention: on a CPU in bf16 the fused kernel's backward pass is twice as slow.
        attn_implementation="eager",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def packed(
    draw: Callable[[], Example], tokenizer: PreTrainedTokenizerFast, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, int64 [rows, length]. The loss covers answers only: learning prompts would use up capacity.

    Each row has as many examples as fit: a sum is a fifth as long as a story, and padding it would waste most of the
    computation.
    """
    inputs = torch.full((rows, length), tokenizer.pad_token_id)
    labels = torch.full((rows, length), -100)
    for row in range(rows):
        start = 0
        while True:
            example = draw()
            prompt = tokenizer.encode(example.prompt)
            answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            if end > length:
                break
            inputs[row, start:end] = torch.tensor(prompt + answer)
            labels[row, middle:end] = torch.tensor(answer)
            start = end
    return inputs, labels


def answer_logits(
    model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the answers' tokens, float32 [tokens, vocabulary], and these tokens, int64 [tokens].

    Padding is on the right and attention is causal, so no mask is needed. Only tokens of answers go through the head,
    which is a third of the computation at this size.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        asked = targets != -100
        logits = model.lm_head(hidden[:, :-1][asked])
    return logits.float(), targets[asked]


@torch.inference_mode()
def answers_of(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    batch_size: int,
    sample: bool = False,
) -> list[str]:
    """The first line of each answer: greedy, as lm-eval gets it in these tasks, or sampled at temperature 1."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=sample,
        )
        texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.split("\n")[0] for text in texts]
    return answers
