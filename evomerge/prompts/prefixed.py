"""A live model with a prefix: keys and values in every layer before the texts.

Its input texts begin with one placeholder token for each row of the prefix (``tokens``), so that everything that counts
tokens counts the prefix: caches, masks, positions, the context length. The model removes these tokens and puts the
prefix into the KV cache in their place; positions of the text continue after it, as in peft.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomerge.errors import InputError


class PrefixedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model with a prefix.

    Args:
        model: the model.
        prefix: [rows, layers * 2, heads, width], for each layer keys and then values.
        first: the placeholder token of the first row; those of the others follow.
    """

    _supports_sdpa = True  # the wrapped model has its own attention

    def __init__(self, model: PreTrainedModel, prefix: Tensor, first: int) -> None:
        super().__init__(copy.deepcopy(model.config))
        self.generation_config = copy.deepcopy(model.generation_config)
        self.model = model
        self._prefix = prefix.to(model.device, model.dtype).permute(1, 2, 0, 3)[:, None]  # [layers * 2, 1, heads, ...]
        self._first = first
        rows: int = model.get_input_embeddings().weight.shape[0]
        # Placeholder tokens are never looked up, but code that asks for the vocabulary size must count them.
        size = (max(rows, first + len(prefix)), model.config.hidden_size)
        self._counted = (torch.nn.Embedding(*size, device="meta", dtype=model.dtype),)  # not a submodule

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        return self._counted[0]

    def get_output_embeddings(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.get_output_embeddings()
        return head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """See ``LlamaForCausalLM.forward``. Logits of columns with placeholder tokens are zero."""
        if past_key_values is not None and past_key_values.get_seq_length():
            out: CausalLMOutputWithPast = self.model(
                input_ids, attention_mask=self._ordered(attention_mask, past_key_values), position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep,
            )  # fmt: skip
            return out
        rows, width = input_ids.shape
        kept = self._text(input_ids)
        ids, mask, positions = (
            None if part is None else part.expand(rows, width)[kept].view(rows, -1)
            for part in (input_ids, attention_mask, position_ids)
        )
        assert ids is not None
        cache = self._filled(past_key_values, rows)
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, self.prefix_length), mask], dim=1)
        columns = min(logits_to_keep, ids.shape[1]) or ids.shape[1]
        logits = self._prefix.new_zeros(rows, 0, self.model.config.vocab_size)
        if ids.shape[1]:
            logits = self.model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=use_cache,
                logits_to_keep=columns,
            ).logits  # fmt: skip
        wanted = min(logits_to_keep, width) or width
        logits = torch.nn.functional.pad(logits, (0, 0, wanted - logits.shape[1], 0))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    @property
    def prefix_length(self) -> int:
        """How many tokens the prefix stands for; the decoder reads this name, since these cannot be recomputed."""
        return self._prefix.shape[3]

    def _text(self, input_ids: Tensor) -> Tensor:
        """Where the texts are: bool [rows, width], the same number in each row."""
        standing = (input_ids >= self._first) & (input_ids < self._first + self.prefix_length)
        counts = set(standing.sum(dim=1).tolist())
        if not counts <= {0} and counts != {self.prefix_length}:
            raise InputError(
                "prefix", f"stands before texts, and a text has {max(counts)} of its {self.prefix_length} tokens"
            )
        return ~standing

    def _filled(self, cache: Any, rows: int) -> Any:
        """A new cache that contains only the prefix."""
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        for layer in range(len(self._prefix) // 2):
            keys, values = (part.expand(rows, -1, -1, -1) for part in self._prefix[2 * layer : 2 * layer + 2])
            cache.update(keys, values, layer)
        return cache

    def _ordered(self, mask: Tensor | None, cache: Any) -> Tensor | None:
        """Reorder a mask to match the cache's columns: with left padding, the prefix comes before the padding."""
        if mask is None or type(cache) is not DynamicCache:
            return mask  # the decoder's table keeps the prefix next to its text
        columns = torch.arange(mask.shape[1], device=mask.device)
        padding = mask.shape[1] - mask.sum(dim=1, keepdim=True)
        return ((columns < self.prefix_length) | (columns >= self.prefix_length + padding)).to(mask.dtype)
