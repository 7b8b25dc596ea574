"""Observers: what they tell is read back by the programs that it is meant for, and by nothing of ours."""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from helpers_miniature import evomerge
from helpers_search import FakeSpace, drive, make_setup, simulate
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter, ValidationError

from evomerge.commands.observe import missing_lines
from evomerge.errors import InputError
from evomerge.observers import Observer, ObserverList, Observers, ObserverSettings, follow
from evomerge.observers.base import News
from evomerge.observers.prometheus import Gpus, Prometheus
from evomerge.search.driving.control import Control
from evomerge.search.preparing.setup import Setup
from evomerge.search.work.jobs import Failed, Job, Measured, PoolState
from evomerge.store import Scores, Store, acquire
from evomerge.store.events import Eliminated, Rung, SettingsChanged, Shortlist, Winner
from evomerge.testing.store_fixtures import FINGERPRINTS, SETTINGS

SETUP = make_setup(space=FakeSpace(3), objectives=2, candidates=24)  # each objective on 40 items
NAMES = [o.name for o in SETUP.objectives]
READ = TypeAdapter(ObserverList)


def settings(*kinds: str) -> Sequence[ObserverSettings]:
    own: dict[str, dict[str, object]] = {"prometheus": {"port": 0}, "wandb": {"mode": "offline"}}
    return READ.validate_python([{"kind": kind} | own.get(kind, {}) for kind in kinds])


def create(folder: Path, setup: Setup = SETUP) -> None:
    """A new search with the fingerprints that observers read."""
    folder.mkdir()
    objectives = [
        {"name": o.name, "maximise": o.maximise, "evaluator": o.evaluator, "metric": o.metric,
         "version": setup.evaluators[o.evaluator].version, "items": o.items}
        for o in setup.objectives
    ]  # fmt: skip
    told = FINGERPRINTS | {"objectives": objectives, "parameters": [asdict(p) for p in setup.space.parameters]}
    Store.create(folder / "search.db", name=setup.name, settings=SETTINGS, fingerprints=told, environment={}).close()


def some_fail(job: Job) -> tuple[float, Measured | Failed]:
    """Every sixth candidate is not finite, and each fifth loses its first worker."""
    if job.candidate % 6 == 5:
        return 1.0, Failed("not_finite", "NaN in layer 3", "what was said")
    if job.candidate % 5 == 4 and job.attempt == 1:
        return 1.0, Failed("worker_died", "gone")
    return simulate(job)


def search(folder: Path, candidates: int = 24) -> None:
    drive(folder, make_setup(space=FakeSpace(3), objectives=2, candidates=candidates), simulation=some_fail)


def confirm(folder: Path) -> dict[str, float]:
    """Held-out scores of one candidate, and it is the winner; its means, by a formula of our own."""
    with Store.open(folder / "search.db") as store, acquire(store):
        number = store.front()[0].number
        values = [np.linspace(0, 1, 10 + i, dtype=np.float32) for i in range(2)]
        items = [np.arange(len(v), dtype=np.int32) for v in values]
        store.record_event(Shortlist(candidates=[number], drawn=[]))
        store.record_scores(number, 1, [Scores(f"v{i}", "held_out", items[i], {"acc": values[i]}) for i in range(2)])
        store.record_event(Winner(candidate=number, feasible=True))
        store.set_state("finished")
    return {name: sum(map(float, v)) / len(v) for name, v in zip(NAMES, values, strict=True)}


def observe(folder: Path, *kinds: str) -> None:
    """What `evomerge observe` does for a search that nobody drives."""
    with Store.open(folder / "search.db") as store:
        follow(store, folder, settings(*kinds))


def ended(folder: Path) -> list[Any]:
    """The candidates in the order in which they ended, straight from the events."""
    with Store.open(folder / "search.db") as store:
        rows = {row.number: row for row in store.candidates()}
        kinds = {"result", "cached", "done", "eliminated"}
        return [
            rows[e.candidate]
            for e in store.events()
            if e.candidate is not None and (e.kind in kinds or (e.kind == "failure" and e.payload["final"]))
        ]


