"""Which cases of a test every commit is tested with."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# The architectures that every commit is tested on: a plain one, biases and a tied head, two kinds of layers in turn,
# matrices that lie the other way round, experts, and no attention at all.
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "mamba")


def nightly_but(commit: Collection[str], names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test, all but those of ``commit`` nightly."""
    return [name if name in commit else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def architectures(names: Iterable[str]) -> list[Any]:
    """Architectures as parameters of a test, all but six families nightly."""
    return nightly_but(FAMILIES, names)
