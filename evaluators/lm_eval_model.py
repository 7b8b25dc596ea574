"""lm-eval's transformers model, wrapped around a live model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from evaluators.prompts import PromptSettings, as_content_parts, chat_text
from evomerge.errors import InputError
from evomerge.inference.generation import Room, shaping
from evomerge.inference.media import Media
from evomerge.inference.reading import Prompt, Reader, encode, encode_pair, encode_plain, first_token
from evomerge.inference.requests import BatchSize, Generate
from evomerge.inference.stopping import StopAtText

if TYPE_CHECKING:
    from evaluators.lm_eval import LmEvalSettings


class ResidentLM(HFLM):  # type: ignore[misc]
    """HFLM for a model whose weights change in place: it shares the model, and tokenizes each text only once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        max_length: int | None,
    ) -> None:
        room = Room()
        rows = room.rows(batch_size)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, max_length=max_length
        )
        self._wanted, self._room = batch_size, room
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """The tokens of a text, the same as for all other evaluators."""
        key = (string, add_special_tokens)
        if key not in self._encoded:
            cut = encode_plain if add_special_tokens is False else encode
            self._encoded[key] = cut(self.tokenizer, string)
        return self._encoded[key][-left_truncate_len:] if left_truncate_len else self._encoded[key]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for several texts, padded to one length: token ids and attention mask, int64 [texts, tokens]."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.tokenizer, context, continuation)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        # loglikelihood_rolling requests a progress bar even if told not to
        ask = super()._loglikelihood_tokens

        def work(rows: int) -> Any:
            self.batch_size_per_gpu = rows
            return ask(requests, disable_tqdm=True, override_bs=override_bs)

        # The number of requests is no bound: loglikelihood_rolling asks in parts, cut by the batch size it finds here.
        return self._room.fit(self._wanted, self._room.rows(self._wanted), self.device, work)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, as lm-eval decodes it."""
        groups: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(_settings_of(request), []).append(position)
        answers = [""] * len(requests)
        for group in groups.values():
            work = partial(self._generate_as_lm_eval, [requests[position] for position in group])
            texts = self._room.fit(self._wanted, len(group), self.device, work)
            for position, text in zip(group, texts, strict=True):
                answers[position] = text
        return answers

    def _generate_as_lm_eval(self, requests: list[Instance], rows: int) -> list[str]:
        self.batch_size_per_gpu = rows
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if generation_kwargs.get("num_beams", 1) > 1:  # beams change rows, so lm-eval's own criterion checks all rows
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
        # If no token ends a sequence by itself, transformers lets finished rows continue instead of padding them.
        beyond = torch.arange(tokens.shape[1])[None, :] >= criterion.lengths[:, None]
        return tokens.masked_fill(beyond.to(tokens.device), pad)


def ask(lm: ResidentLM, requests: Mapping[int, Instance]) -> dict[int, Any]:
    """The model's answers to requests, by kind of request, as lm-eval computes them."""
    answers: dict[int, Any] = {}
    for kind in dict.fromkeys(request.request_type for request in requests.values()):
        asked = {number: request for number, request in requests.items() if request.request_type == kind}
        answers.update(zip(asked, getattr(lm, kind)(list(asked.values()), disable_tqdm=True), strict=True))
    return answers


