"""Trying a chat template once before it is used: it is a program that came with a model, and may never end."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from evaluators.prompts import chat_text
from evomerge.errors import InputError

SECONDS = 10
"""How long a template may take for a conversation; most take less than a thousandth of one."""

_MEMORY = 1_000_000_000  # bytes, more than the process has
_MOST_GROWTH = 1_000_000  # characters, beside those of the conversation
_MEMORY_CODE, _LENGTH_CODE = 3, 4


def try_template(tokenizer: Any, turns: Sequence[Mapping[str, str]], place: str) -> None:
    """Render a conversation in a copy of this process that is ended when it takes too long or too much.

    What the template raises is not told here: whoever renders it next meets it again.

    Raises:
        InputError: it does not come to an end.
    """
    if tokenizer.chat_template is None:
        return
    process = os.fork()
    if process == 0:
        _render_and_end(tokenizer, turns)
    _, status = os.waitpid(process, 0)
    if status == 0:
        return
    why = {
        _MEMORY_CODE: "takes more than a gigabyte of memory",
        _LENGTH_CODE: f"makes more than {_MOST_GROWTH:,} characters of a prompt",
        -signal.SIGALRM: f"does not come to an end in {SECONDS} s",
    }.get(os.waitstatus_to_exitcode(status), "ends the program that uses it")
    mend = "Take the tokenizer of another source (`tokenizer:`), or leave `apply_chat_template` out."
    raise InputError(place, f"the tokenizer's chat template {why}", mend)


def _render_and_end(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> None:
    """In the copy. It ends without running anything that this process has at its end."""
    code = 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        text = chat_text(tokenizer, turns)
        if len(text) > _MOST_GROWTH + 10 * sum(len(turn["content"]) for turn in turns):
            code = _LENGTH_CODE
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                code = _MEMORY_CODE
            cause = cause.__cause__
    finally:
        os._exit(code)
