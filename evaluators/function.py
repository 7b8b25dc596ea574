"""Scores models with a person's own Python function, named in the search file: the evaluator of kind ``python``.

The function gets the items and a ``generate`` bound to the live model, and returns a number for each item. It is code
that runs on this machine, so it needs ``allow_task_code``.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluators.base import EvaluatorSettings, Split
from evaluators.benchmarks import benchmark_of, count
from evaluators.item_files import digest, read_lines, split_items
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


_LARGEST = float(np.finfo(np.float32).max)


class FunctionSettings(EvaluatorSettings):
    """What the search file says of a function of one's own.

    Attributes:
        file: the Python file that holds the function.
        function: its name, called as ``function(items, generate)``.
        items_file: the items, a JSON object on each line; the function gets them as dicts.
        held_out_file: items to confirm on, where they are apart.
        held_out: without such a file, the share of items to confirm on. A hash of the item decides of each.
        metrics: each metric that the function returns, and which way is better.
        batch_size: prompts at once in ``generate``.
        allow_task_code: consent to run the file.
    """

    kind: Literal["python"] = "python"
    file: Path
    function: str = "score"
    items_file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    metrics: dict[str, Literal["maximize", "minimize"]] = Field(min_length=1)
    batch_size: int = Field(default=16, ge=1)
    allow_task_code: bool = False

    def __hash__(self) -> int:  # `metrics` is a dict, which has none
        return hash((self.file, self.function, self.items_file))

    def build(self) -> FunctionEvaluator:
        """Load the function and read the items.

        Raises:
            InputError: code without consent, a file that is not Python or fails when it is loaded, no such function;
                a file of items or a line that cannot be read, an empty split, or an item that is in both.
        """
        return FunctionEvaluator(self)


@dataclass(frozen=True)
class _Item:
    fields: Mapping[str, Any]
    place: str

    @property
    def hash(self) -> str:
        return digest(self.fields)

    asks = hash  # nobody but the function knows which field is the question


class FunctionEvaluator:
    """A person's function with its items, ready to score one live model after another.

    Attributes:
        name: that of the function's file.
        version: hash of the function's file, of every item, and of the settings. What the file imports is not in it.
        metrics: as declared.
    """

    def __init__(self, settings: FunctionSettings) -> None:
        if not settings.allow_task_code:
            problem = f"names {settings.file.name}, which is code that would run on this machine"
            raise InputError("file", problem, "Read it, then set `allow_task_code: true`.")
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = {name: way == "maximize" for name, way in settings.metrics.items()}
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}
        self._settings = settings
        self._items = split_items(_read, settings.items_file, settings.held_out_file, settings.held_out)
        self._hashes = {split: [item.hash for item in items] for split, items in self._items.items()}
        code, self._function = _load(settings)
        said = [settings.function, settings.batch_size, self.metrics]
        self.version = digest(["python 1", hashlib.sha256(code).hexdigest(), self._hashes, said])

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item, in the order of the file."""
        return self._hashes[split]

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Each item's fields as JSON: nobody but the function knows which are question and answer."""
        return [(json.dumps(dict(item.fields), ensure_ascii=False), "") for item in self._items[split]]

    def test_items(self, split: Split) -> dict[str, int]:
        """How many items are a public benchmark's test items."""
        return count(benchmark_of(item.fields) for item in self._items[split])

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Have the function score the items at these positions: float32 [len(indices)] for each metric.

        Raises:
            InputError: the function fails, with its file and line, or returns anything but numbers as declared.
        """
        items = self._items[split]
        if outside := [index for index in indices if not 0 <= index < len(items)]:
            raise IndexError(f"{self.name} has {len(items)} items in its {split} split; there is no item {outside[0]}")
        distinct = list(dict.fromkeys(indices))
        self.seconds, self.answers = {}, {}
        if not distinct:
            return {metric: np.empty(0, np.float32) for metric in self.metrics}
        generate = _Generate(model, self._settings.batch_size)
        given = [copy.deepcopy(dict(items[index].fields)) for index in distinct]  # a function may write into them
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some functions print
                returned = self._function(given, generate)
        except Exception as error:
            if error is generate.failed or isinstance(error, MemoryError):
                raise  # the model's fault, which workers tell apart
            raise _blame(self._settings.file, f"{self._settings.function} failed", error) from error
        whole = time.perf_counter() - started
        self.seconds = {"generate": generate.seconds, "score": whole - generate.seconds}
        if len(generate.answers) == len(distinct):  # which of the answers are which item's only the function knows else
            self.answers = dict(zip(distinct, generate.answers, strict=True))
        found = self._checked(returned, len(distinct))
        places = {index: place for place, index in enumerate(distinct)}
        return {metric: values[[places[index] for index in indices]] for metric, values in found.items()}

    def _checked(self, returned: object, count: int) -> dict[str, NDArray[np.float32]]:
        """What the function returned, as arrays: one number an item, or such a list for each metric."""
        place = f"{self._settings.file}, {self._settings.function}"
        wanted = ", ".join(self.metrics)
        if not isinstance(returned, Mapping):
            if len(self.metrics) > 1:
                mend = f"Return {{metric: numbers}} for {wanted}."
                raise InputError(place, "returned no mapping, and several metrics are declared", mend)
            returned = {next(iter(self.metrics)): returned}
        if returned.keys() != self.metrics.keys():
            problem = f"returned {', '.join(map(str, returned)) or 'no metric'}, where {wanted} is declared"
            raise InputError(place, problem, "Mend the function, or `metrics:`.")
        return {metric: _numbers(returned[metric], count, f"{place}: {metric}") for metric in self.metrics}


class _Generate:
    """What the function gets as ``generate``.

    Attributes:
        seconds: how long the model took so far.
        answers: all that it wrote so far.
        failed: what the model itself raised, if it did.
    """

    def __init__(self, live: LiveModel, batch_size: int) -> None:
        self.seconds = 0.0
        self.answers: list[str] = []
        self.failed: Exception | None = None
        self._live = live
        self._batch_size = batch_size

    def __call__(self, prompts: Sequence[str], max_new_tokens: int = 256, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to the prompts, in order; an answer ends before the first of the texts in ``stop``."""
        for name, texts in (("prompts", prompts), ("stop", stop)):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"generate takes {name} as a list of texts")
        from evaluators.generation import generate

        started = time.perf_counter()
        try:
            answers = generate(self._live, list(prompts), max_new_tokens, list(stop), self._batch_size)
            self.answers += answers
            return answers
        except Exception as error:
            self.failed = error
            raise
        finally:
            self.seconds += time.perf_counter() - started