def chat(reader: Reader, settings: PromptSettings) -> Callable[..., str]:
    """A function that applies the model's chat template to turns, with the signature that lm-eval expects.

    As in lm-eval, a task's own description is omitted if the template has no place for it. The system instruction of
    the search file is not.
    """
    templates, in_parts = reader.templates, reader.templates is not reader.tokenizer

    def apply(turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        if in_parts:
            turns = as_content_parts(turns)
        try:
            return chat_text(templates, turns, opens=add_generation_prompt)
        except InputError:
            others = [turn for turn in turns if turn["role"] != "system"]
            if settings.system_instruction or len(others) == len(turns):
                raise
            return chat_text(templates, others, opens=add_generation_prompt)

    return apply


def request_of(
    request: Instance, reader: Reader, settings: LmEvalSettings, place: str, media: tuple[Media, ...] = ()
) -> Generate | Prompt:
    """Convert a request of lm-eval to one of an engine; only its prompt is returned if lm-eval itself must answer it.

    This is the case if answers are not plain greedy decoding because of the task's or the model's settings (beams, a
    penalty), and for likelihoods: lm-eval sums them in the model's dtype, in its own batches (a text that is too long
    for the context window by window), and scores must equal lm-eval's to the last bit.

    Raises:
        InputError: the context is full, an answer is empty or too long, or the model lacks a token.
    """
    tokenizer, most = reader.tokenizer, _context(reader, settings)
    if media:
        return _with_pictures(request, reader, settings, place, media)
    if request.request_type == "generate_until":
        text, wanted = request.args[0], normalize_gen_kwargs(request.args[1])
        tokens, until = int(wanted.pop("max_gen_toks")), wanted.pop("until")
        if tokens >= most:
            problem = f"asks for answers of up to {tokens} tokens, but prompt and answer together may have {most}"
            raise InputError(place, problem, "Lower `max_gen_toks` under `generation:`.")
        ids = encode(tokenizer, text) or [first_token(tokenizer)]
        reader.check_known(ids, place)
        prompt = Prompt(text, "", ids, 0, most - tokens, place)
        if non_greedy_settings(reader, wanted):
            return prompt
        stop = handle_stop_sequences(list(until), eos=tokenizer.decode(tokenizer.eos_token_id))
        return Generate(prompt, tokens, tuple(ending for ending in stop if ending), settings.batch_size)
    if request.request_type == "loglikelihood":
        text, answer = request.args[:2]
        before, after = encode_pair(tokenizer, text, answer)
        if not 0 < len(after) <= most:
            problem = f"has an answer of {len(after)} tokens, where the model can take 1 to {most}"
            raise InputError(place, problem, "Fix the item, or leave it out with a slice such as `test[:100]`.")
        reader.check_known([*before, *after], place)
        return Prompt(text, answer, [*before, *after], len(after), most + 1, place)
    text = request.args[0]
    ids = encode(tokenizer, text)  # loglikelihood_rolling splits a long text into windows without loss
    reader.check_known(ids, place)
    return Prompt("", text, [first_token(tokenizer), *ids], len(ids), None, place)


def _with_pictures(
    request: Instance, reader: Reader, settings: LmEvalSettings, place: str, media: tuple[Media, ...]
) -> Generate:
    """A request about pictures.

    Raises:
        InputError: it asks for likelihoods, or for anything but plain greedy decoding; and as for ``Reader.prompt``.
    """
    if request.request_type != "generate_until":
        problem = "asks for likelihoods with pictures, which lm-eval supports for no model"
        raise InputError(place, problem, "Take an evaluator of the kind multiple_choice or likelihood.")
    wanted = normalize_gen_kwargs(request.args[1])
    tokens, until = int(wanted.pop("max_gen_toks")), wanted.pop("until")
    if said := non_greedy_settings(reader, wanted):
        problem = f"{', '.join(said)}, of the task or the model's generation_config.json, is not plainly greedy"
        raise InputError("generation", problem, "Set it to what has no effect, such as `repetition_penalty: 1.0`.")
    prompt = settings.limited(reader).prompt(request.args[0], tokens, place, media)
    stop = handle_stop_sequences(list(until), eos=reader.tokenizer.decode(reader.tokenizer.eos_token_id))
    return Generate(prompt, tokens, tuple(ending for ending in stop if ending), settings.batch_size)


def non_greedy_settings(reader: Reader, settings: Mapping[str, Any]) -> list[str]:
    """The settings, of a task or of the model, that are not plain greedy decoding."""
    own = [] if reader.generation is None else shaping(reader.generation, settings)
    return [*own, *({"max_length"} & settings.keys())]


def refuse_non_greedy(requests: Iterable[Instance], reader: Reader) -> None:
    """Reject requests that an engine with only greedy decoding cannot answer.

    Raises:
        InputError: something other than plain greedy decoding is requested.
    """
    for request in requests:
        if request.request_type == "generate_until":
            names = ", ".join(non_greedy_settings(reader, _generation_settings(request)))
            problem = f"{names}, of the task or the model's generation_config.json, is not plainly greedy"
            hint = "Set it to what has no effect, such as `repetition_penalty: 1.0`, or leave `engine` out."
            raise InputError("generation", problem, hint)


def _generation_settings(request: Instance) -> dict[str, Any]:
    """The generation settings of a request, except for the length and stop strings."""
    return {key: value for key, value in normalize_gen_kwargs(request.args[1]).items() if key not in _LENGTHS}


_LENGTHS = ("max_gen_toks", "until")


def _settings_of(request: Instance) -> str:
    return json.dumps(request.args[1], sort_keys=True, default=str)


def _context(reader: Reader, settings: PromptSettings) -> int:
    """The maximum number of tokens of prompt and answer, as HFLM assumes for a model that does not say."""
    room = settings.limited(reader).context
    return resolve_max_length(None, reader.tokenizer) if room is None else room
