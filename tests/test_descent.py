"""Descents as jobs of a worker: where they lead, what they draw, and what they leave alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES, ROOT

from evomerge.genome import Genome, Parameter, SearchSpace, check_genome
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import Generate, Likelihood
from evomerge.merging.fitting.adam import Adam
from evomerge.merging.measured.evidence import Evidence
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.settings.early import UNMEASURED
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.search.work.jobs import Descend, Descended, Failed, Job, Measured, Task
from evomerge.search.workers.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = ROOT / "evaluators" / "tasks" / "data"
LIKELIHOOD = {
    "evaluator": "likelihood", "metric": "log_likelihood", "items": 40,
    "file": str(DATA / "mini_math_ja.search.jsonl"), "held_out_file": str(DATA / "mini_math_ja.held_out.jsonl"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def file() -> SearchFile:
    content = {
        "name": "descent",
        "sources": {name: str(MINIATURES / name) for name in ("base", "maths", "japanese")},
        "base": "base",
        "space": {"method": "ties", "granularity": "layer"},
        "objectives": {"likelihood": LIKELIHOOD},
        "dtype": "float32",
        "budget": {"candidates": 8},
    }
    return parse_search_file(content, place="search.yaml", root=ROOT)


@pytest.fixture(scope="module")
def worker(file: SearchFile) -> Worker:
    return Worker.start("here", file, Evidence())


@pytest.fixture(scope="module")
def space(worker: Worker) -> SearchSpace:
    assert worker._build_space is not None
    return worker._build_space(UNMEASURED)


@pytest.fixture(scope="module")
def job(space: SearchSpace) -> Job:
    start = np.array([p.default for p in space.parameters])
    descend = Descend(start, 0, range(40), items=8, keep=(1, 3), rate=0.05, seed=3)
    return Job(-1, 1, space.decode(start), (), instead=descend)


@pytest.fixture(scope="module")
def found(worker: Worker, job: Job) -> Descended:
    return descended(worker, job)


def descended(worker: Worker, job: Job, **changes: Any) -> Descended:
    assert isinstance(job.instead, Descend)
    result = worker.run(replace(job, instead=replace(job.instead, **changes))).result
    assert isinstance(result, Descended), result
    return result


def likelihood(worker: Worker, space: SearchSpace, genome: Genome) -> Measured:
    """Of the answers of all items that descents draw from."""
    result = worker.run(Job(0, 1, space.decode(genome), [Task(0, "search", range(40))])).result
    assert isinstance(result, Measured)
    return result


def test_a_descent_makes_right_answers_likelier(worker: Worker, space: SearchSpace, job: Job, found: Descended) -> None:
    assert isinstance(job.instead, Descend)
    means = [
        float(likelihood(worker, space, genome).scores[0]["log_likelihood"].mean())
        for genome in (job.instead.start, *found.points)
    ]
    assert len(found.points) == 2
    assert means[-1] > means[1] > means[0]
    assert found.losses.shape == (3,)


def test_densities_stay_and_points_are_points_of_the_space(space: SearchSpace, job: Job, found: Descended) -> None:
    assert isinstance(job.instead, Descend)
    stay = np.array([not p.differentiable for p in space.parameters])
    assert np.isnan(found.gradient).tolist() == stay.tolist()
    for point in found.points:
        check_genome(point, space.parameters, "a descent")
        assert (point[stay] == job.instead.start[stay]).all()
        assert (point != job.instead.start).tolist() == [g != 0 for g in np.nan_to_num(found.gradient)]
    assert (found.gradient[[p.group.startswith("layers") for p in space.parameters] & ~stay] != 0).all()


def test_the_first_proxy_is_what_the_evaluator_says_of_the_drawn_items(
    worker: Worker, space: SearchSpace, job: Job
) -> None:
    """Of all items, however they count; the evaluator's number is of a token, and its answers differ in length."""
    assert isinstance(job.instead, Descend)
    weights = np.linspace(1.0, 3.0, 40)
    whole = descended(worker, job, items=100, keep=(), weights=weights.tolist())
    scores = likelihood(worker, space, job.instead.start).scores[0]["log_likelihood"].astype(np.float64)
    reader, evaluator = Reader.of(worker._stack().live), worker._evaluators[0]
    requests = evaluator.requests(reader, "search", range(40))
    tokens = [request.prompt.scored for request in requests if isinstance(request, Likelihood)]
    expected = np.average(np.log(1 - scores * tokens), weights=weights)
    assert whole.losses.tolist() == [pytest.approx(expected, rel=1e-4)]
    assert whole.points == []


