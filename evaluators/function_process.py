"""The process that a user's function runs in. This file is separate because it needs only Python.

Whatever the function does to this process or to itself, the worker continues: it waits only as long as its limits
allow, and then starts another process. The two exchange length-prefixed JSON messages over a socket:

- the worker sends what to load, and receives whether that worked;
- it sends items, receives any number of requests for answers of its model, and finally numbers or an error.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import numbers
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from operator import index
from pathlib import Path
from types import ModuleType
from typing import Any

LARGEST = 3.4028234663852886e38
"""The largest number that a float32 score can hold."""

PICTURES = "pictures"
"""The key under which a function may return pictures in addition to numbers."""

_MAX_BYTES = 1 << 30
_MAX_SHOWN = 100


def send(channel: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message."""
    content = json.dumps(message).encode()
    channel.sendall(len(content).to_bytes(8, "big") + content)


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other side is gone.

    Raises:
        ValueError: the data is not a message.
    """
    head = _read(channel, 8)
    size = int.from_bytes(head, "big")
    if size > _MAX_BYTES:
        raise ValueError(f"a message of {size} bytes")
    content = _read(channel, size) if head else b""
    return json.loads(content) if content else None


def _read(channel: socket.socket, size: int) -> bytes:
    """Read this many bytes, or none at all if the other side is gone."""
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Ended(BaseException):
    """The worker has cancelled this call."""


class _Generate:
    """What the function gets as ``generate``.

    Attributes:
        ended: the worker has cancelled the call that this belongs to.
    """

    def __init__(self, channel: socket.socket, process: int) -> None:
        self.ended = False
        self._channel, self._process = channel, process

    def __call__(self, prompts: Sequence[str], max_new_tokens: int = 256, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to the prompts, in order; an answer ends before the first of the strings in ``stop``."""
        for name, texts in (("prompts", prompts), ("stop", stop)):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"generate takes {name} as a list of texts")
        if index(max_new_tokens) < 1:
            raise ValueError("generate takes max_new_tokens of 1 or more")
        if os.getpid() != self._process:
            raise RuntimeError("generate answers in the process that called the function, and in none that it started")
        if self.ended:
            raise _Ended
        send(self._channel, {"prompts": list(prompts), "most": index(max_new_tokens), "stop": list(stop)})
        answer = receive(self._channel)
        if answer is None or "answers" not in answer:
            self.ended = True
            raise _Ended
        answers: list[str] = answer["answers"]
        return answers


_DEEPEST = 20_000
"""The maximum recursion depth of user code, whatever limit it sets itself: each level takes half a kilobyte."""


def _bound_recursion() -> None:
    lift = sys.setrecursionlimit
    sys.setrecursionlimit = lambda limit, /: lift(min(limit, _DEEPEST))


