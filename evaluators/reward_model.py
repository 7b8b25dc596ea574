"""Scores answers with a reward model, as used in reinforcement learning from human feedback.

Nisan Stiennon et al., "Learning to summarize from human feedback" (2020), section 3.4: a language model with a scalar
head, which scores a prompt with its answer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from evaluators.answers import AnswersEvaluator, AnswersSettings, Question
from evaluators.base import ModelReference, Split
from evaluators.item_files import check_template, template_fields
from evomerge.errors import InputError
from evomerge.inference.reading import Reader, encode_plain, encode_whole
from evomerge.inference.requests import Request

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_HEAD = "ForSequenceClassification"
_PLAIN = "{prompt}{answer}"


class RewardModelSettings(AnswersSettings):
    """The settings of prompts and of the reward model that judges their answers.

    Attributes:
        model: a sequence classifier with one label: a folder, or ``org/name`` on the hub. Its weights must be
            safetensors, and code in its folder is not run.
        template: how prompt and answer are combined, with ``{prompt}`` and ``{answer}``. By default it is the chat
            template of the reward model if it has one, else the answer directly after the prompt.
    """

    kind: Literal["reward_model"] = "reward_model"
    model: ModelReference
    template: str | None = None

    @field_validator("template")
    @classmethod
    def _holds_the_answer(cls, text: str | None) -> str | None:
        if text is not None:
            fields = template_fields(check_template(text))
            if "answer" not in fields or not fields <= {"prompt", "answer"}:
                raise ValueError("it must hold {answer}, and may hold {prompt}, and no other field")
        return text

    def known_metrics(self) -> Collection[str]:
        return ("reward",)

    def build(self) -> RewardModelEvaluator:
        """Read the items, and check the reward model. Its weights are loaded with the first answers.

        Raises:
            InputError: an unusable reward model; a file or a line that cannot be read, a missing field, an empty split,
                or an item that is in both splits.
        """
        return RewardModelEvaluator(self)


class RewardModelEvaluator(AnswersEvaluator):
    """Prompts; ``reward`` is the raw logit of the reward model for prompt and answer."""

    def __init__(self, settings: RewardModelSettings) -> None:
        self._judge = _Judge(settings)
        self._device: torch.device | str = "cpu"
        super().__init__(settings, "reward", ["reward_model 1", settings.template or "", self._judge.fingerprint])

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The items' prompts. The reward model will be placed on the device of the model asked last."""
        self._device = reader.device or self._device
        return super().requests(reader, split, indices)

    def _grade(self, answered: Sequence[tuple[Question, str]]) -> list[float]:
        return self._judge.rewards([(item.prompt, answer) for item, answer in answered], self._device)


class _Judge:
    """A reward model.

    Attributes:
        fingerprint: a hash of its files.
    """

    def __init__(self, settings: RewardModelSettings) -> None:
        from evomerge.checkpoints.tokenizer_files import load_tokenizer_folder

        self._folder, files = _check(settings.model)
        self._template, self._batch_size = settings.template, settings.batch_size
        self._tokenizer: Any = load_tokenizer_folder(self._folder, "model")
        self.fingerprint = _fingerprint(files)
        self._model: Any = None

    def rewards(self, pairs: Sequence[tuple[str, str]], device: torch.device | str) -> list[float]:
        """The reward of each prompt with its answer, in order.

        Raises:
            InputError: the files lack weights of the reward model.
        """
        import torch

        if self._model is None:
            self._model = _load(self._folder, device)
        encoded = [self._encode(prompt, answer) for prompt, answer in pairs]
        rewards = [0.0] * len(pairs)
        for batch in self._batches(encoded):
            rows = [torch.tensor(encoded[position], device=device) for position in batch]
            pad = self._padding() or 0  # without a padding token, batches have one row and need no padding
            # Pad on the right, whatever the tokenizer's setting: positions then begin at 0.
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            with torch.inference_mode():
                logits = self._model(input_ids=ids, attention_mask=mask.long()).logits
            for position, reward in zip(batch, logits[:, 0].float().tolist(), strict=True):
                rewards[position] = reward
        return rewards

    def _encode(self, prompt: str, answer: str) -> list[int]:
        """Tokens of a prompt with its answer; if too long, the start is cut off, except for the first token."""
        if self._template is None and self._tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            ids = encode_plain(self._tokenizer, text)
        else:
            text = (self._template or _PLAIN).format(prompt=prompt, answer=answer)
            ids = encode_whole(self._tokenizer, text)
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and len(ids) > context:
            log.warning("a prompt with its answer has %d tokens; the reward model sees the last %d", len(ids), context)
            ids = [ids[0], *ids[len(ids) - context + 1 :]]  # many models rely on a special first token
        return ids

    def _padding(self) -> int | None:
        """The padding token, by which the model finds the end of a row; None if its configuration has none."""
        pad = self._model.config.get_text_config().pad_token_id
        rows = self._model.get_input_embeddings().weight.shape[0]
        return pad if pad is not None and 0 <= pad < rows else None

    def _batches(self, encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Positions of the rows in batches, longest first; single rows if the model could not recognise padding."""
        size = self._batch_size if self._padding() is not None else 1
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), encoded[i]))
        return (order[start : start + size] for start in range(0, len(order), size))


# ---- files -----------------------------------------------------------------------------------------------------------


def _check(reference: str) -> tuple[Path, list[Path]]:
    """The folder of a usable reward model, and the files that determine its behaviour."""
    from evomerge.checkpoints.config import check_config
    from evomerge.checkpoints.folder import (
        check_files,
        check_tokenizer,
        find_tensors,
        load_config,
        refuse_unreadable,
        tokenizer_files,
    )
    from evomerge.checkpoints.places import find_folder
    from evomerge.checkpoints.structure import parse_config

    place = "model"
    if "+" in reference and not Path(reference).is_dir():
        hint = "Merge it into a folder of its own first, with peft's merge_and_unload."
        raise InputError(place, f"{reference} names an adapter, and adapters of reward models are not supported", hint)
    folder = find_folder(reference, place, None)
    check_files(folder, place)
    refuse_unreadable(folder, place)
    config = load_config(folder, place)
    check_config(config, place)
    check_tokenizer(folder, place)
    architecture = str((config.get("architectures") or ["none"])[0])
    if not architecture.endswith(_HEAD):
        problem = f"config.json: architectures is {architecture}, which is not a reward model"
        raise InputError(place, problem, f"Name a model that was saved as one {_HEAD}, with one label.")
    if (labels := parse_config(config, place).num_labels) != 1:
        problem = f"its head has {labels} labels; a reward is one number"
        raise InputError(place, problem, "Name a reward model, whose config.json has one label in id2label.")
    weights = {entry.file for entry in find_tensors(folder, place).values()}
    return folder, sorted({*weights, folder / "config.json", *tokenizer_files(folder)})


def _fingerprint(files: Sequence[Path]) -> str:
    """A hash of the files' names and contents."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _load(folder: Path, device: torch.device | str) -> Any:
    from transformers import AutoModelForSequenceClassification

    from evomerge.checkpoints.config import first_line
    from evomerge.checkpoints.live import for_scoring

    try:
        model, said = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # unusual weights may raise anything inside transformers
        raise InputError("model", f"cannot be loaded as a reward model: {first_line(error)}") from error
    if missing := sorted(said["missing_keys"]):  # they would be random
        raise InputError("model", f"its files lack the weight {missing[0]}", "Complete the download.")
    return for_scoring(model.to(device))