def test_the_same_job_gives_the_same_bits_whatever_was_before(worker: Worker, job: Job, found: Descended) -> None:
    pool = InProcessPool(lambda: worker)
    pool.submit(pickle.loads(pickle.dumps(job)))
    (finished,) = pool.wait(0.0)
    again = finished.result
    assert isinstance(again, Descended)
    assert [point.tobytes() for point in again.points] == [point.tobytes() for point in found.points]
    assert (again.losses.tobytes(), again.gradient.tobytes()) == (found.losses.tobytes(), found.gradient.tobytes())
    other = descended(worker, job, seed=4, keep=(1,))
    assert other.losses[0] != found.losses[0]


def test_scores_are_the_same_bits_before_and_after(worker: Worker, space: SearchSpace, job: Job) -> None:
    genome = np.array([(p.low + 2 * p.high) / 3 for p in space.parameters])
    before = likelihood(worker, space, genome)
    descended(worker, job, keep=())
    after = likelihood(worker, space, genome)
    assert before.scores[0]["log_likelihood"].tobytes() == after.scores[0]["log_likelihood"].tobytes()


def test_it_goes_no_further_than_the_bounds(worker: Worker, space: SearchSpace, job: Job) -> None:
    far = descended(worker, job, rate=10.0, keep=(1,))
    moving = np.flatnonzero(np.nan_to_num(far.gradient)).tolist()
    assert moving
    ends = [(space.parameters[n].low, space.parameters[n].high) for n in moving]
    assert all(value in pair for value, pair in zip(far.points[0][moving].tolist(), ends, strict=True))


def test_what_goes_wrong_comes_back_as_failed(worker: Worker, job: Job) -> None:
    assert isinstance(job.instead, Descend)
    broken = replace(job, instead=replace(job.instead, start=np.full_like(job.instead.start, np.nan)))
    result = worker.run(broken).result
    assert isinstance(result, Failed)


def test_an_evaluator_of_anything_but_likelihoods_is_refused(worker: Worker, job: Job) -> None:
    asking = mock.Mock(**{"requests.return_value": [Generate(Prompt("", "", [1], 0, None, ""), 4)] * 8})
    asking.name = "arithmetic"
    with mock.patch.object(worker, "_evaluators", [asking]):
        result = worker.run(job).result
    assert isinstance(result, Failed)
    assert "arithmetic" in result.message
    assert "kind likelihood" in result.message


def test_jobs_that_share_a_batch_are_done_one_by_one(worker: Worker, job: Job, found: Descended) -> None:
    assert isinstance(job.instead, Descend)
    short = replace(job, instead=replace(job.instead, keep=()))
    finished = worker.run_together([short, replace(short, attempt=2)])
    assert [one.attempt for one in finished] == [1, 2]
    for one in finished:
        assert isinstance(one.result, Descended)
        assert one.result.gradient.tobytes() == found.gradient.tobytes()


def test_steps_are_those_of_adam() -> None:
    """Against torch, in ranges that are not the unit box; a gene without derivative stays."""
    parameters = [Parameter("a", -1.0, 3.0, 0.0), Parameter("b", 0.0, 1.0, 0.5), Parameter("c", 0.0, 9.0, 0.1)]
    start, centre, span = np.array([0.3, 0.1, 0.7]), np.array([1.0, 0.7, 0.0]), np.array([4.0, 1.0, 9.0])
    unit = torch.tensor(start / span, requires_grad=True)
    wanted, ours, genome = torch.optim.Adam([unit], lr=0.02), Adam(parameters, 0.02), start.copy()
    for _ in range(12):
        gradient = (genome - centre) * [1.0, 5.0, np.nan]
        unit.grad = torch.tensor(np.nan_to_num(gradient) * span)
        wanted.step()
        genome = ours.step(genome, gradient)
        np.testing.assert_allclose(genome, unit.detach().numpy() * span, rtol=1e-12)
    assert genome[2] == start[2]
