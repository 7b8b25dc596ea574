"""A simulated search: a space without models and scores without models, to test the driver alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from evomerge.genome import Baseline, Genome, Parameter, SearchSpace
from evomerge.optimizers import CmaSettings, OptimizerSettings
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.setup import EvaluatorInfo, ObjectiveInfo, Setup
from evomerge.search.settings.sections import Budget, Confirm
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store, acquire

ITEMS = 40
SOURCES = {"base": "b", "one": "x", "two": "y"}


class FakeSpace:
    """``n`` weights of source one, spread over hops; with ``round_to``, many genomes decode to the same recipe."""

    def __init__(self, n: int = 4, round_to: int | None = None) -> None:
        self.parameters = [Parameter(f"w{i}", 0.0, 1.0, 0.5) for i in range(n)]
        self.layer_buffers = self.hops = n
        self._round_to = round_to

    def decode(self, genome: Genome) -> StackRecipe:
        numbers = genome.tolist()
        if self._round_to is not None:
            numbers = [round(number, self._round_to) for number in numbers]
        blends = [_blend(number) for number in numbers]
        return StackRecipe.compose(
            sources=SOURCES,
            tokenizer="base",
            embedding=blends[0],
            hops=((i, blend, blend, blend) for i, blend in enumerate(blends)),
            norm=blends[0],
            head=blends[0],
        )

    def genome_of(self, recipe: StackRecipe) -> Genome:
        return np.array(weights_of(recipe))

    def baselines(self) -> Iterator[Baseline]:
        n = len(self.parameters)
        for name, value in (("one", 1.0), ("two", 0.0)):
            genome = np.full(n, value)
            yield Baseline(name, "source", self.decode(genome), genome)
        yield Baseline("uniform average", "average", self.decode(np.full(n, 0.25)), None)


def _blend(weight: float) -> Blend:
    return Blend(
        method="task_arithmetic", sources=("one", "two"), base="base",
        parameters={"weight": {"one": weight, "two": 1 - weight}},
    )  # fmt: skip


def make_setup(
    *,
    space: SearchSpace | None = None,
    optimizer: OptimizerSettings | None = None,
    objectives: int = 1,
    candidates: int | None = 40,
    hours: float | None = None,
    patience: int | None = None,
    attempts: int = 2,
    seed: int = 0,
) -> Setup:
    return Setup(
        name="made-up",
        seed=seed,
        space=space or FakeSpace(),
        optimizer=optimizer or CmaSettings(name="cma"),
        objectives=tuple(ObjectiveInfo(f"o{i}", i, "acc", i != 1, ITEMS) for i in range(objectives)),
        evaluators=tuple(EvaluatorInfo(f"task{i}", f"v{i}", ITEMS, ITEMS) for i in range(objectives)),
        budget=Budget(candidates=candidates, hours=hours, patience=patience),
        confirm=Confirm(top=3),
        attempts=attempts,
    )


def weights_of(recipe: StackRecipe) -> list[float]:
    """The weights of source one in each hop."""
    blends = [recipe.blends[hop.attention] for hop in recipe.hops]
    return [blend.value("weight", "one") if "one" in blend.sources else 0.0 for blend in blends]


def recipe_seed(recipe: StackRecipe, *key: object) -> int:
    """A random seed that depends on the rounded weights of a recipe, and on ``key``.

    Processors round an optimizer's linear algebra differently, which shows in the last digits of genomes. A seed from
    the recipe's hash would therefore make tests depend on the processor.
    """
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?", lambda number: f"{float(number[0]):.6f}", recipe.canonical())
    return int.from_bytes(hashlib.sha256(repr([text, *key]).encode()).digest()[:8], "little")


def scores_of(job: Job) -> Measured:
    """Per-item scores that depend only on the recipe, and are better the closer all weights are to 0.7."""
    distance = float(np.mean([(w - 0.7) ** 2 for w in weights_of(job.recipe)]))
    found = []
    for task in job.tasks:
        rng = np.random.default_rng(recipe_seed(job.recipe, task.evaluator, task.split))
        right = rng.random(ITEMS) < np.exp(-4 * distance)
        found.append({"acc": right.astype(np.float32)[list(task.indices)]})
    return Measured(found, {"merge": 0.1, "score": 0.9})


def simulate(job: Job) -> tuple[float, Measured | Failed]:
    """Scores, and times that differ so that results come back out of order."""
    return 1.0 + recipe_seed(job.recipe, "seconds") % 256 / 64, scores_of(job)


def create_store(folder: Path, setup: Setup) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    return Store.create(folder / "search.db", name=setup.name, settings={}, fingerprints={}, environment={})


def drive(
    folder: Path,
    setup: Setup,
    *,
    simulation: Simulation = simulate,
    workers: int = 3,
    control: Callable[[Control], None] = lambda control: None,
    idle: Callable[[Control], None] = lambda control: None,
) -> Driver:
    """Run a driver in a folder, with the store that is there or a new one, and return it."""
    path = folder / "search.db"
    store = Store.open(path) if path.exists() else create_store(folder, setup)
    with store, acquire(store):
        clock = SimulatedClock()
        word = Control(store.take_commands, interval_s=0.0)
        control(word)
        pool = SimulatedPool(workers, simulation, clock)
        driver = Driver(Drive(setup, store, pool, word, logs=folder / "logs", idle=lambda: idle(word), clock=clock))
        driver.run()
        return driver


def why(folder: Path) -> str:
    """Why a search ended, as a text."""
    with Store.open(folder / "search.db") as store:
        return store.search().why


def table(folder: Path) -> list[tuple[object, ...]]:
    """Everything that must be equal, bit for bit, in two equal searches."""
    with Store.open(folder / "search.db") as store:
        rows = []
        for row in store.candidates():
            genome = None if row.genome is None else row.genome.tobytes()
            scores = [
                (s.evaluator, s.items.tobytes(), {name: v.tobytes() for name, v in s.metrics.items()})
                for s in store.scores(row.number, "search")
            ]
            rows.append((row.number, row.step, row.origin, row.label, genome, row.recipe_hash, row.status, scores,
                         row.objectives, row.losses, row.on_front))  # fmt: skip
        return rows


def numbers(rows: Sequence[tuple[object, ...]], status: str) -> list[object]:
    return [row[0] for row in rows if row[6] == status]


class Killed(BaseException):
    """Simulates SIGKILL: an exception that no handler of the driver catches."""


def dying(after_commits: int) -> mock._patch[object]:
    """Raise ``Killed`` after the driver has committed this many transactions."""
    left = [after_commits]
    # What a turn of the driver records is batched, and then written by ``_write_all``.
    names = ("record_ask", "record_dispatch", "record_cached", "record_tell", "_write_all")

    def wrap(name: str) -> object:
        original = getattr(Store, name)

        def method(self: Store, *args: object, **kwargs: object) -> object:
            found = original(self, *args, **kwargs)
            left[0] -= self._batched is None or name == "_write_all"
            if left[0] <= 0:
                raise Killed
            return found

        return method

    return mock.patch.multiple(Store, **{name: wrap(name) for name in names})


def drive_dying(
    folder: Path, setup: Setup, *, lives: tuple[int, int], simulation: Simulation = simulate, workers: int = 3
) -> int:
    """Drive a search whose driver dies again and again and is resumed, and return how often it died.

    Args:
        lives: after how many transactions it dies: all numbers from the first to the second in turn.
    """
    shortest, longest = lives
    deaths = 0
    while True:
        try:
            with dying(after_commits=shortest + deaths % (longest - shortest + 1)):
                drive(folder, setup, simulation=simulation, workers=workers)
            return deaths
        except Killed:
            deaths += 1


def killed_after(writes: int, kind: str = "select scored") -> mock._patch[object]:
    """Raise ``Killed`` after the n-th next write of a stage that records such events has been committed."""
    left = [writes]

    def wrap(name: str) -> Callable[..., object]:
        original = getattr(Store, name)

        def method(self: Store, *args: object, **kwargs: object) -> object:
            found = original(self, *args, **kwargs)
            left[0] -= name == "record_selection" or getattr(args[0], "kind", "") == kind
            if left[0] <= 0:
                raise Killed
            return found

        return method

    return mock.patch.multiple(Store, **{name: wrap(name) for name in ("record_event", "record_selection")})
