"""What a search has spent in time and money, and what is to come."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel

from evomerge.prices import HOUR_S, amount_text
from evomerge.store import SearchRow


class Cost(BaseModel):
    """What workers have cost, by the prices of the search file.

    Attributes:
        spent: so far, for as long as workers were held; since the last record by the mean of what was recorded.
        to_come: until the budget is spent, at the pace so far; None where that is not known.
        an_hour: the mean of the hours in which workers were held; None before anything was recorded.
        budget: what may be spent, where that is bounded.
        gpu_hours: of all GPUs that were held.
    """

    spent: float
    to_come: float | None
    an_hour: float | None
    budget: float | None
    currency: str
    gpu_hours: float

    def with_left(self, seconds: float | None) -> Cost:
        """The same with so many seconds to the end."""
        return self.model_copy(update={"to_come": _to_come(self.an_hour, seconds, self.spent, self.budget)})

    @property
    def text(self) -> str:
        """Spent and to come: 12.40 of 100.00 EUR, about 30.20 to come."""
        spent = amount_text(self.spent, self.currency)
        if self.budget is not None:
            spent = f"{self.spent:,.2f} of {amount_text(self.budget, self.currency)}"
        return spent if self.to_come is None else f"{spent}, about {self.to_come:,.2f} to come"


def cost_of(search: SearchRow, spent_s: float) -> Cost | None:
    """What a search has cost in ``spent_s`` seconds of its drivers; None where its file gives no prices."""
    prices = search.record.cluster.prices
    if prices is None:
        return None
    recorded = prices.cost(search.worker_time)
    an_hour = recorded / search.held_s * HOUR_S if search.held_s > 0 else None
    unrecorded = (an_hour or 0.0) * max(0.0, spent_s - search.spent_s) / HOUR_S
    return Cost(
        spent=recorded + unrecorded,
        to_come=None,
        an_hour=an_hour,
        budget=search.record.budget.cost,
        currency=prices.currency,
        gpu_hours=search.gpu_s / HOUR_S,
    )


class Bounds(Protocol):
    """The bounds of a budget that tell when it is spent."""

    @property
    def candidates(self) -> int | None: ...

    @property
    def hours(self) -> float | None: ...


def seconds_left(budget: Bounds, finished: int, spent_s: float, cost: Cost | None) -> float | None:
    """Seconds until the first bound of the budget is reached at the pace so far; that of patience is not foreseen."""
    left = []
    if budget.candidates is not None and finished:
        left.append(max(0, budget.candidates - finished) * spent_s / finished)
    if budget.hours is not None:
        left.append(max(0.0, budget.hours * HOUR_S - spent_s))
    if (by_cost := seconds_affordable(cost)) is not None:
        left.append(by_cost)
    return min(left, default=None)


def seconds_affordable(cost: Cost | None) -> float | None:
    """Seconds until the budget of money is spent, at what an hour has cost so far."""
    if cost is None or cost.budget is None or not cost.an_hour:
        return None
    return max(0.0, cost.budget - cost.spent) / cost.an_hour * HOUR_S


def _to_come(an_hour: float | None, seconds: float | None, spent: float, budget: float | None) -> float | None:
    if an_hour is None or seconds is None:
        return None
    to_come = an_hour * seconds / HOUR_S
    return to_come if budget is None else min(to_come, max(0.0, budget - spent))
