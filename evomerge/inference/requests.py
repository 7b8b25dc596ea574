"""The requests that evaluators make, and the protocol of every engine that answers them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from evomerge.errors import InputError
from evomerge.inference.reading import Prompt

BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"]
"""The maximum number of prompts in one forward pass. If a GPU runs out of memory, it is halved from then on."""


@dataclass(frozen=True)
class Generate:
    """Let the model answer a prompt; decoding is greedy unless specified otherwise.

    Attributes:
        prompt: the prompt.
        max_new_tokens: the maximum number of tokens of the answer.
        stop: stop strings; the answer ends before the first of them, and at the model's end token.
        batch_size: the maximum number of prompts in one forward pass.
        num_beams: the number of beams for beam search; 1 means no beam search.
        repetition_penalty: the scores of tokens in the prompt or answer are divided by it, or multiplied if they are
            negative (Keskar et al., CTRL, arXiv 1909.05858, section 4.1); 1 has no effect.
    """

    prompt: Prompt
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    batch_size: BatchSize = "auto"
    num_beams: int = 1
    repetition_penalty: float = 1.0

    @property
    def shaping(self) -> tuple[tuple[str, float], ...]:
        """The settings that make the answer differ from a greedy one, by their names in transformers."""
        wanted: dict[str, float] = {"num_beams": self.num_beams, "repetition_penalty": self.repetition_penalty}
        return tuple((name, value) for name, value in wanted.items() if value != 1)


@dataclass(frozen=True)
class Likelihood:
    """Ask for the log-likelihood of the answer of a prompt that has one.

    Attributes:
        prompt: with its answer of at least one token.
        batch_tokens: the maximum number of tokens in one forward pass, including padding, unless one prompt has more.
    """

    prompt: Prompt
    batch_tokens: int = 8192


Request = Generate | Likelihood


@dataclass(frozen=True)
class Text:
    """The response to a ``Generate``: the text that the model wrote."""

    text: str


@dataclass(frozen=True)
class LogLikelihood:
    """The response to a ``Likelihood``.

    Attributes:
        log: log p(answer | prompt), a natural logarithm.
        tokens: the number of tokens of the answer.
        size: its number of bytes in UTF-8; trailing spaces of the prompt count as part of the answer.
    """

    log: float
    tokens: int
    size: int


Response = Text | LogLikelihood


@dataclass(frozen=True)
class Batch:
    """The requests of one objective to one model.

    On transformers, requests of different objectives are never in the same forward pass: the last bits of logits depend
    on the rows of a batch, and a score must not depend on which other objectives there are.

    Attributes:
        requests: requests of any kinds.
        objective: identifies batches of the same objective and split.
        model: the index of the model, for an engine with several.
    """

    requests: Sequence[Request]
    objective: Hashable = 0
    model: int = 0


class Engine(Protocol):
    """Answers requests with the weights of an existing model."""

    @property
    def greedy_only(self) -> bool:
        """Whether the engine supports only plain greedy decoding, with no fallback to the model itself."""
        ...

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """Yield the index of each batch with the responses to its requests, as soon as the batch is answered.

        Raises:
            InputError: a prompt contains something that the model cannot read.
            torch.OutOfMemoryError: not even one prompt fits into memory.
        """
        ...


def respond_to(engine: Engine, requests: Sequence[Request]) -> list[Response]:
    """The responses to the requests of one batch."""
    ((_, responses),) = engine.respond([Batch(requests)])
    return responses


def refuse_media(batches: Sequence[Batch], reads_text: str) -> None:
    """Reject prompts with pictures; ``reads_text`` names what restricts the model to text."""
    for prompt in (request.prompt for batch in batches for request in batch.requests):
        if prompt.media:
            problem = f"shows the model an {prompt.media[0].kind}, and {reads_text} only text"
            raise InputError(prompt.place, problem, "Ask by text, or leave the item out.")


def refuse_shaping(batches: Sequence[Batch], engine: str) -> None:
    """Reject requests other than plain greedy decoding, for an engine that supports nothing else."""
    for request in (request for batch in batches for request in batch.requests):
        if isinstance(request, Generate) and request.shaping:
            problem = f"the engine {engine} supports only plain greedy decoding, and {request.shaping[0][0]} is set"
            raise InputError(request.prompt.place, problem, "Leave it out, or `engine`.")
