"""A live model whose vocabulary is extended by the rows of a soft prompt, none of which it ever generates.

A prompt is stored in the embedding of new tokens, divided by the factor that some architectures apply in the embedding
module (Gemma), because peft inserts prompts after it. The head is untied from the embedding, and its row for a new
token is the mean of the existing rows. The token's logit is then the mean of all other logits, which never exceeds the
largest of them, whatever the hidden state; in practice it is far smaller, and its share of the probability negligible.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.errors import InputError
from evomerge.prompts.tokens import PromptTokens


@dataclass(frozen=True)
class Vocabulary:
    """Embedding and head of a model, [tokens, width] each, and the head's bias [tokens] if it has one."""

    embedding: Tensor
    head: Tensor
    bias: Tensor | None


def embedding_scale(module: torch.nn.Module, place: str) -> float:
    """The factor that a model's embedding applies to its rows, 1 in most models.

    Raises:
        InputError: it does something else with them.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    ones = {"weight": torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)}
    token = torch.zeros(1, dtype=torch.int64, device=weight.device)
    given: Tensor = torch.func.functional_call(module, ones, token)
    scale = given.flatten()[0].item()
    if given.numel() != weight.shape[1] or not bool((given == scale).all()) or not scale:
        raise InputError(place, "its embedding is not rows times a number, so that no row can be a prompt's")
    return float(scale)


def losing_rows(vocabulary: Vocabulary, first: int) -> Vocabulary:
    """The head's row and bias for tokens from ``first`` on, [1, width] and [1], with which they are never most likely.

    Computed on the CPU, so that an export equals a model on a GPU bit for bit. The embedding's row belongs to no token.
    """

    def mean(table: Tensor) -> Tensor:
        return table[:first].cpu().mean(dim=0, dtype=torch.float32)[None]

    width = vocabulary.embedding.shape[1]
    bias = None if vocabulary.bias is None else mean(vocabulary.bias)
    return Vocabulary(torch.zeros(1, width), mean(vocabulary.head), bias)


def with_rows(vocabulary: Vocabulary, rows: Tensor, first: int, losing: Vocabulary) -> Vocabulary:
    """A vocabulary with these rows [new, width] for tokens from ``first`` on, which are never the most likely."""
    size = max(len(vocabulary.embedding), first + len(rows))

    def longer(table: Tensor, added: Tensor) -> Tensor:
        made = table.new_empty(size, *table.shape[1:])
        made[: len(table)] = table
        made[min(first, len(table)) :] = added.to(made)
        return made

    embedding = longer(vocabulary.embedding, losing.embedding)
    embedding[first : first + len(rows)] = rows.to(embedding)
    head = longer(vocabulary.head, losing.head)
    bias = None
    if vocabulary.bias is not None and losing.bias is not None:
        bias = longer(vocabulary.bias, losing.bias)
    return Vocabulary(embedding, head, bias)


class SoftModel:
    """A model that is written once, to which soft prompts are added.

    Args:
        live: the model, with its weights.
        place: the place of its source, for errors.

    Attributes:
        scale: the factor that the embedding applies to its rows.

    Raises:
        InputError: its embedding is not a table of rows times a number.
    """

    def __init__(self, live: LiveModel, place: str) -> None:
        self._live = live
        self._embedding, self._head = live.model.get_input_embeddings(), live.model.get_output_embeddings()
        bias = getattr(self._head, "bias", None)
        self._own = Vocabulary(self._embedding.weight, self._head.weight, bias)
        self._config: Any = live.model.config
        self._losing: Vocabulary | None = None
        self.scale = embedding_scale(self._embedding, place)

    def plain(self) -> LiveModel:
        """The model without a prompt."""
        self._lay(self._own, self._config)
        return self._live

    @torch.inference_mode()
    def embedded(self, ids: Sequence[int]) -> Tensor:
        """The layers' inputs for tokens: float32 [tokens, width], on the CPU."""
        embedding = self._own.embedding
        given: Tensor = torch.func.functional_call(
            self._embedding, {"weight": embedding}, torch.tensor(ids, device=embedding.device)
        )
        return given.float().cpu()

    @torch.no_grad()
    def prompted(self, rows: Tensor, tokens: PromptTokens) -> LiveModel:
        """The model with a prompt [rows, width], as stored; valid until the next prompt replaces it.

        Raises:
            NotFiniteError: it overflows the model's dtype.
        """
        if self._losing is None:  # the first new token is always the same
            self._losing = losing_rows(self._own, tokens.first)
        vocabulary = with_rows(self._own, rows, tokens.first, self._losing)
        if not bool(torch.isfinite(vocabulary.embedding[tokens.first :]).all()):
            raise NotFiniteError("the prompt")  # it overflows the dtype
        config = copy.deepcopy(self._config)
        for key, value in longer_config(len(vocabulary.embedding)).items():
            setattr(config, key, value)
        self._lay(vocabulary, config)
        return replace(self._live, tokenizer=tokens.tokenizer)

    def _lay(self, vocabulary: Vocabulary, config: Any) -> None:
        self._embedding.weight = _parameter(vocabulary.embedding)
        self._head.weight = _parameter(vocabulary.head)
        if vocabulary.bias is not None:
            self._head.bias = _parameter(vocabulary.bias)
        self._live.model.config = config


def longer_config(tokens: int) -> Mapping[str, Any]:
    """The configuration changes for a model with a longer vocabulary."""
    return {"vocab_size": tokens, "tie_word_embeddings": False}


def _parameter(tensor: Tensor) -> Parameter:
    return tensor if isinstance(tensor, Parameter) else Parameter(tensor, requires_grad=False)
