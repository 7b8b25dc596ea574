"""When workers may start on a node: few at once, and where one has failed to start, not at once again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

TOGETHER = 4
"""Workers of a node that load sources at once, after the first: by then the files are in the node's memory, and more at
once would want memory for as many unfinished copies."""

PLACED_TOGETHER = 32
"""Workers of the cluster whose processes are started at once. Hundreds at once would keep Ray's head, and a file system
that all import from, from answering."""

TRIES = 5
"""Failed starts in a row after which a node is left alone."""

TRIES_AT_FIRST = 2
"""The same as long as no worker has started anywhere, and each says why: that is hardly the fault of the nodes."""

FIRST_PAUSE_S = 5.0
"""How long a node is left alone after a failed start; each further one doubles it. All four pauses are 75 s, in which a
file system comes back, or an earlier process gives its memory back."""


def next_places(free: Mapping[str, float], placing: Mapping[str, int], wanted: float) -> list[str]:
    """The nodes on which workers are started now, in this order: where there is most room first, and no more at once of
    a node and of the cluster than answer soon. As processes have started, the next ones are.

    Args:
        free: how many more workers may be sent to each node.
        placing: how many processes of each node are being started.
        wanted: how many more workers are wanted.
    """
    left, starting = dict(free), Counter(placing)
    places: list[str] = []
    while len(places) < wanted and starting.total() < PLACED_TOGETHER:
        able = [node for node, room in left.items() if room > 0 and starting[node] < TOGETHER]
        if not able:
            break
        node = max(able, key=lambda each: left[each])
        places.append(node)
        left[node] -= 1
        starting[node] += 1
    return places


class Starts:
    """Remembers how starts on each node have ended. It has no clock: ``now`` is in seconds of whichever one is used.

    Attributes:
        last_words: those of the last start that failed, after the name of its node.
    """

    def __init__(self) -> None:
        self._failed: dict[str, int] = {}
        self._paused_until: dict[str, float] = {}
        self._any = False
        self._any_died = False
        self.last_words = ""

    def started(self, node: str) -> None:
        """A worker has started there: what failed before is over."""
        self._any = True
        self._failed.pop(node, None)
        self._paused_until.pop(node, None)

    def failed(self, node: str, now: float, words: str, *, died: bool = False) -> None:
        """A start has failed there: by what it says, or because it ``died``, which somebody may have brought about.

        What ends in a pause began before it, and says nothing new.
        """
        self.last_words = words
        self._any_died = self._any_died or died
        if now >= self._paused_until.get(node, now):
            before = self._failed.get(node, 0)
            self._failed[node] = before + 1
            self._paused_until[node] = now + FIRST_PAUSE_S * 2**before

    def is_hopeless(self, node: str) -> bool:
        """Whether nothing more is to be tried there."""
        return self._failed.get(node, 0) >= (TRIES if self._any or self._any_died else TRIES_AT_FIRST)

    def limit(self, node: str, loaded: int, now: float) -> int:
        """How many workers may load there at once; ``loaded`` of that node have done so."""
        if self.is_hopeless(node) or now < self._paused_until.get(node, now):
            return 0
        return TOGETHER if loaded and node not in self._failed else 1

    def most(self, node: str, here: int, loaded: int, now: float) -> float:
        """How many more workers may be sent there: where starts fail, one at a time, beside those that have loaded."""
        return self.limit(node, loaded, now) - (here - loaded) if node in self._failed else float("inf")
