"""Splits an lm-eval task's documents into search and held-out items, and builds the requests for each item."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, UndefinedError
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evaluators.base import Split
from evaluators.lm_eval_tasks import explain
from evaluators.pictures import content_of
from evomerge.errors import InputError
from evomerge.inference.media import Media
from evomerge.inference.pictures import held_media

if TYPE_CHECKING:
    from evaluators.lm_eval import LmEvalSettings

SPEC = re.compile(r"(?P<name>[^\[\]]+?)\s*(\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")

_MAX_DIGITS = 18

FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class Items:
    """One split of a task.

    Attributes:
        source: the split of the dataset that the items come from.
        rows: their positions in it.
        docs: one mapping per item.
        hashes: one per item, of its question and expected answer.
        texts: one per item: its question and expected answer, for display.
        media: one per item: its pictures.
    """

    source: str
    rows: range
    docs: Sequence[Mapping[str, Any]]
    hashes: Sequence[str]
    texts: Sequence[tuple[str, str]]
    media: Sequence[tuple[Media, ...]]

    def place(self, index: int) -> str:
        """The row of the item at a position in the task's data, for messages; rows count from 0 there."""
        return f"row {self.rows[index]} of {self.source!r}"


def read_splits(task: ConfigurableTask, settings: LmEvalSettings) -> dict[Split, Items]:
    """Read both splits.

    Raises:
        InputError: an unknown or empty split, a broken item, or splits that share items.
    """
    processed: dict[str, Any] = {}  # once per split: a task may shuffle here
    splits: dict[Split, Items] = {
        "search": _read_split(task, settings.search, f"task {settings.task}: search", processed),
        "held_out": _read_split(task, settings.held_out, f"task {settings.task}: held_out", processed),
    }
    search, held_out = splits["search"], splits["held_out"]
    place = f"task {settings.task}: held_out"
    hint = "Give two that share nothing, such as `search: test[:500]` and `held_out: test[500:]`."
    if search.source == held_out.source and (shared := set(search.rows) & set(held_out.rows)):
        raise InputError(place, f"shares {len(shared)} rows of {search.source!r} with the search split", hint)
    if shared_items := set(search.hashes) & set(held_out.hashes):
        first = next(i for i, item in enumerate(held_out.hashes) if item in shared_items)
        raise InputError(
            place,
            f"has {len(shared_items)} items that the search split has too ({held_out.place(first)} is the first: same "
            "question, same answer)",
            hint,
        )
    return splits


def _read_split(task: ConfigurableTask, spec: str, place: str, processed: dict[str, Any]) -> Items:
    match = SPEC.fullmatch(spec)
    if match is None:
        raise InputError(place, f"{spec!r} is not a split", "Write `test`, `test[250:]` or `test[250:1319]`.")
    config = task.config
    roles = {"training": config.training_split, "validation": config.validation_split, "test": config.test_split}
    source = roles.get(match["name"]) or match["name"]
    if source not in task.dataset:
        known = [f"{role} ({split})" for role, split in roles.items() if split]
        known += [split for split in task.dataset if split not in roles.values()]
        raise InputError(place, f"there is no split {match['name']!r}", f"There are: {', '.join(known)}.")
    if source not in processed:
        try:
            docs = task.dataset[source]
            processed[source] = config.process_docs(docs) if config.process_docs else docs
        except Exception as error:
            raise explain(error, place) from error
    docs = processed[source]
    # Python refuses to convert strings with too many digits; this many exceed any number of items.
    start, stop = (None if bound is None else int(bound[:_MAX_DIGITS]) for bound in (match["start"], match["stop"]))
    rows = range(len(docs))[start:stop]
    if not rows:
        raise InputError(place, f"{spec!r} has no items; {source!r} has {len(docs)}")
    chosen = [dict(docs[row]) for row in rows]
    check = _ItemCheck(task, place)
    read = [check(row, doc) for row, doc in zip(rows, chosen, strict=True)]
    hashes, texts, media = zip(*read, strict=True)
    return Items(source, rows, chosen, hashes, texts, media)


