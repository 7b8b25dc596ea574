"""When workers may start on a node: a few at a time, and after a failed start not immediately again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from evomerge.errors import InputError

TOGETHER = 4
"""How many workers of a node load sources at once, after the first: by then the files are in the node's page cache, and
more at once would need memory for as many unfinished copies."""

PLACED_TOGETHER = 32
"""How many worker processes of the cluster are started at once. Hundreds at once would overload Ray's head, and the
file system that all import from."""

TRIES = 5
"""Failed starts in a row after which a node is left alone."""

TRIES_AT_FIRST = 2
"""The same while no worker has started anywhere and each reports why: the nodes are then hardly at fault."""

FIRST_PAUSE_S = 5.0
"""How long a node is left alone after a failed start; each further one doubles it. All four pauses are 75 s: time for a
file system to come back, or for an earlier process to release its memory."""


def next_places(free: Mapping[str, float], placing: Mapping[str, int], wanted: float) -> list[str]:
    """The nodes on which to start workers now, in this order: those with most room first, and per node and cluster no
    more at once than can respond soon. More follow as processes have started.

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
    """Remembers how starts on each node have ended. It has no clock: ``now`` is in seconds of any clock.

    Attributes:
        last_fault: why the last failed start failed; None before one.
    """

    def __init__(self) -> None:
        self._failed: dict[str, int] = {}
        self._paused_until: dict[str, float] = {}
        self._any = False
        self._any_died = False
        self.last_fault: InputError | None = None

    def started(self, node: str) -> None:
        """A worker has started there: forget earlier failures."""
        self._any = True
        self._failed.pop(node, None)
        self._paused_until.pop(node, None)

    def failed(self, node: str, now: float, fault: InputError, *, died: bool = False) -> None:
        """A start has failed there: with an error, or because it ``died``, which others may have caused.

        A start that ends during a pause began before it, and adds no information.
        """
        self.last_fault = fault
        self._any_died = self._any_died or died
        if now >= self._paused_until.get(node, now):
            before = self._failed.get(node, 0)
            self._failed[node] = before + 1
            self._paused_until[node] = now + FIRST_PAUSE_S * 2**before

    def is_hopeless(self, node: str) -> bool:
        """Whether no more starts should be tried there."""
        return self._failed.get(node, 0) >= (TRIES if self._any or self._any_died else TRIES_AT_FIRST)

    def limit(self, node: str, loaded: int, now: float) -> int:
        """How many workers may load there at once; ``loaded`` counts those of the node that have done so."""
        if self.is_hopeless(node) or now < self._paused_until.get(node, now):
            return 0
        return TOGETHER if loaded and node not in self._failed else 1

    def most(self, node: str, here: int, loaded: int, now: float) -> float:
        """How many more workers may be sent there: after failures one at a time, besides those that have loaded."""
        return self.limit(node, loaded, now) - (here - loaded) if node in self._failed else float("inf")
