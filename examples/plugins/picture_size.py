"""Questions about pictures: the likelihood of the right answer, which can only be known from the picture.

An item is a line such as ``{"question": "How wide is the picture?", "picture": "kite.png", "side": "width"}``; a path
is relative to the file of items. The pictures (PNG) are read when the evaluator is built, and the answer is a side in
pixels. The question is asked as text only. A model that reads images would get the pictures through
``asked_pair(..., media)`` and ``<image>`` in the question.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from evaluators.base import Evaluator, Graded, Item, Outcome, Split, likelihoods
from evaluators.benchmarks import benchmark_of
from evaluators.item_files import digest, fill, split_items
from evaluators.prompts import ItemRequests, PromptSettings, asked_pair
from evomerge.errors import InputError
from evomerge.files import TEXT_BYTES, read_bytes
from evomerge.inference.media import Media
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Likelihood, Request, Response
from evomerge.json_lines import Line, read_lines

_SIDES = ("width", "height")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class PictureSizeSettings(PromptSettings):
    """The settings of the items in the search file.

    Attributes:
        file: the items, a JSON object on each line.
        held_out: the share of items to confirm on, which are chosen by a hash of question and picture.
    """

    kind: Literal["picture_size"] = "picture_size"
    file: Path
    held_out: float = Field(default=0.5, gt=0, lt=1)

    def known_metrics(self) -> Collection[str]:
        return ("log_likelihood",)

    def build(self) -> PictureSizeEvaluator:
        """Read the items and their pictures.

        Raises:
            InputError: a file, a line or a picture that cannot be read, or an empty split.
        """
        return PictureSizeEvaluator(self)


@dataclass(frozen=True)
class _Question:
    """``answer`` follows from the picture; ``content`` is a hash of its bytes."""

    text: str
    answer: str
    picture: Path
    content: str
    place: str
    benchmark: str | None

    @property
    def hash(self) -> str:
        return digest([self.text, self.answer, self.content])

    @property
    def asks(self) -> object:
        return [self.text, self.content]

    @property
    def item(self) -> Item:
        media = (Media("image", self.picture, self.content),)
        return Item(self.hash, self.text, self.answer, self.benchmark, media)


class PictureSizeEvaluator(Evaluator):
    """``log_likelihood``: the mean over the answer's tokens of log p(token | all before it), a natural logarithm."""

    def __init__(self, settings: PictureSizeSettings) -> None:
        self.name = settings.file.stem
        self.metrics = {"log_likelihood": True}
        self._settings = settings
        self._questions = split_items(
            lambda file: [_question(line, file.parent) for line in read_lines(file)],
            settings.file, None, settings.held_out,
        )  # fmt: skip
        self.splits = {split: [question.item for question in questions] for split, questions in self._questions.items()}
        ids = {split: [item.id for item in items] for split, items in self.splits.items()}
        self.version = digest(["picture_size 1", ids, settings.shaping])
        self._requests = ItemRequests(self._make)

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The questions of the items, each with its answer."""
        return self._requests(reader, split, indices)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The metric for each answer."""
        values = [answer.log / answer.tokens for answer in likelihoods(responses)]
        return Graded({"log_likelihood": np.array(values, dtype=np.float32)})

    def _make(self, reader: Reader, split: Split, index: int) -> list[Request]:
        question = self._questions[split][index]
        return [Likelihood(asked_pair(reader, self._settings, question.text, question.answer, question.place))]


def _question(line: Line, folder: Path) -> _Question:
    text, picture = fill("question", "{question}", line), folder / fill("picture", "{picture}", line)
    side = line.fields.get("side", "width")
    if side not in _SIDES:
        raise InputError(line.place, f"its side {side!r} is neither of {', '.join(_SIDES)}", "Fix the item.")
    content = read_bytes(picture, f"{line.place}: picture", TEXT_BYTES)
    size = dict(zip(_SIDES, png_size(content, f"{line.place}: picture"), strict=True))
    hashed = hashlib.sha256(content).hexdigest()
    return _Question(text, f" {size[side]} pixels", picture, hashed, line.place, benchmark_of(line.fields))


def png_size(content: bytes, place: str) -> tuple[int, int]:
    """Width and height of a PNG picture, in pixels (PNG specification, section 11.2.2).

    Raises:
        InputError: it is not a PNG picture, or it is damaged or truncated.
    """
    header = content[len(_SIGNATURE) + 4 : len(_SIGNATURE) + 21]  # the chunk's name and its 13 bytes
    sum_of_header = content[len(_SIGNATURE) + 21 : len(_SIGNATURE) + 25]
    if content[:8] != _SIGNATURE or header[:4] != b"IHDR" or len(header) != 17:
        raise InputError(place, "is not a PNG picture", "Save it as PNG.")
    width, height = int.from_bytes(header[4:8]), int.from_bytes(header[8:12])
    is_whole = content[-8:-4] == b"IEND" and zlib.crc32(header) == int.from_bytes(sum_of_header)
    if not is_whole or not width or not height:
        raise InputError(place, "is a PNG picture that is damaged or cut", "Copy it again.")
    return width, height
