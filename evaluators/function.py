"""Scores models with a user's own Python function, named in the search file: the evaluator of kind ``python``.

The function gets the items and a ``generate`` bound to the live model, and returns a number for each item. It is code
that runs on this machine, so it needs ``allow_task_code``. It runs in a separate process (``function_process``): if it
never returns, exits or crashes, only the candidate fails, not the worker or the search.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import Field

from evaluators import function_process
from evaluators.base import Graded, ImperativeEvaluator, Item, Split, texts
from evaluators.benchmarks import benchmark_of
from evaluators.function_process import receive, send
from evaluators.item_files import digest, split_items
from evaluators.prompts import PromptSettings, asked_prompt, describe_truncated
from evomerge.errors import InputError
from evomerge.files import TEXT_BYTES, read_bytes
from evomerge.inference.pictures import THUMBNAIL_SIDE, small_copy
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import Engine, Generate, respond_to
from evomerge.json_lines import read_lines

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""How often the memory of a running function is checked; most finish sooner."""

_UNWIND_S = 5.0
"""How long a cancelled function may take to end by itself."""

_TRY_S = 15.0
"""How long a function may take for one item before a search, unless its settings have a time limit."""


class FunctionSettings(PromptSettings):
    """The settings of a user's function.

    Attributes:
        file: the Python file that contains the function.
        function: its name, called as ``function(items, generate)``.
        given: the function's second argument: "generate", which asks the model; or "weights", the location of the
            candidate, a ``Path`` to its ``model.safetensors`` or its diffusers folder, for tables of tensors.
        items_file: the items, one JSON object per line; the function gets them as dicts.
        held_out_file: the items for confirmation, if they are in a separate file.
        held_out: without such a file, the share of items for confirmation. The split is decided by a hash of the item.
        metrics: each metric that the function returns, and which direction is better. In addition it may return
            "pictures", a PIL image or None for each item; those of the first items of each split are kept for display.
        batch_size: prompts per batch in ``generate``.
        max_seconds: the time limit of the function for a model, not counting the model's answers. At the start of a
            search it is tried on one item, with a limit of 15 s or this one.
        max_gigabytes: the memory limit of the function's process and all its child processes.
        allow_task_code: consent to run the file.
    """

    kind: Literal["python"] = "python"
    file: Path
    function: str = "score"
    given: Literal["generate", "weights"] = "generate"
    items_file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    metrics: dict[str, Literal["maximize", "minimize"]] = Field(min_length=1)
    batch_size: int = Field(default=16, ge=1)
    max_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    max_gigabytes: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    allow_task_code: bool = False

    def __hash__(self) -> int:  # `metrics` is a dict, which is not hashable
        return hash((self.file, self.function, self.items_file))

    def known_metrics(self) -> Collection[str]:
        return self.metrics

    def check(self) -> None:
        if not self.allow_task_code:
            problem = f"names {self.file.name}, which is code that would run on this machine"
            raise InputError("file", problem, "Read it, then set `allow_task_code: true`.")

    def build(self) -> FunctionEvaluator:
        """Load the function and read the items.

        Raises:
            InputError: code without consent, a file that is not Python or fails to load, no such function; a file of
                items or a line that cannot be read, an empty split, or an item that is in both splits.
        """
        return FunctionEvaluator(self)

    def build_and_try(self) -> FunctionEvaluator:
        evaluator = FunctionEvaluator(self)
        evaluator.try_out()
        return evaluator


@dataclass(frozen=True)
class _Line:
    fields: Mapping[str, Any]
    place: str

    @property
    def hash(self) -> str:
        return digest(self.fields)

    asks = hash  # only the function knows which field is the question

    @property
    def item(self) -> Item:
        """The item, with its fields as JSON."""
        text = json.dumps(dict(self.fields), ensure_ascii=False)
        return Item(self.hash, text, "", benchmark_of(self.fields), place=self.place)


