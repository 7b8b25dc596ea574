"""A search through a fault of every kind, on a Ray cluster of several nodes; the long one is ``scripts/chaos.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers_miniature import environment

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "chaos.py"
KINDS = 11


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_nothing_is_lost_or_scored_twice_or_hangs_whatever_breaks() -> None:
    command = [sys.executable, str(SCRIPT), "--faults", str(KINDS), "--candidates", "60", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ("faults", "candidates", "lost", "double", "hung")} == {
        "faults": KINDS, "candidates": 60, "lost": 0, "double": 0, "hung": 0,
    }  # fmt: skip
    assert found["zombies"] == 1, "a worker that outlived its node gave scores, and they did not count"
    assert set(Counter(row["kind"] for row in found["rows"]).values()) == {1}, "one of each kind"
    assert [row["kind"] for row in found["rows"] if not row["seen"]] == [], "every fault is in the events"
    assert found["drivers"] == 3, "the first, one after it was killed, and one after the disk was full"
    assert done.returncode == 0, done.stderr