def bests(rows: Sequence[Any], name: str, maximise: bool) -> list[float]:
    """The best so far after each candidate, slowly."""
    found: list[float] = []
    for i in range(len(rows)):
        known = [r.objectives[name].mean for r in rows[: i + 1] if r.eligible and r.same_as is None]
        found += [max(known) if maximise else min(known)] if known else []
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search told in three parts: before, and after, it was resumed with more, and after a confirmation."""
    folder = tmp_path_factory.mktemp("observed") / "search"
    create(folder)
    for candidates in (12, 24):
        search(folder, candidates)
        observe(folder, "logs", "tensorboard", "mlflow", "wandb")
    confirm(folder)
    observe(folder, "logs", "tensorboard", "mlflow", "wandb")
    return folder


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"kind": "prometheus", "prot": 1}], "Did you mean 'port'"),
        ([{"kind": "graphite"}], "graphite"),
        ([{"kind": "logs"}, {"kind": "logs"}], "two of the kind 'logs'"),
        ([{"kind": "mlflow", "uri": "http://me:secret@host"}], "MLFLOW_TRACKING_PASSWORD"),
        ([{"kind": "prometheus", "port": 70000}], "65536"),
    ],
)
def test_wrong_settings_are_refused(entries: list[object], words: str) -> None:
    with pytest.raises((ValidationError, InputError), match=words):
        READ.validate_python(entries)


def test_settings_come_back_from_the_search_file_as_they_went_in() -> None:
    found = settings("prometheus", "logs", "tensorboard", "wandb", "mlflow")
    assert READ.validate_json(READ.dump_json(tuple(found))) == found


def test_metrics_are_for_this_machine_alone_unless_told_otherwise() -> None:
    (found,) = READ.validate_python([{"kind": "prometheus"}])
    assert (found.host, found.port) == ("127.0.0.1", 9090)  # type: ignore[union-attr]


@pytest.mark.nightly  # six seconds, in which wandb is imported
def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is asked of a server for it: the address is that of nobody."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # Ended at once: wandb's own clearing up at the end of a process was seen to wait for ever.
    code = """if True:
        import os, sys
        from evomerge.errors import InputError
        from evomerge.observers import WandbSettings
        try:
            WandbSettings(kind="wandb").check()
        except InputError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(2)
        os._exit(0)
    """
    ran = []
    for number, key in enumerate(("", "0" * 40)):
        place = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "WANDB_API_KEY": key}
        # Not a pipe: a process that wandb leaves behind would hold it open.
        with (tmp_path / f"said-{number}").open("w") as said:
            command = [sys.executable, "-c", code]
            ran.append(subprocess.Popen(command, env=os.environ | place, stdin=subprocess.DEVNULL, stderr=said))
    without, with_one = [process.wait(timeout=120) for process in ran]
    assert without == 2
    assert "observers: wandb: has no key" in (tmp_path / "said-0").read_text()
    assert with_one == 0, (tmp_path / "said-1").read_text()


@pytest.mark.parametrize(
    ("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    (found,) = settings(kind)
    found.check()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*evomerge\[{kind}\]"):
        found.check()


# ---- prometheus ------------------------------------------------------------------------------------------------------


def scrape(observers: Observers) -> dict[tuple[str, ...], float]:
    """What an HTTP client gets, read by the parser of the format: value by name and sorted labels."""
    observer = observers._listeners[0].observer
    assert isinstance(observer, Prometheus)
    with urllib.request.urlopen(f"http://127.0.0.1:{observer.port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for s in samples}


def test_metrics_are_what_the_store_says(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    create(folder)
    search(folder)
    means = confirm(folder)
    pool = PoolState(workers=8, busy=5, starting=1, queued=3)
    with (
        Store.open(folder / "search.db") as store,
        closing(Observers(store, folder, settings("prometheus"))) as observers,
    ):
        observers._listeners[0].look(pool)
        found = scrape(observers)
        for status, count in store.counts().items():
            assert found["evomerge_candidates", status] == count
        front = store.front()
        assert found["evomerge_front_size",] == len(front)
        assert found["evomerge_winner", f"c{front[0].number:04d}"] == 1
        rows, events = store.candidates(), store.events()
    assert found["evomerge_search_info", "made-up"] == 1
    assert found["evomerge_search_state", "finished"] == 1
    for name, extreme in zip(NAMES, (max, min), strict=True):
        assert found["evomerge_best", name] == extreme(r.objectives[name].mean for r in rows if r.eligible)
        assert found["evomerge_held_out", f"c{front[0].number:04d}", name] == pytest.approx(means[name], rel=1e-6)
    assert [found["evomerge_workers", s] for s in ("busy", "idle", "starting")] == [5, 2, 1]
    assert found["evomerge_queue_depth",] == 3
    assert found["evomerge_idle_share",] == 0.25
    failures = [e.payload for e in events if e.kind == "failure"]
    for reason, final in (("not_finite", True), ("worker_died", False)):
        count = sum(f["reason"] == reason and f["final"] is final for f in failures)
        assert count > 0
        assert found["evomerge_failures_total", str(final).lower(), reason] == count
    for kind in {e.kind for e in events}:
        assert found["evomerge_events_total", kind] == sum(e.kind == kind for e in events)
    scored = [r for r in rows if r.status == "done"]
    assert found["evomerge_items_scored_total", "search"] == 80 * len(scored)
    assert found["evomerge_items_scored_total", "held_out"] == 10 + 11
    assert found["evomerge_phase_seconds_count", "score"] == len(scored)
    assert found["evomerge_phase_seconds_sum", "score"] == pytest.approx(sum(r.timings["score"] for r in scored))
    assert found["evomerge_phase_seconds_bucket", "1.0", "score"] == len(scored)
    assert found["evomerge_phase_seconds_bucket", "0.5", "score"] == 0


def test_looking_again_counts_nothing_twice_and_a_new_process_counts_from_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    create(folder)
    search(folder, 12)
    with Store.open(folder / "search.db") as store:
        with closing(Observers(store, folder, settings("prometheus"))) as observers:
            observers.look()
            first = scrape(observers)
            observers.look()
            assert scrape(observers) == first
            search(folder, 24)
            observers.look()
            grown = scrape(observers)
        with closing(Observers(store, folder, settings("prometheus"))) as observers:
            observers.look()
            afresh = scrape(observers)
    done = ("evomerge_events_total", "result")
    assert first[done] < grown[done]
    assert {k: v for k, v in grown.items() if "_created" not in k[0]} == {
        k: v for k, v in afresh.items() if "_created" not in k[0]
    } | {("evomerge_search_state", "finished"): 1.0}


def test_races_are_counted_by_items(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    create(folder)
    with Store.open(folder / "search.db") as store, acquire(store):
        store.record_event(Rung(items={"v0": 10, "v1": 25}))
        store.record_event(Eliminated(items=25))
        store.record_event(Eliminated(items=25))
        with closing(Observers(store, folder, settings("prometheus"))) as observers:
            observers.look()
            found = scrape(observers)
    assert found["evomerge_rungs_total", "25"] == 1
    assert found["evomerge_eliminations_total", "25"] == 2


class StandInNvml:
    """nvml of a machine with a whole GPU and one in parts, which does not say how busy it is."""

    NVMLError = type("NVMLError", (Exception,), {})

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=(handle + 1) * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if handle == 1:
            raise self.NVMLError
        return SimpleNamespace(gpu=75)


def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", StandInNvml())  # type: ignore[arg-type]
    whole, part = Gpus().read()
    assert whole == ("0", 0.75, 2**30, 80 * 2**30)
    assert part[0] == "1"
    assert math.isnan(part[1])
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert list(Gpus().read()) == []


# ---- logs ------------------------------------------------------------------------------------------------------------


def log_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not JSON")

    text = (folder / "logs/search.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_event_has_one_line(searched: Path) -> None:
    lines = log_lines(searched)
    with Store.open(searched / "search.db") as store:
        events = store.events()
        rows = {row.number: row for row in store.candidates()}
    assert [line["seq"] for line in lines] == [event.seq for event in events]
    for line, event in zip(lines, events, strict=True):
        assert line["search"] == "made-up"
        assert line["kind"] == event.kind
        assert line.get("attempt") == event.attempt
        assert line.get("candidate") == (None if event.candidate is None else f"c{event.candidate:04d}")
        assert datetime.fromisoformat(line["time"]).astimezone(UTC).timestamp() == pytest.approx(event.time, abs=1e-3)
    results = [line for line in lines if line["kind"] == "result"]
    assert results
    for line in results:
        assert line["seconds"] == rows[int(line["candidate"][1:])].timings


@pytest.mark.parametrize("cut", [1, 30, None])
def test_a_log_cut_off_by_a_kill_is_mended(tmp_path: Path, cut: int | None) -> None:
    folder = tmp_path / "search"
    create(folder)
    search(folder, 12)
    observe(folder, "logs")
    path = folder / "logs/search.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut else whole[:20])
    observe(folder, "logs")
    assert path.read_bytes() == whole


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    create(folder)
    with Store.open(folder / "search.db") as store, acquire(store):
        store.record_event(SettingsChanged(before={"tau": math.nan, "of": [math.inf, 1.0]}))
    observe(folder, "logs")
    (line,) = [line for line in log_lines(folder) if line["kind"] == "settings"]
    assert line["payload"] == {"before": {"tau": None, "of": [None, 1.0]}}


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_writers_of_one_second_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorboardX names its files by whole seconds; the second of two would begin by emptying the first one's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 1_700_000_000.0)
    create(tmp_path / "search")
    for candidates in (12, 24):
        search(tmp_path / "search", candidates)
        observe(tmp_path / "search", "tensorboard")
    found = EventAccumulator(str(tmp_path / "search" / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    steps = [event.step for event in found.Scalars("number")]
    assert steps == list(range(1, len(ended(tmp_path / "search")) + 1))


def test_tensorboard_reads_the_curves(searched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(searched / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    rows = ended(searched)
    numbers = found.Scalars("number")
    assert [(event.step, event.value) for event in numbers] == [(i + 1, r.number) for i, r in enumerate(rows)]
    assert [event.wall_time for event in numbers] == pytest.approx([row.finished_at for row in rows])
    for name, maximise in zip(NAMES, (True, False), strict=True):
        assert [e.value for e in found.Scalars(f"best/{name}")] == pytest.approx(bests(rows, name, maximise))
        values = [row.objectives[name].mean for row in rows if name in row.objectives]
        assert [e.value for e in found.Scalars(f"candidate/{name}")] == pytest.approx(values)
    for i in range(3):
        values = [row.genome[i] for row in rows if row.genome is not None]
        assert [e.value for e in found.Scalars(f"genome/w{i}")] == pytest.approx(values)
    text = found.Tensors("front/text_summary")[-1].tensor_proto.string_val[0].decode()
    with Store.open(searched / "search.db") as store:
        front = [f"c{row.number:04d}" for row in store.front()]
    assert [line.split()[1] for line in text.splitlines()[2:]] == front
    winner = found.Tensors("winner/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert winner == front[0]


def test_mlflow_reads_a_run_for_the_search_and_one_a_candidate(searched: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{searched}/observers/mlflow.db")
    experiment = client.get_experiment_by_name("evomerge")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (ours,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    rows = ended(searched)
    assert ours.info.run_name == "made-up"
    assert ours.info.status == "FINISHED"
    for name, maximise in zip(NAMES, (True, False), strict=True):
        history = client.get_metric_history(ours.info.run_id, f"best/{name}")
        assert [metric.value for metric in sorted(history, key=lambda m: m.step)] == bests(rows, name, maximise)
    children = {run.info.run_name: run for run in runs if run is not ours}
    assert len(runs) - 1 == len(children) == len(rows)
    for row in rows:
        run = children[f"c{row.number:04d}"]
        assert run.data.tags["mlflow.parentRunId"] == ours.info.run_id
        assert run.data.metrics == {name: found.mean for name, found in row.objectives.items()}
        genome = [] if row.genome is None else row.genome.tolist()
        assert {k: float(v) for k, v in run.data.params.items()} == {f"w{i}": v for i, v in enumerate(genome)}
        assert run.info.status == ("FAILED" if row.status == "failed" else "FINISHED")
    with Store.open(searched / "search.db") as store:
        front = [f"c{row.number:04d}" for row in store.front()]
    table = json.loads((searched / "observers/mlflow" / ours.info.run_id / "artifacts/front.json").read_text())
    assert [row["candidate"] for row in table] == front
    assert table[0]["held_out/o0"] == pytest.approx(0.5)
    assert ours.data.tags["winner"] == front[0]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file of an offline run: 7 bytes of header, then blocks of 32 KiB of chunks (LevelDB's log)."""
    from wandb.proto import wandb_internal_pb2

    block, content, held, at = 2**15, path.read_bytes(), b"", 7
    while at < len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def test_wandb_keeps_one_run_with_a_row_a_candidate(searched: Path) -> None:
    files = sorted((searched / "observers/wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)
    records = [list(wandb_records(path)) for path in files]
    assert len(files) >= 2  # one for each time it was started, of the same run
    runs = {r.run.run_id for part in records for r in part if r.WhichOneof("record_type") == "run"}
    assert len(runs) == 1
    history = [r.history for part in records for r in part if r.WhichOneof("record_type") == "history"]
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.item} for each in history
    ]
    told = {row["candidate"]: row for row in rows if "candidate" in row}
    expected = ended(searched)
    assert list(told) == [f"c{row.number:04d}" for row in expected]
    for step, row in enumerate(expected, 1):
        found = told[f"c{row.number:04d}"]
        assert found["_step"] == step
        assert found["status"] == row.status
        for name in row.objectives:
            assert found[f"candidate/{name}"] == row.objectives[name].mean
        if row.genome is not None:
            assert [found[f"genome/w{i}"] for i in range(3)] == row.genome.tolist()
    assert any("front" in key for row in rows for key in row)


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Broken(Observer):
    def __init__(self) -> None:
        self.calls = 0

    def tell(self, news: News) -> None:
        self.calls += 1
        raise RuntimeError("no such host")