class FunctionEvaluator(ImperativeEvaluator):
    """A user's function with its items, ready to score one live model after another.

    Imperative, because what the function asks next may depend on earlier answers.

    Attributes:
        name: the name of the function's file.
        version: hash of the function's file, of every item, and of the settings. Files that it imports do not count.
        metrics: as declared.
    """

    def __init__(self, settings: FunctionSettings) -> None:
        settings.check()
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = {name: way == "maximize" for name, way in settings.metrics.items()}
        self._settings = settings
        self._lines = split_items(_read, settings.items_file, settings.held_out_file, settings.held_out)
        self.splits = {split: [line.item for line in lines] for split, lines in self._lines.items()}
        hashes = {split: [item.id for item in items] for split, items in self.splits.items()}
        code = _read_code(settings.file)
        self._asked_first: list[tuple[str, int]] | None = None
        self._process = _FunctionProcess(settings, code)
        self._process.start()
        said = [settings.function, settings.batch_size, self.metrics, settings.shaping]
        said += [] if settings.given == "generate" else [settings.given]
        self.version = digest(["python 1", hashlib.sha256(code).hexdigest(), hashes, said])

    def try_out(self) -> list[tuple[str, int]]:
        """Let the function score the first item with empty answers; return what it asks first, with max_new_tokens.

        Otherwise a search would wait for a function that never returns once for every source. Errors after the function
        has asked a model are ignored, since a model would have answered differently.

        Raises:
            InputError: it exceeds its time limit, or fails before it has asked a model anything.
        """
        if self._settings.given == "weights":
            return []  # there are no weights yet
        if self._asked_first is not None:
            return self._asked_first
        asked: list[list[tuple[str, int]]] = []

        def say_nothing(prompts: Sequence[str], most: int, stop: Sequence[str]) -> list[str]:
            asked.append([(text, most) for text in prompts])
            return [""] * len(prompts)

        settings = self._settings
        limit_s = settings.max_seconds if "max_seconds" in settings.model_fields_set else _TRY_S
        try:
            self._process.call(self._lines["search"][:1], list(self.metrics), say_nothing, limit_s)
        except _LimitExceededError:
            raise
        except InputError:
            if not asked:
                raise
        self._asked_first = next((prompts for prompts in asked if prompts), [])
        return self._asked_first

    def first_prompts(self, reader: Reader) -> list[Prompt]:
        """What the function asks first for the first item; runs the function, with empty answers.

        Raises:
            InputError: as for ``try_out``, or a prompt that does not fit such a model.
        """
        place = self._lines["search"][0].place
        return [asked_prompt(reader, self._settings, text, most, place) for text, most in self.try_out()]

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """Let the function score the items at these positions.

        Raises:
            InputError: the function fails, with its file and line, or returns anything but numbers as declared.
        """
        given = [self._lines[split][index] for index in indices]
        if self._settings.given == "weights":
            return self._score_weights(given, indices, live)
        generate = _Generate(Reader.of(live), engine, self._settings)
        started = time.perf_counter()
        said = self._process.call(
            given, list(self.metrics), generate, self._settings.max_seconds, pictured=_pictured(indices)
        )
        whole = time.perf_counter() - started
        answers: Mapping[int, str] = {}
        if len(generate.answers) == len(indices):  # otherwise only the function knows which answer is for which item
            answers = dict(zip(indices, generate.answers, strict=True))
        seconds = {"generate": generate.seconds, "score": whole - generate.seconds}
        return Graded(said.scores, answers, seconds, said.drawings(indices, given))

    def _score_weights(self, given: Sequence[_Line], indices: Sequence[int], live: LiveModel) -> Graded:
        """Let the function score the items with a candidate that is on disk."""
        from evomerge.raw.written import WrittenTable

        if not isinstance(live.model, WrittenTable):
            raise InputError("given", "is weights, and this is a model of transformers", "Take `given: generate`.")
        most, path = self._settings.max_seconds, live.model.path
        said = self._process.call(given, list(self.metrics), _ask_nothing, most, path, _pictured(indices))
        return Graded(said.scores, drawings=said.drawings(indices, given))


PICTURED_ITEMS = 8
"""For how many items of a split generated pictures are kept, from the first: a search may have thousands of items."""


def _pictured(indices: Sequence[int]) -> list[int]:
    """Which of the requested items have pictures to keep, by their position in the request."""
    return [place for place, index in enumerate(indices) if index < PICTURED_ITEMS]


@dataclass(frozen=True)
class _Returned:
    """What a function returned.

    Attributes:
        numbers: one per item, by metric.
        pictures: PNG, by the item's position in the request.
    """

    numbers: Mapping[str, Sequence[float]]
    pictures: Mapping[int, bytes]

    @property
    def scores(self) -> dict[str, NDArray[np.float32]]:
        return {metric: np.array(numbers, dtype=np.float32) for metric, numbers in self.numbers.items()}

    def drawings(self, indices: Sequence[int], lines: Sequence[_Line]) -> dict[int, bytes]:
        """Its pictures as in ``Graded``, encoded again because the function's process may send anything.

        Raises:
            InputError: one of them is not a picture.
        """
        return {indices[place]: small_copy(image, lines[place].place) for place, image in self.pictures.items()}