def _read(file: Path) -> list[_Item]:
    return [_Item(line.fields, line.place) for line in read_lines(file)]


def _load(settings: FunctionSettings) -> tuple[bytes, Callable[..., object]]:
    """The bytes of the file, and the function that running these very bytes makes."""
    file, name = settings.file, settings.function
    try:
        code = file.read_bytes()
    except OSError as error:
        mend = "A path is relative to the folder of the search file."
        raise InputError(str(file), f"cannot be read ({error.strerror})", mend) from None
    module = ModuleType(f"evomerge_function_{hashlib.sha256(code).hexdigest()[:16]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their own module up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(code, str(file), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        where = f"{error.filename or file}" + (f", line {error.lineno}" if error.lineno else "")
        raise InputError(where, f"is not Python ({error.msg})") from None
    except Exception as error:
        raise _blame(file, "failed when it was loaded", error) from error
    function = getattr(module, name, None)
    if not callable(function):
        made = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(str(file), f"has no function {name!r}; it has: {made or 'none'}", "Name one as `function:`.")
    return code, function


def _blame(file: Path, what: str, error: Exception) -> InputError:
    """An error of the person's code with the line of their file where it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}, line {lines[-1]}" if lines else str(file)
    message = " ".join(str(error).split())[:300]
    return InputError(place, f"{what} ({type(error).__name__}{': ' if message else ''}{message})")


def _numbers(returned: object, count: int, place: str) -> NDArray[np.float32]:
    """Float32 [count] of what was returned for a metric; booleans count as 0 and 1."""
    try:
        values: list[Any] = list(returned)  # type: ignore[call-overload]
    except TypeError:
        problem = f"returned {type(returned).__name__}, not a number for each item"
        raise InputError(place, problem, "Return a list of numbers in the order of the items.") from None
    if len(values) != count:
        raise InputError(place, f"returned {len(values)} numbers for {count} items", "Return one for each, in order.")
    for position, value in enumerate(values):
        a_number = isinstance(value, Real | np.bool_)
        if not a_number or not abs(value) <= _LARGEST:  # nor is NaN
            problem = f"returned {value!r} for the item at {position} of those given"
            raise InputError(place, problem, "Return a finite number.")
    return np.array([float(value) for value in values], dtype=np.float32)
