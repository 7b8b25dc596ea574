"""Answers with transformers, on a live model whose weights are written in place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from evomerge.inference.generation import Decoding, answer_groups
from evomerge.inference.image_tokens import Kept, PictureRows, image_tokens
from evomerge.inference.prefill import log_likelihoods
from evomerge.inference.reading import Reader
from evomerge.inference.requests import (
    Batch,
    BatchSize,
    Engine,
    Generate,
    Likelihood,
    Response,
    Text,
    refuse_media,
    respond_to,
)

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


def _one_model(rows: Sequence[int]) -> None:
    """Does nothing, since there is only one model."""


class TransformersEngine:
    """An engine on a live model.

    Likelihoods come first, batch by batch. Then come answers, objective by objective, with all models in the same
    forward passes.

    Args:
        live: the live model, which holds the weights.
        choose: called before each forward pass with the model of every row, if the live model can be several, row by
            row; a single number applies to all rows.
        kept: where image tokens are stored when memory is full; None for nowhere.
    """

    greedy_only = False

    def __init__(
        self, live: LiveModel, choose: Callable[[Sequence[int]], None] = _one_model, kept: Kept | None = None
    ) -> None:
        self._live, self._choose, self._kept = live, choose, kept

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """See ``Engine``."""
        self._look(batches)
        responses: list[dict[int, Response]] = [{} for _ in batches]
        left = set(range(len(batches)))
        for batch, answered in zip(batches, responses, strict=True):
            self._likelihoods(batch, answered)
            yield from self._whole(batches, responses, left)
        decoded: dict[
            tuple[Hashable, Decoding], dict[int, list[int]]
        ] = {}  # for each batch the positions of its requests
        for number, batch in enumerate(batches):
            for place, request in enumerate(batch.requests):
                if isinstance(request, Generate):
                    how = Decoding(request.max_new_tokens, request.stop, request.batch_size, request.shaping)
                    decoded.setdefault((batch.objective, how), {}).setdefault(number, []).append(place)
        for (_, how), places in decoded.items():
            self._answers(batches, how, places, responses)
            yield from self._whole(batches, responses, left)

    def _look(self, batches: Sequence[Batch]) -> None:
        """If there are pictures, check whether the tower is still the one whose image tokens are cached."""
        if self._live.processor_of is None:
            refuse_media(batches, "this model reads")
        has_pictures = any(request.prompt.media for batch in batches for request in batch.requests)
        self._tokens = image_tokens(self._live, self._kept) if has_pictures else None

    def _likelihoods(self, batch: Batch, responses: dict[int, Response]) -> None:
        """Answer the likelihood requests of one batch."""
        asked = {place: request for place, request in enumerate(batch.requests) if isinstance(request, Likelihood)}
        if asked:
            self._choose([batch.model])
            responses.update(zip(asked, log_likelihoods(self._live, list(asked.values()), self._tokens), strict=True))

    def _answers(
        self,
        batches: Sequence[Batch],
        how: Decoding,
        places: dict[int, list[int]],
        responses: Sequence[dict[int, Response]],
    ) -> None:
        """Answer requests to generate with the same decoding settings: for each batch those at these positions."""
        models = [batches[number].model for number in places]
        prompts = [[batches[number].requests[place].prompt for place in own] for number, own in places.items()]
        groups = [[prompt.fed for prompt in group] for group in prompts]
        shown = PictureRows(self._tokens, [prompt for group in prompts for prompt in group])
        choose = lambda rows: self._choose([models[row] for row in rows])  # noqa: E731
        texts = answer_groups(self._live, groups, how, choose, shown)
        for (number, own), answers in zip(places.items(), texts, strict=True):
            responses[number].update({place: Text(text) for place, text in zip(own, answers, strict=True)})

    @staticmethod
    def _whole(
        batches: Sequence[Batch], responses: Sequence[dict[int, Response]], left: set[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield the batches that are completely answered, and remove them from ``left``."""
        for number in sorted(left):
            count = len(batches[number].requests)
            if len(responses[number]) == count:
                left.discard(number)
                yield number, [responses[number][place] for place in range(count)]


def engine_of(live: LiveModel, kept: Kept | None = None) -> Engine:
    """The engine of a live model: its serving engine, or transformers.

    Args:
        kept: as for ``TransformersEngine``.
    """
    if live.engine is not None:
        return cast(Engine, live.engine)  # a lower layer only knows `load`
    return TransformersEngine(live, kept=kept)


def generate(
    live: LiveModel,
    texts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: BatchSize = "auto",
    engine: Engine | None = None,
) -> list[str]:
    """The model's greedy answer to each text, in order, without the text itself.

    A text that leaves no room for an answer in the model's context is truncated at the beginning.

    Args:
        engine: answers with the model; the model's own engine if None.

    Raises:
        InputError: the context has no room for ``max_new_tokens``, or the model lacks a token of its tokenizer.
    """
    reader = Reader.of(live)
    prompts = [reader.prompt(text, max_new_tokens, f"prompt {number + 1}") for number, text in enumerate(texts)]
    requests = [Generate(prompt, max_new_tokens, tuple(stop), batch_size) for prompt in prompts]
    responses = respond_to(engine or engine_of(live), requests)
    return [response.text for response in responses if isinstance(response, Text)]
