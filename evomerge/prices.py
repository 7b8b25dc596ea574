"""What workers cost: the prices that a search file gives, and the time that workers and their GPUs are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HOUR_S = 3600.0


class WorkerTime(NamedTuple):
    """Seconds that workers have been held, whether at work or not: of each worker, of each GPU of theirs, and of the
    clock meanwhile.
    """

    worker_s: float = 0.0
    gpu_s: float = 0.0
    held_s: float = 0.0

    def plus(self, workers: float, gpus: float, seconds: float) -> WorkerTime:
        """The time with so many workers and GPUs held for so many seconds more."""
        return WorkerTime(self.worker_s + workers * seconds, self.gpu_s + gpus * seconds, self.held_s + seconds)


@dataclass(frozen=True, slots=True)
class Prices:
    """What an hour costs, in ``currency``: of each GPU, and of each worker whatever GPUs it has."""

    gpu_hour: float
    worker_hour: float
    currency: str

    @classmethod
    def of(cls, gpu_hour: float | None, worker_hour: float | None, currency: str) -> Prices | None:
        """Those of a search file; None where it gives none."""
        if gpu_hour is None and worker_hour is None:
            return None
        return cls(gpu_hour or 0.0, worker_hour or 0.0, currency)

    def cost(self, held: WorkerTime) -> float:
        """What this time costs."""
        return (held.worker_s * self.worker_hour + held.gpu_s * self.gpu_hour) / HOUR_S

    def cost_an_hour(self, workers: float, gpus: float) -> float:
        """What so many workers with so many GPUs in all cost in an hour."""
        return workers * self.worker_hour + gpus * self.gpu_hour


def amount_text(amount: float, currency: str) -> str:
    """An amount as people read it: 12.40 EUR."""
    return f"{amount:,.2f} {currency}"
