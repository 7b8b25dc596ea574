"""What a search costs in money: prices of workers and GPUs, what was spent, what is to come, and the budget of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_search import create_store, make_setup, simulate, why

from evomerge.errors import InputError
from evomerge.prices import Prices, WorkerTime
from evomerge.report.spending import Cost, seconds_left
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.driving.ending import Ending
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.search.settings.sections import Budget
from evomerge.store import Store, acquire

FILE = {
    "name": "priced", "sources": {"base": "org/base", "one": "org/one"}, "base": "base",
    "space": {"kind": "parameter_space", "method": "task_arithmetic"},
    "objectives": {"maths": {"task": "mini_math_ja", "metric": "acc_ja"}}, "budget": {"candidates": 40},
}  # fmt: skip

EUROS = Prices(gpu_hour=2.0, worker_hour=0.5, currency="EUR")


def parsed(*, budget: dict[str, object], cluster: dict[str, object], **others: object) -> SearchFile:
    return parse_search_file(FILE | {"budget": budget, "cluster": cluster, **others}, place="s.yaml", root=Path("/"))


def run(folder: Path, setup: Setup, *, workers: int = 3, gpus: float = 0.0) -> Ending:
    """Drive a search by the simulated clock, on the store that is there or on a new one."""
    path = folder / "search.db"
    store = Store.open(path) if path.exists() else create_store(folder, setup)
    with store, acquire(store):
        clock = SimulatedClock()
        pool = SimulatedPool(workers, simulate, clock, gpus)
        control = Control(store.take_commands, interval_s=0.0)
        return Driver(Drive(setup, store, pool, control, logs=folder / "logs", clock=clock)).run()


def cost_recorded(folder: Path, prices: Prices = EUROS) -> float:
    with Store.open(folder / "search.db") as store:
        return prices.cost(store.search().worker_time)


@pytest.mark.parametrize(
    ("held", "cost"),
    [
        (WorkerTime(), 0.0),
        (WorkerTime().plus(workers=4, gpus=0.0, seconds=3600), 2.0),
        (WorkerTime().plus(workers=4, gpus=8.0, seconds=1800), 9.0),
        (WorkerTime().plus(workers=2, gpus=1.0, seconds=3600).plus(workers=1, gpus=0.5, seconds=7200), 6.0),
    ],
)
def test_workers_and_their_gpus_cost_for_as_long_as_they_are_held(held: WorkerTime, cost: float) -> None:
    assert EUROS.cost(held) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("cluster", "budget", "place"),
    [
        ({"gpu_hour": -1}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"gpu_hour": 0}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"gpu_hour": float("nan")}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"gpu_hour": float("inf")}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"gpu_hour": "cheap"}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"gpu_hour": [2.5]}, {"candidates": 4}, "cluster.gpu_hour"),
        ({"worker_hour": -0.1}, {"candidates": 4}, "cluster.worker_hour"),
        ({"worker_hour": "2,50"}, {"candidates": 4}, "cluster.worker_hour"),
        ({"gpu_hour": 1, "currency": ""}, {"candidates": 4}, "cluster.currency"),
        ({"gpu_hour": 1, "currency": "2.5 EUR"}, {"candidates": 4}, "cluster.currency"),
        ({"gpu_hour": 1, "currency": 7}, {"candidates": 4}, "cluster.currency"),
        ({"gpu_hour": 1}, {"cost": 0}, "budget.cost"),
        ({"gpu_hour": 1}, {"cost": -3}, "budget.cost"),
        ({"gpu_hour": 1}, {"cost": float("nan")}, "budget.cost"),
        ({"gpu_hour": 1}, {"cost": "a lot"}, "budget.cost"),
        ({"gpu_price": 1}, {"candidates": 4}, "cluster.gpu_price"),
        ({}, {"cost": 10}, "budget.cost"),
        ({"currency": "EUR"}, {"cost": 10, "hours": 2}, "budget.cost"),
        ({"gpu_hour": 1, "gpus_per_worker": 0}, {"cost": 10}, "budget.cost"),
    ],
)
def test_what_is_no_price_and_a_budget_without_one_are_refused(
    cluster: dict[str, object], budget: dict[str, object], place: str
) -> None:
    with pytest.raises(InputError) as refused:
        parsed(budget=budget, cluster=cluster)
    assert place in f"{refused.value.place} {refused.value.problem}"


def test_gpus_that_a_processor_has_not_pay_for_no_budget() -> None:
    with pytest.raises(InputError, match=r"budget\.cost.*workers have no GPU"):
        parsed(budget={"cost": 10}, cluster={"gpu_hour": 1}, device="cpu")
    assert parsed(budget={"cost": 10}, cluster={"worker_hour": 1}, device="cpu").cluster.prices == Prices(0, 1, "USD")
    priced = parsed(budget={"cost": 10}, cluster={"gpu_hour": 2.5, "currency": "EUR"})
    assert priced.cluster.prices == Prices(2.5, 0.0, "EUR")
    assert parsed(budget={"candidates": 4}, cluster={}).cluster.prices is None


def test_a_budget_of_money_ends_a_search_as_hours_do(tmp_path: Path) -> None:
    setup = replace(make_setup(candidates=None, hours=1.0), budget=Budget(cost=0.05), prices=EUROS)
    ending = run(tmp_path, setup, workers=3, gpus=1.5)
    assert (ending.state, ending.bound) == ("finished", "budget.cost")
    assert why(tmp_path) == "0.05 EUR spent"
    assert 0.05 <= cost_recorded(tmp_path) < 0.1  # a generation of seconds costs less than that
    with Store.open(tmp_path / "search.db") as store:
        held, spent_s = store.search().worker_time, store.search().spent_s
    assert held.gpu_s == pytest.approx(held.worker_s / 2)
    assert held.worker_s == pytest.approx(3 * spent_s)


def test_a_resumed_search_goes_on_from_what_was_spent(tmp_path: Path) -> None:
    setup = replace(make_setup(candidates=None, hours=1.0), budget=Budget(cost=0.01), prices=EUROS)
    run(tmp_path, setup)
    first = cost_recorded(tmp_path)
    run(tmp_path, setup)  # the same budget: nothing is asked for
    assert cost_recorded(tmp_path) == pytest.approx(first)
    run(tmp_path, replace(setup, budget=Budget(cost=0.03)))
    assert 0.03 <= cost_recorded(tmp_path) < 0.06
    assert why(tmp_path) == "0.03 EUR spent"


def test_gpus_that_workers_turn_out_not_to_have_end_a_search_with_a_word(tmp_path: Path) -> None:
    setup = replace(make_setup(), budget=Budget(cost=5.0), prices=Prices(2.0, 0.0, "EUR"))
    with pytest.raises(InputError, match=r"budget\.cost.*never be spent"):
        run(tmp_path, setup, gpus=0.0)


def test_without_prices_workers_are_counted_all_the_same(tmp_path: Path) -> None:
    run(tmp_path, make_setup(candidates=20), workers=2, gpus=2.0)
    assert cost_recorded(tmp_path) > 0.0  # so that a price that is given later says what it cost


def test_what_is_to_come_is_no_more_than_the_budget_leaves() -> None:
    cost = Cost(spent=30.0, to_come=None, an_hour=10.0, budget=45.0, currency="EUR", gpu_hours=3.0)
    assert cost.text == "30.00 of 45.00 EUR"
    assert cost.with_left(3600).text == "30.00 of 45.00 EUR, about 10.00 to come"
    assert cost.with_left(7200).to_come == pytest.approx(15.0)
    assert seconds_left(Budget(candidates=100), 50, 3600.0, cost) == pytest.approx(3600.0)
    assert seconds_left(Budget(candidates=100), 10, 3600.0, cost) == pytest.approx(5400.0)  # the money is spent first
    unbounded = cost.model_copy(update={"budget": None})
    assert unbounded.with_left(7200).text == "30.00 EUR, about 20.00 to come"
    assert seconds_left(Budget(hours=2.0), 0, 3600.0, unbounded) == pytest.approx(3600.0)