class Slow(Observer):
    """Waits for a test to let it go."""

    def __init__(self) -> None:
        self.told: list[News] = []
        self.entered, self.free = threading.Event(), threading.Event()

    def tell(self, news: News) -> None:
        self.entered.set()
        assert self.free.wait(60)
        self.told.append(news)


@dataclass
class Given:
    """Settings of an observer that a test has made."""

    kind: ClassVar[Literal["given"]] = "given"
    observer: Observer

    def build(self, folder: Path, search: object) -> Observer:
        return self.observer


def hub(store: Store, folder: Path, observer: Observer, *kinds: str) -> Observers:
    return Observers(store, folder, [Given(observer), *settings(*kinds)])  # type: ignore[list-item]


def test_one_that_fails_is_logged_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, broken = tmp_path / "search", Broken()
    create(folder)
    with Store.open(folder / "search.db") as store, closing(hub(store, folder, broken, "logs")) as observers:
        search(folder, 12)
        observers.look()
        search(folder, 24)
        observers.look()
        assert [line["seq"] for line in log_lines(folder)] == [event.seq for event in store.events()]
    assert broken.calls == 1
    assert [r.message for r in caplog.records if "no such host" in r.message] == [
        "observer given failed and is dropped: RuntimeError: no such host"
    ]


