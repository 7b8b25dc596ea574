"""What evaluators ask of a model, and the one protocol of everything that answers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from evomerge.errors import InputError
from evomerge.inference.reading import Prompt

BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"]
"""Most prompts in one forward pass. Where memory runs out on a GPU, half as many are from then on."""


@dataclass(frozen=True)
class Generate:
    """Have the model answer a prompt, greedily unless it is said otherwise.

    Attributes:
        prompt: what it is given.
        max_new_tokens: most tokens of the answer.
        stop: the answer ends before the first of these texts, and at the model's end token.
        batch_size: most prompts in one forward pass.
        num_beams: of beam search; with 1 there is none.
        repetition_penalty: by which the scores of tokens that prompt or answer have are divided, or multiplied where
            they are negative (Keskar et al., CTRL, arXiv 1909.05858, section 4.1); 1 changes nothing.
    """

    prompt: Prompt
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    batch_size: BatchSize = "auto"
    num_beams: int = 1
    repetition_penalty: float = 1.0

    @property
    def shaping(self) -> tuple[tuple[str, float], ...]:
        """What makes the answer another than the greedy one, by transformers' names."""
        wanted: dict[str, float] = {"num_beams": self.num_beams, "repetition_penalty": self.repetition_penalty}
        return tuple((name, value) for name, value in wanted.items() if value != 1)


@dataclass(frozen=True)
class Likelihood:
    """Ask how likely the model finds the answer of a prompt that has one.

    Attributes:
        prompt: with its answer, of one token at least.
        batch_tokens: most tokens in one forward pass, padding counted, unless a single prompt has more.
    """

    prompt: Prompt
    batch_tokens: int = 8192


Request = Generate | Likelihood


@dataclass(frozen=True)
class Text:
    """What the model wrote to a ``Generate``."""

    text: str


@dataclass(frozen=True)
class LogLikelihood:
    """What a ``Likelihood`` came to.

    Attributes:
        log: log p(answer | prompt), a natural logarithm.
        tokens: how many tokens the answer has.
        size: how many bytes it has in UTF-8; spaces at the end of the prompt count as the answer's.
    """

    log: float
    tokens: int
    size: int


Response = Text | LogLikelihood


@dataclass(frozen=True)
class Batch:
    """What one objective asks of one model.

    On transformers, requests of different objectives are not in one forward pass: the last bits of logits hang on the
    rows of a batch, and a score must not hang on which other objectives there are.

    Attributes:
        requests: of any kinds.
        objective: what is the same for the batches of the same objective and split.
        model: which model is asked, of an engine that has several.
    """

    requests: Sequence[Request]
    objective: Hashable = 0
    model: int = 0


class Engine(Protocol):
    """Answers requests with the weights of a model that is there."""

    @property
    def greedy_only(self) -> bool:
        """Whether the model itself is not to be asked for answers that are not plainly greedy."""
        ...

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """The number of each batch with the response to each of its requests, as soon as the batch is answered.

        Raises:
            InputError: a prompt holds what the model cannot see.
            torch.OutOfMemoryError: there is no room for one prompt.
        """
        ...


def respond_to(engine: Engine, requests: Sequence[Request]) -> list[Response]:
    """The response to each request of one batch."""
    ((_, responses),) = engine.respond([Batch(requests)])
    return responses


def refuse_media(batches: Sequence[Batch], reads_text: str) -> None:
    """Refuse prompts with pictures; ``reads_text`` says what gives the model text alone."""
    for prompt in (request.prompt for batch in batches for request in batch.requests):
        if prompt.media:
            problem = f"shows the model an {prompt.media[0].kind}, and {reads_text} text alone"
            raise InputError(prompt.place, problem, "Ask by text, or leave the item out.")


def refuse_shaping(batches: Sequence[Batch], engine: str) -> None:
    """Refuse answers that are not plainly greedy, for an engine that gives no others."""
    for request in (request for batch in batches for request in batch.requests):
        if isinstance(request, Generate) and request.shaping:
            problem = f"the engine {engine} gives plainly greedy answers alone, and {request.shaping[0][0]} is set"
            raise InputError(request.prompt.place, problem, "Leave it out, or `engine`.")