class _ItemCheck:
    """Rejects items that lm-eval would score wrongly without notice, and hashes and reads the others."""

    def __init__(self, task: ConfigurableTask, place: str) -> None:
        self._task, self._place = task, place
        strict: Environment = utils.env.overlay(finalize=_no_none)
        self._templates, self._columns = [], []
        for text in (task.config.doc_to_text, task.config.doc_to_target):
            if isinstance(text, str):
                if text in task.features:
                    self._columns.append(text)
                else:
                    self._templates.append(strict.from_string(text))

    def __call__(self, row: int, doc: Mapping[str, Any]) -> tuple[str, tuple[str, str], tuple[Media, ...]]:
        """The item's hash; its question and answer; its pictures."""
        task = self._task
        try:
            self._refuse_gaps(doc)
            question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = None if task.config.doc_to_choice is None else task.doc_to_choice(doc)
            media = _media(task, doc)
            if task.OUTPUT_TYPE == "multiple_choice" and task.config.process_results is None:
                _check_gold(question if task.multiple_input else answer, choices)
        except Exception as error:
            raise explain(error, f"{self._place}, row {row}") from error
        asked = answer if task.multiple_input else question  # the choices precede a common ending
        hashed = digest([question, choices, answer, *content_of(media)])
        return hashed, (str(asked), _answer_text(answer, choices)), media

    def _refuse_gaps(self, doc: Mapping[str, Any]) -> None:
        """``datasets`` fills a missing field with None, which Jinja prints as the word "None"."""
        for template in self._templates:
            template.render(**doc)
        for column in self._columns:
            if doc[column] is None:
                raise UndefinedError(f"{column!r} has no value")


def _media(task: ConfigurableTask, doc: Mapping[str, Any]) -> tuple[Media, ...]:
    """The pictures of an item."""
    if task.config.doc_to_image is None:
        return ()
    from PIL.Image import Image

    images = task.doc_to_image(doc)
    if not isinstance(images, list) or not all(isinstance(image, Image) for image in images):
        raise ValueError(f"`doc_to_image` gives {str(images)[:100]}; lm-eval wants a list of PIL images")
    return tuple(map(held_media, images))


def _answer_text(answer: Any, choices: Any) -> str:
    """The right answer, or all of several; choices given by index are replaced by their texts."""
    answers = answer if isinstance(answer, list) else [answer]
    return " | ".join(str(choices[one]) if isinstance(one, int) and choices else str(one) for one in answers)


def _no_none(value: Any) -> Any:
    if value is None:
        raise UndefinedError("a field has no value")
    return value


def _check_gold(gold: Any, choices: Any) -> None:
    """lm-eval counts an item whose answer is not among its choices as wrong, whatever the model says."""
    for answer in gold if isinstance(gold, list) else [gold]:
        if isinstance(answer, int) and not 0 <= answer < len(choices):
            raise ValueError(f"the answer is number {answer} of {len(choices)} choices (the first is 0)")
        if isinstance(answer, str) and answer not in choices:
            raise ValueError(f"the answer {answer!r} is not among the choices {choices!r}")


def build_requests(
    task: ConfigurableTask, items: Items, settings: LmEvalSettings, chat_template: Any = None
) -> list[list[Instance]]:
    """The requests of each item: prompts with their few-shot examples, ready to be answered.

    The examples of an item depend on its position in the split, not on which items are scored.

    Raises:
        InputError: more examples than there are, or task code that fails on an item.
    """
    shots = task.fewshot_cfg
    if shots.split is None and shots.samples is None:  # lm-eval's own rule, which it does not record
        shots.split = task.config.training_split or task.config.validation_split or task.config.test_split
    task.config.test_split = items.source  # lm-eval excludes an item from its own examples if these two are equal
    task.set_fewshot_seed(FEWSHOT_SEED)
    chat = {"apply_chat_template": chat_template is not None, "chat_template": chat_template}
    requests = []
    for position, doc in enumerate(items.docs):
        try:
            prompt = task.fewshot_context(
                doc,
                num_fewshot=task.config.num_fewshot,
                system_instruction=settings.system_instruction,
                fewshot_as_multiturn=True,
                gen_prefix=task.doc_to_prefix(doc),
                **chat,
            )
            made = task.construct_requests(
                doc=doc, ctx=prompt, metadata=(settings.task, position, task.config.repeats), **chat
            )
        except InputError:
            raise
        except Exception as error:
            raise explain(error, f"task {settings.task}, {items.place(position)}") from error
        requests.append(made if isinstance(made, list) else [made])
    return requests


def digest(content: object) -> str:
    """First 16 hex digits of the SHA-256 of the content as JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
