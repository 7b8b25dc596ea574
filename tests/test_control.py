"""Ctrl-C: once to stop, twice to end within seconds, whatever the process is at."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress

import pytest

from evomerge.search.driving import control
from evomerge.search.driving.control import Control


def test_the_first_stops_and_the_second_cancels() -> None:
    word, said = Control(lambda: []), list[str]()
    with word.signals(said.append):
        os.kill(os.getpid(), signal.SIGINT)
        assert (word.stopping, word.cancelled, len(said)) == (True, False, 1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert word.cancelled


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_two_end_it_in_the_midst_of_a_computation(
    numbers: tuple[signal.Signals, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the main thread does not come back to Python, both look like one to it."""
    monkeypatch.setattr(control, "GRACE_S", 0.2)
    ended = threading.Event()
    script = "; ".join(f"kill -{int(number)} {os.getpid()}; sleep 0.05" for number in numbers)
    with Control(lambda: []).signals(lambda text: None, ended.set), suppress(KeyboardInterrupt):
        subprocess.Popen(["sh", "-c", script])
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)  # a second or more, in which no handler is run
    assert ended.is_set()


def test_one_does_not_end_it_and_what_ends_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GRACE_S", 0.2)
    ended = threading.Event()
    with Control(lambda: []).signals(lambda text: None, ended.set):
        os.kill(os.getpid(), signal.SIGINT)
    with Control(lambda: []).signals(lambda text: None, ended.set):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    assert not ended.is_set()
