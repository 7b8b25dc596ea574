"""What a program of the project does first."""

from __future__ import annotations

import gc

_NEW_OBJECTS = 10_000


def collect_rarely() -> None:
    """Have Python look for cycles of objects after ten thousand new ones, in the place of 700.

    Imports make over a million objects and hardly a cycle, and looking through all of them again and again took a fifth
    of the processor time until a command had something to say. What is in no cycle is freed at once, as ever.
    """
    gc.set_threshold(_NEW_OBJECTS)
