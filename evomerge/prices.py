"""The cost of workers: the prices in a search file, and the time for which workers and their GPUs are reserved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HOUR_S = 3600.0


class WorkerTime(NamedTuple):
    """Seconds for which workers have been reserved, busy or not: summed over workers, summed over their GPUs, and in
    wall-clock time.
    """

    worker_s: float = 0.0
    gpu_s: float = 0.0
    held_s: float = 0.0

    def plus(self, workers: float, gpus: float, seconds: float) -> WorkerTime:
        """Add a period of ``seconds`` during which this many workers and GPUs were reserved."""
        return WorkerTime(self.worker_s + workers * seconds, self.gpu_s + gpus * seconds, self.held_s + seconds)


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices per hour, in ``currency``: for each GPU, and for each worker regardless of its GPUs."""

    gpu_hour: float
    worker_hour: float
    currency: str

    @classmethod
    def of(cls, gpu_hour: float | None, worker_hour: float | None, currency: str) -> Prices | None:
        """The prices in a search file; None if it has none."""
        if gpu_hour is None and worker_hour is None:
            return None
        return cls(gpu_hour or 0.0, worker_hour or 0.0, currency)

    def cost(self, held: WorkerTime) -> float:
        """The cost of this time."""
        return (held.worker_s * self.worker_hour + held.gpu_s * self.gpu_hour) / HOUR_S

    def cost_an_hour(self, workers: float, gpus: float) -> float:
        """The cost per hour of this many workers with this many GPUs in total."""
        return workers * self.worker_hour + gpus * self.gpu_hour


def amount_text(amount: float, currency: str) -> str:
    """An amount for display: 12.40 EUR."""
    return f"{amount:,.2f} {currency}"