def _ask_nothing(prompts: Sequence[str], most: int, stop: Sequence[str]) -> list[str]:
    """Takes the place of the model if the function is given weights."""
    raise InputError("given", "is weights: there is no model to ask")


class _Generate:
    """The model's side of the function's ``generate``.

    Attributes:
        seconds: the time the model has taken so far.
        answers: everything it has written so far.
    """

    def __init__(self, reader: Reader, engine: Engine, settings: FunctionSettings) -> None:
        self.seconds = 0.0
        self.answers: list[str] = []
        self._reader, self._engine, self._settings = reader, engine, settings

    def __call__(self, prompts: Sequence[str], most: int, stop: Sequence[str]) -> list[str]:
        """Answer prompts. If some are truncated at the beginning, this is logged, once for the same prompts."""
        started = time.perf_counter()
        try:
            places = [f"prompt {number + 1}" for number in range(len(prompts))]
            asked = [
                asked_prompt(self._reader, self._settings, text, most, place)
                for text, place in zip(prompts, places, strict=True)
            ]
            if said := describe_truncated([prompt for prompt in asked if prompt.lost]):
                _warn(said)
            requests = [Generate(prompt, most, tuple(stop), self._settings.batch_size) for prompt in asked]
            answers = texts(respond_to(self._engine, requests))
        finally:
            self.seconds += time.perf_counter() - started
        self.answers += answers
        return answers


class _LimitExceededError(InputError):
    """A function exceeds its time or memory limit."""


@cache
def _warn(message: str) -> None:
    """Warn once per message, because the same items are scored for every candidate."""
    log.warning(message)