def test_one_that_cannot_start_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log that another process writes: nobody is told twice. The command fails, and does not wait for the driver."""
    folder = tmp_path / "search"
    create(folder)
    with Store.open(folder / "search.db") as store, closing(hub(store, folder, Broken(), "logs")) as first:
        first.look()
        with acquire(store):
            assert evomerge("observe", folder, "{kind: logs}") == 1
    assert "another process already reports this search to logs" in caplog.text
    assert "error: observers: logs: could not be started: " in capsys.readouterr().err
    (line,) = missing_lines(folder, settings("logs"), {"logs": "could not be started"})
    told, _, command = line.partition(": evomerge ")
    assert told == "observer logs has not got everything (could not be started); to report the rest"
    assert evomerge(*shlex.split(command)) == 0


def test_a_driver_never_waits_and_is_not_changed(tmp_path: Path) -> None:
    """Polled while an observer hangs, which is told all in the end; the search is the one without observers."""
    folder, slow = tmp_path / "search", Slow()
    create(folder)
    with Store.open(folder / "search.db") as store:
        observers = hub(store, folder, slow)
        polls = []

        def idle(control: Control) -> None:
            polls.append(1)
            observers.poll(lambda: PoolState(workers=3, busy=3))

        drive(folder, SETUP, idle=idle)
        assert slow.entered.is_set()
        assert slow.told == []
        slow.free.set()
        observers.close()
        seen = [event.seq for news in slow.told for event in news.events]
        assert seen == [event.seq for event in store.events()]
        genomes = [row.recipe_hash for row in store.candidates()]
    assert len(polls) > 20
    other = tmp_path / "other"
    create(other)
    drive(other, SETUP)
    with Store.open(other / "search.db") as store:
        assert [row.recipe_hash for row in store.candidates()] == genomes


def test_one_that_hangs_holds_up_no_other_and_is_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, slow = tmp_path / "search", Slow()
    create(folder)
    monkeypatch.setattr("evomerge.observers.hub._PATIENCE_S", 0.0)
    with Store.open(folder / "search.db") as store:
        observers = hub(store, folder, slow, "logs")
        observers.poll(lambda: PoolState(workers=1, busy=1))
        assert slow.entered.wait(60)
        observers._listeners[1].is_busy(60)
        assert [line["kind"] for line in log_lines(folder)] == ["created"]
        observers.close()
        assert "have not ended and are left behind: given" in caplog.text
        assert not observers._listeners[1].is_busy(60)
        slow.free.set()
        monkeypatch.undo()
        assert not observers._listeners[0].is_busy(60)


def test_a_store_that_cannot_be_read_is_said_once_and_read_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "search"
    create(folder)

    def locked(**_: object) -> None:
        raise InputError("search.db", "is locked")

    with Store.open(folder / "search.db") as store, closing(Observers(store, folder, settings("logs"))) as observers:
        monkeypatch.setattr(store, "events", locked)
        observers.look()
        observers.look()
        assert [r.message for r in caplog.records] == ["observer logs cannot read the store: search.db: is locked"]
        monkeypatch.undo()
        observers.look()
    assert [line["kind"] for line in log_lines(folder)] == ["created"]


def test_without_observers_nothing_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    create(folder)
    with Store.open(folder / "search.db") as store:
        observers = Observers(store, folder, ())
        observers.poll(lambda: pytest.fail("asked for the pool"))
        observers.look()
        observers.close()
