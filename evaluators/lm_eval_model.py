"""lm-eval's transformers model around a live model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from evaluators.generation import BatchSize, Room, answer_tokens, shaping
from evaluators.lm_eval_grading import give
from evaluators.prompts import (
    Asked,
    PromptSettings,
    Reader,
    chat_text,
    check_known,
    encode,
    encode_pair,
    encode_plain,
    first_token,
)
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

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """The tokens of a text, as all evaluators have them."""
        key = (string, add_special_tokens)
        if key not in self._encoded:
            cut = encode_plain if add_special_tokens is False else encode
            self._encoded[key] = cut(self.tokenizer, string)
        return self._encoded[key][-left_truncate_len:] if left_truncate_len else self._encoded[key]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of several, padded to one length: token ids and attention mask, int64 [texts, tokens]."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.tokenizer, context, continuation)

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
        prompts = [(self.tok_encode(each.args[0]) or [first_token(self.tokenizer)])[-room:] for each in requests]
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


def chat(tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> Callable[..., str]:
    """What puts turns into the tokenizer's chat template, as lm-eval calls it.

    As in lm-eval, a task's own description is left out where the template has no place for it. What the search file
    says is not.
    """

    def apply(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return chat_text(tokenizer, turns, opens=add_generation_prompt)
        except InputError:
            others = [turn for turn in turns if turn["role"] != "system"]
            if settings.system_instruction or len(others) == len(turns):
                raise
            return chat_text(tokenizer, others, opens=add_generation_prompt)

    return apply


def asked(request: Instance, reader: Reader, settings: PromptSettings, place: str) -> Asked:
    """A request as the model is given it.

    Raises:
        InputError: there is no room at all, an answer that is empty or too long, or a token that the model has not.
    """
    tokenizer, most = reader.tokenizer, _context(reader, settings)
    if request.request_type == "generate_until":
        prompt, wanted = request.args[:2]
        tokens = int(normalize_gen_kwargs(wanted)["max_gen_toks"])
        if tokens >= most:
            problem = f"asks for answers of up to {tokens} tokens, but prompt and answer together may have {most}"
            raise InputError(place, problem, "Lower `max_gen_toks` under `generation:`.")
        ids = encode(tokenizer, prompt) or [first_token(tokenizer)]
        check_known(reader, ids, place)
        return Asked(prompt, "", ids, 0, most - tokens, place)
    if request.request_type == "loglikelihood":
        prompt, answer = request.args[:2]
        before, after = encode_pair(tokenizer, prompt, answer)
        if not 0 < len(after) <= most:
            problem = f"has an answer of {len(after)} tokens, where the model can take 1 to {most}"
            raise InputError(place, problem, "Mend the item, or leave it out with a slice such as `test[:100]`.")
        check_known(reader, [*before, *after], place)
        return Asked(prompt, answer, [*before, *after], len(after), most + 1, place)
    text = request.args[0]
    ids = encode(tokenizer, text)  # loglikelihood_rolling cuts a long text into windows and loses nothing
    check_known(reader, ids, place)
    return Asked("", text, [first_token(tokenizer), *ids], len(ids), None, place)


def _context(reader: Reader, settings: PromptSettings) -> int:
    """Most tokens of prompt and answer, as HFLM has it for a model that says none."""
    room = reader.room(settings)
    return resolve_max_length(None, reader.tokenizer) if room is None else room