class _FunctionProcess:
    """The process that a function runs in: started when needed, and again after one was lost."""

    def __init__(self, settings: FunctionSettings, code: bytes) -> None:
        self._settings = settings
        self._told = {
            "file": str(settings.file),
            "function": settings.function,
            "module": f"evomerge_function_{hashlib.sha256(code).hexdigest()[:16]}",
            "code": base64.b64encode(code).decode(),
            "path": sys.path,
        }
        self._stop: Callable[[], object] | None = None
        self._is_idle = False
        self._process: subprocess.Popen[bytes]
        self._channel: socket.socket

    def start(self) -> None:
        """Start the process, and let it load the file.

        Raises:
            InputError: loading fails, ends the process, or takes too long.
        """
        ours, its = socket.socketpair()
        ends, worker = os.pipe()  # nothing is written to it; it is closed when this process ends
        command = [sys.executable, "-P", "-u", function_process.__file__, str(its.fileno()), str(ends)]
        with its, _closing(ends):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(its.fileno(), ends), start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )  # fmt: skip
        self._channel = ours
        self._stop = weakref.finalize(self, _end, self._process, ours, worker)
        self._send(self._told)
        limit_s = self._settings.max_seconds
        answer = self._wait(time.monotonic() + limit_s, limit_s, "when it was loaded")
        if "loaded" not in answer:
            self.stop()
            raise self._fault(answer)

    def call(
        self,
        lines: Sequence[_Line],
        metrics: Sequence[str],
        generate: Callable[[Sequence[str], int, Sequence[str]], list[str]],
        limit_s: float,
        weights: Path | None = None,
        pictured: Sequence[int] = (),
    ) -> _Returned:
        """Let the function score items: finite numbers by metric, one per item.

        Args:
            limit_s: the time limit, not counting the model's answers.
            weights: the path that it is given instead of ``generate``.
            pictured: the positions of items whose pictures are wanted.

        Raises:
            InputError: the function fails, ends its process, takes too long, or returns anything else. Exceptions of
                the model in ``generate`` are passed on unchanged.
        """
        if self._stop is None:
            self.start()
        self._is_idle = False
        try:
            deadline = time.monotonic() + limit_s
            asked_of = {"items": [line.fields for line in lines], "metrics": metrics, "count": len(lines)}
            asked_of |= {"pictured": list(pictured), "side": THUMBNAIL_SIDE}
            self._send(asked_of if weights is None else {**asked_of, "weights": str(weights)})
            while "prompts" in (answer := self._wait(deadline, limit_s, f"in {self._settings.function}")):
                asked = time.monotonic()
                answers = self._answers(answer, generate)
                deadline += time.monotonic() - asked
                self._send({"answers": answers})
        except BaseException:
            if self._process.poll() is not None or not self._is_idle:
                self.stop()
            raise
        if "numbers" not in answer:
            raise self._fault(answer, lines)
        pictures = {int(place): base64.b64decode(image) for place, image in answer[function_process.PICTURES].items()}
        return _Returned(answer["numbers"], pictures)

    def stop(self) -> None:
        """End the process and all its child processes."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def _answers(self, asked: Mapping[str, Any], generate: Callable[..., list[str]]) -> list[str]:
        """The model's answers. If the model raises, the function is cancelled; if that works, the process is kept."""
        try:
            return generate(asked["prompts"], asked["most"], asked["stop"])
        except BaseException:
            with contextlib.suppress(InputError):
                self._send({"end": True})
                self._is_idle = "ended" in self._wait(time.monotonic() + _UNWIND_S, _UNWIND_S, "when it was ended")
            raise

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the error is reported by the call that waits for the answer
            self._channel.settimeout(self._settings.max_seconds)
            send(self._channel, message)

    def _wait(self, deadline: float, limit_s: float, when: str) -> dict[str, Any]:
        """The next message.

        Args:
            deadline: in terms of ``time.monotonic``.
            limit_s: the full time limit, for the error message.

        Raises:
            InputError: it does not come in time, the process has ended, or it has used too much memory.
        """
        file = str(self._settings.file)
        try:
            self._watch(deadline, when)
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            message = receive(self._channel)
        except TimeoutError:
            self.stop()
            hint = "Fix it, or set how long it may take as `max_seconds:`."
            raise _LimitExceededError(file, f"took more than {limit_s:g} s {when}", hint) from None
        except (OSError, ValueError, RecursionError):  # the function wrote to a socket that it does not own
            message = None
        if message is None:
            process = self._process
            self.stop()
            raise InputError(file, f"ended its process {when} ({_how(process.wait())})", "Have it return, or raise.")
        return message

    def _watch(self, deadline: float, when: str) -> None:
        """Check the memory of the process until it sends something, or its time is up.

        Raises:
            InputError: it uses more than it may.
        """
        poll, most = select.poll(), self._settings.max_gigabytes
        poll.register(self._channel, select.POLLIN)
        while True:
            if (taken := _memory_of(self._process.pid) / 1e9) > most:
                self.stop()
                hint = "Have it keep less, or say how much it may take as `max_gigabytes:`."
                problem = f"took {taken:.1f} GB of memory {when}, of {most:g} GB that it may have"
                raise _LimitExceededError(str(self._settings.file), problem, hint)
            left = deadline - time.monotonic()
            if left <= 0 or poll.poll(1000 * min(left, _LOOK_S)):
                return

    def _fault(self, answer: Mapping[str, Any], lines: Sequence[_Line] = ()) -> InputError:
        """The error that the process reports, for a call with these items."""
        place, hint = str(self._settings.file), str(answer.get("hint", ""))
        if "returned" in answer:
            metric = f": {answer['metric']}" if "metric" in answer else ""
            of = f" for {lines[answer['position']].place}" if "position" in answer else ""
            return InputError(f"{place}, {self._settings.function}{metric}", f"{answer['returned']}{of}", hint)
        if answer.get("line"):
            place += f", line {answer['line']}"
        return InputError(place, str(answer.get("problem", "said nothing that can be understood")), hint)


@contextlib.contextmanager
def _closing(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


def _memory_of(process: int) -> int:
    """Bytes used by a process and all its child processes; 0 if it is gone."""
    taken = 0
    with contextlib.suppress(psutil.Error):
        own = psutil.Process(process)
        for one in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                taken += one.memory_info().rss
    return taken


def _end(process: subprocess.Popen[bytes], channel: socket.socket, worker: int) -> None:
    """End a process with its session."""
    channel.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    os.close(worker)
    process.wait()


def _how(code: int) -> str:
    """Describe how a process ended, given its return code."""
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _read(file: Path) -> list[_Line]:
    return [_Line(line.fields, line.place) for line in read_lines(file)]


def _read_code(file: Path) -> bytes:
    if not file.exists():
        raise InputError(str(file), "there is no such file", "A path is relative to the folder of the search file.")
    return read_bytes(file, str(file), TEXT_BYTES)
