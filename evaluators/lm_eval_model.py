"""lm-eval's transformers model around a live model, and the ways to run lm-eval's code without a trace."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from evaluators.generation import BatchSize, Room, answer_tokens, shaping
from evaluators.lm_eval_grading import give
from evaluators.stopping import StopAtText
from evomerge.checkpoints.live import Engine, LiveModel
from evomerge.errors import InputError


class ResidentLM(HFLM):  # type: ignore[misc]
    """HFLM for a model that stays while its weights change: it shares the model, and encodes each text once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        max_length: int | None,
        engine: Engine | None = None,
    ) -> None:
        room = Room()
        rows = room.rows(batch_size)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, max_length=max_length
        )
        self._live, self._wanted, self._room = LiveModel(model, tokenizer, engine=engine), batch_size, room
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if kwargs:
            return list(super().tok_encode(string, add_special_tokens, **kwargs))
        key = (string, add_special_tokens)
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return self._encoded[key]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        # loglikelihood_rolling asks for a progress bar whatever it was told itself
        ask = super()._loglikelihood_tokens

        def work(rows: int) -> Any:
            self.batch_size_per_gpu = rows
            return ask(requests, disable_tqdm=True, override_bs=override_bs)

        # Not by how many they are: loglikelihood_rolling asks bit by bit, and cuts by the batch size it finds here.
        return self._room.fit(self._wanted, self._room.rows(self._wanted), self.device, work)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request; those that are plainly greedy are given as every evaluator's are.

        Raises:
            InputError: a serving engine is asked for answers that are not.
        """
        groups: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(position)
        answers = [""] * len(requests)
        for group in groups.values():
            found = self._generate([requests[position] for position in group])
            for position, text in zip(group, found, strict=True):
                answers[position] = text
        return answers

    def _generate(self, requests: list[Instance]) -> list[str]:
        """The answers to requests with the same settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        most, until = int(settings.pop("max_gen_toks")), settings.pop("until")
        wishes = [*shaping(self.model, settings), *({"max_length"} & settings.keys())]
        if wishes and self._live.engine is not None:
            problem = f"{', '.join(wishes)}, of the task or the model's generation_config.json, is not plainly greedy"
            mend = "Set it to what has no effect, such as `repetition_penalty: 1.0`, or leave `engine` out."
            raise InputError("generation", problem, mend)
        if wishes:
            work = partial(self._generate_as_lm_eval, requests)
            return self._room.fit(self._wanted, len(requests), self.device, work)
        stop = handle_stop_sequences(until, eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        room = self.max_length - most
        prompts = [(self.tok_encode(each.args[0]) or [self.prefix_token_id])[-room:] for each in requests]
        return answer_tokens(self._live, prompts, most, [text for text in stop if text], self._wanted)

    def _generate_as_lm_eval(self, requests: list[Instance], rows: int) -> list[str]:
        self.batch_size_per_gpu = rows
        found: list[str] = super().generate_until(requests, disable_tqdm=True)
        return found

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if generation_kwargs.get("num_beams", 1) > 1:  # whose rows change places: lm-eval looks at them all again
            beams: torch.Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
            return beams
        generation_kwargs.pop("temperature", None)
        generation_kwargs["do_sample"] = False
        pad = self.tokenizer.pad_token_id
        criterion = StopAtText(self.tokenizer, [text for text in stop if text], context.shape[1], context.shape[0])
        tokens: torch.Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([criterion]),
            pad_token_id=pad,
            use_cache=True,
            **generation_kwargs,
        )
        # Where no token ends a sequence by itself, transformers lets ended rows run on instead of padding them.
        beyond = torch.arange(tokens.shape[1])[None, :] >= criterion.lengths[:, None]
        return tokens.masked_fill(beyond.to(tokens.device), pad)


def ask(lm: ResidentLM, requests: Sequence[Sequence[Instance]]) -> None:
    """Have the model answer the requests of every item; the answers go into the requests, over older ones."""
    flat = [request for group in requests for request in group]
    for kind in dict.fromkeys(request.request_type for request in flat):
        asked = [request for request in flat if request.request_type == kind]
        answers = getattr(lm, kind)(asked, disable_tqdm=True)
        for request, answer in zip(asked, answers, strict=True):
            give(request, answer)


def count_truncated(lm: ResidentLM, items: Sequence[Sequence[Instance]], place: str) -> int:
    """How many items lose the start of a prompt because prompt and answer are longer than the model's context.

    Raises:
        InputError: no room at all, an empty answer, or a token that the model has no embedding for.
    """
    truncated = 0
    rows = lm.model.get_input_embeddings().weight.shape[0]
    for position, requests in enumerate(items):
        fits = True
        for request in requests:
            prompt, answer, room = _measure(lm, request, place)
            if request.request_type == "loglikelihood" and not 0 < answer <= lm.max_length:
                raise InputError(
                    place,
                    f"item {position} has an answer of {answer} tokens, where the model can take 1 to {lm.max_length}",
                    "Mend the item, or leave it out with a slice such as `test[:100]`.",
                )
            if (highest := max(prompt, default=0)) >= rows:
                raise InputError(
                    place,
                    f"the tokenizer gives token {highest} ({lm.tokenizer.decode([highest])!r}) for item {position}; "
                    f"the model has {rows} embeddings",
                    "Take the tokenizer of a source that has all of its tokens.",
                )
            fits &= len(prompt) <= room
        truncated += not fits
    return truncated


def _measure(lm: ResidentLM, request: Instance, place: str) -> tuple[list[int], int, int]:
    """The tokens that go in, how many of them are the answer's, and how many may go in before some are cut."""
    if request.request_type == "generate_until":
        prompt, settings = request.args[:2]
        most = int(normalize_gen_kwargs(settings, lm.max_gen_toks)["max_gen_toks"])
        if most >= lm.max_length:
            raise InputError(
                place,
                f"asks for answers of up to {most} tokens, but prompt and answer together may have {lm.max_length}",
                "Lower `max_gen_toks` under `generation:`.",
            )
        return lm.tok_encode(prompt), 0, lm.max_length - most
    if request.request_type == "loglikelihood":
        prompt, answer = request.args[:2]
        if prompt:
            before, after = lm._encode_pair(prompt, answer)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(answer, add_special_tokens=False)
        return before + after, len(after), lm.max_length + 1
    text = lm.tok_encode(request.args[0])
    return text, len(text), len(text)  # loglikelihood_rolling cuts a long text into windows and loses nothing


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run task code with seeds of its own; Python's, numpy's and torch's generators are left as they were found.

    Some tasks shuffle their choices with the global generators, so without seeds the items would differ from worker to
    worker. A GPU's generator is not touched: nothing here draws from it.
    """
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(1234)
    torch.default_generator.manual_seed(1234)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of lm-eval and datasets, and the bars of datasets."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, bars = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what goes wrong is raised as well
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
