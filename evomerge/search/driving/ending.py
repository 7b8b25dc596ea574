"""How a driver's run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evomerge.prices import WorkerTime
from evomerge.store import Store

Reason = Literal["candidates", "hours", "patience", "cost", "optimizer", "stop", "cancel", "interrupted"]
"""A bound of the budget that was reached, an optimizer with nothing more to ask, or a user's command."""

_WHY: dict[Reason, str] = {
    "candidates": "{} candidates asked",
    "hours": "{} hours spent",
    "patience": "the front has not changed for {} generations",
    "cost": "{} spent",
    "optimizer": "{}",
    "stop": "asked to stop",
    "cancel": "asked to end at once",
    "interrupted": "interrupted twice",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a search ended.

    Attributes:
        detail: the bound of the budget, or what the optimizer says.
    """

    reason: Reason
    detail: int | float | str = ""

    @property
    def state(self) -> Literal["finished", "stopped", "cancelled"]:
        """The state that it leaves the search in."""
        if self.reason == "stop":
            return "stopped"
        return "cancelled" if self.reason in ("cancel", "interrupted") else "finished"

    @property
    def why(self) -> str:
        """In words."""
        return _WHY[self.reason].format(self.detail)

    @property
    def bound(self) -> str:
        """The key of the search file that continues a finished search if raised; "" if there is none."""
        return f"budget.{self.reason}" if self.reason in ("candidates", "hours", "patience", "cost") else ""

    def record(self, store: Store, *, spent_s: float | None = None, worker_time: WorkerTime | None = None) -> None:
        """Record it; the other arguments are those of ``Store.set_state``."""
        store.set_state(self.state, why=self.why, spent_s=spent_s, worker_time=worker_time)
