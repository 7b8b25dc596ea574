"""The time and money that a search has spent, and will spend."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel

from evomerge.prices import HOUR_S, amount_text
from evomerge.store import SearchRow


class Cost(BaseModel):
    """The cost of workers, by the prices in the search file.

    Attributes:
        spent: so far, for the time that workers were used; since the last record, estimated by the recorded mean.
        to_come: until the budget is spent, at the pace so far; None if unknown.
        an_hour: the mean per hour in which workers were used; None before anything was recorded.
        budget: the bound, if there is one.
        gpu_hours: the hours of all GPUs that were used.
    """

    spent: float
    to_come: float | None
    an_hour: float | None
    budget: float | None
    currency: str
    gpu_hours: float

    def with_left(self, seconds: float | None) -> Cost:
        """The same with the cost to come from this many remaining seconds."""
        return self.model_copy(update={"to_come": _to_come(self.an_hour, seconds, self.spent, self.budget)})

    @property
    def text(self) -> str:
        """The cost so far and to come: "12.40 of 100.00 EUR, about 30.20 to come"."""
        spent = amount_text(self.spent, self.currency)
        if self.budget is not None:
            spent = f"{self.spent:,.2f} of {amount_text(self.budget, self.currency)}"
        return spent if self.to_come is None else f"{spent}, about {self.to_come:,.2f} to come"


def cost_of(search: SearchRow, spent_s: float) -> Cost | None:
    """The cost of a search after ``spent_s`` seconds of its drivers; None if its file has no prices."""
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
    """The bounds of a budget that determine when it is spent."""

    @property
    def candidates(self) -> int | None: ...

    @property
    def hours(self) -> float | None: ...


def seconds_left(budget: Bounds, finished: int, spent_s: float, cost: Cost | None) -> float | None:
    """Seconds until the first bound of the budget is reached at the pace so far; patience cannot be predicted."""
    left = []
    if budget.candidates is not None and finished:
        left.append(max(0, budget.candidates - finished) * spent_s / finished)
    if budget.hours is not None:
        left.append(max(0.0, budget.hours * HOUR_S - spent_s))
    if (by_cost := seconds_affordable(cost)) is not None:
        left.append(by_cost)
    return min(left, default=None)


def seconds_affordable(cost: Cost | None) -> float | None:
    """Seconds until the budget of money is spent, at the hourly cost so far."""
    if cost is None or cost.budget is None or not cost.an_hour:
        return None
    return max(0.0, cost.budget - cost.spent) / cost.an_hour * HOUR_S


def _to_come(an_hour: float | None, seconds: float | None, spent: float, budget: float | None) -> float | None:
    if an_hour is None or seconds is None:
        return None
    to_come = an_hour * seconds / HOUR_S
    return to_come if budget is None else min(to_come, max(0.0, budget - spent))