def _load(setup: Mapping[str, Any]) -> Callable[..., object] | dict[str, Any]:
    """The function, after running the file's code, or the error."""
    file, name = setup["file"], setup["function"]
    _bound_recursion()
    sys.path[:] = setup["path"]
    module = ModuleType(setup["module"])
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look up their own module there
    try:
        exec(compile(base64.b64decode(setup["code"]), file, "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        return {"problem": f"is not Python ({error.msg})", "line": error.lineno}
    except BaseException as error:  # such as SystemExit, which must not end this process
        return _blame(file, "failed when it was loaded", error)
    function: Callable[..., object] | None = getattr(module, name, None)
    if callable(function):
        return function
    made = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
    return {"problem": f"has no function {name!r}; it has: {made or 'none'}", "hint": "Name one as `function:`."}


def _call(function: Callable[..., object], request: Mapping[str, Any], generate: _Generate) -> dict[str, Any]:
    """Score items with the function and check the result: {"numbers": by metric}, with pictures if it made any, or an
    error.
    """
    metrics: list[str] = request["metrics"]
    pictures: object = None
    try:
        given = Path(request["weights"]) if "weights" in request else generate
        returned = function(request["items"], given)
        if isinstance(returned, Mapping) and PICTURES in returned and PICTURES not in metrics:
            pictures = returned[PICTURES]
            returned = {name: values for name, values in returned.items() if name != PICTURES}
        if not isinstance(returned, Mapping):
            if len(metrics) > 1:
                wanted = ", ".join(metrics)
                return {
                    "returned": "returned no mapping, and several metrics are declared",
                    "hint": f"Return {{metric: numbers}} for {wanted}.",
                }
            returned = {metrics[0]: returned}
        if set(returned) != set(metrics):
            problem = f"returned {', '.join(map(str, returned)) or 'no metric'}, where {', '.join(metrics)} is declared"
            return {"returned": problem, "hint": "Fix the function, or `metrics:`."}
        by_metric = {}
        for metric in metrics:
            values = _numbers(returned[metric], request["count"])
            if isinstance(values, dict):
                return values | {"metric": metric}
            by_metric[metric] = values
        drawn = {} if pictures is None else _pictures(pictures, request)
        if "returned" in drawn:
            return drawn
    except BaseException as error:  # any exception is the function's
        return _blame(request["file"], f"{request['function']} failed", error)
    return {"numbers": by_metric, PICTURES: drawn}


def _pictures(returned: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Small copies of the wanted pictures, by position, as PNG in base64; or an error.

    They are PIL images, but this file does not import PIL: a function without pictures does not need it.
    """
    pictures, count = list(itertools.islice(returned, request["count"] + 1)), request["count"]
    if len(pictures) != count:
        many = f"more than {count}" if len(pictures) > count else f"{len(pictures)}"
        return {"returned": f"returned {many} pictures for {count} items", "hint": "Return one for each, or None."}
    encoded = {}
    for position in request["pictured"]:
        if (picture := pictures[position]) is None:
            continue
        if not all(hasattr(picture, method) for method in ("convert", "thumbnail", "save")):
            hint = "Return PIL images: `PIL.Image.fromarray(array)`."
            return {"returned": f"returned {_shown(picture)} as a picture", "position": position, "hint": hint}
        small, stream = picture.convert("RGB"), io.BytesIO()
        small.thumbnail((request["side"], request["side"]))
        small.save(stream, "PNG")
        encoded[str(position)] = base64.b64encode(stream.getvalue()).decode()
    return encoded


def _numbers(returned: Any, count: int) -> list[float] | dict[str, Any]:
    """The numbers returned for a metric, or an error; booleans count as 0 and 1."""
    try:
        values = list(itertools.islice(returned, count + 1))
    except TypeError:
        return {
            "returned": f"returned {type(returned).__name__}, not a number for each item",
            "hint": "Return a list of numbers in the order of the items.",
        }
    if len(values) != count:
        many = f"more than {count}" if len(values) > count else f"{len(values)}"
        return {"returned": f"returned {many} numbers for {count} items", "hint": "Return one for each, in order."}
    for position, value in enumerate(values):
        a_number = isinstance(value, numbers.Real) or (
            type(value).__module__ == "numpy" and type(value).__name__ == "bool"
        )
        if not a_number or not abs(value) <= LARGEST:  # also rejects NaN
            return {
                "returned": f"returned {_shown(value)}",
                "position": position,
                "hint": "Return a finite number.",
            }
    return [float(value) for value in values]


def _shown(value: object) -> str:
    try:
        return repr(value)[:_MAX_SHOWN]
    except ValueError:  # an integer with thousands of digits
        return f"a number of {type(value).__name__} that is too large"


def _blame(file: str, what: str, error: BaseException) -> dict[str, Any]:
    """Report an error of the user's code, with the line of their file where it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:
        message = ""
    said = f"{what} ({type(error).__name__}{': ' if message else ''}{message})"
    return {"problem": said, "line": lines[-1] if lines else None}


def _end_with(worker: int) -> None:
    """End this process, and its child processes, when the worker is gone, whatever runs here then."""
    os.read(worker, 1)
    os.killpg(0, signal.SIGKILL)


def main(channel: socket.socket, worker: int) -> None:
    """Load what the worker names, and call it as often as the worker asks."""
    process = os.getpid()
    threading.Thread(target=_end_with, args=(worker,), daemon=True).start()
    setup = receive(channel)
    if setup is None:
        return
    loaded = _load(setup)
    if os.getpid() != process:  # a fork of this process, made by the file
        os._exit(0)
    send(channel, {"loaded": True} if callable(loaded) else loaded)
    while callable(loaded) and (wanted := receive(channel)) is not None:
        if "items" not in wanted:  # a cancellation of a call that has already ended
            continue
        generate = _Generate(channel, process)
        result = _call(loaded, {**setup, **wanted}, generate)
        if os.getpid() != process:
            os._exit(0)
        send(channel, {"ended": True} if generate.ended else result)
    os._exit(0)  # do not wait for threads that the function started


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
