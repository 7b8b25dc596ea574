"""The contract of every database that holds a search. Inherit ``StoreContract`` and provide a place."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import update

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.events import CopyingState, Screening
from evomerge.store.lease import Lease
from evomerge.store.rows import Answers, Estimate, Scores
from evomerge.store.store import Store
from evomerge.testing.leases import LeaseContract
from evomerge.testing.store_fixtures import FINGERPRINTS, SETTINGS, candidate, content, create, estimate, finish, scores


def drawn(split: str, drawings: dict[int, bytes]) -> Answers:
    return Answers("task@1", split, [], [], drawings)


class StoreContract(LeaseContract):
    """Tests for a store in any database.

    Override ``place``: a path, or the URL of an empty database.
    """

    # The search

    def test_the_search_comes_back_as_it_was_given(self, store: Store, reader: Store) -> None:
        row = reader.search()
        assert (row.name, row.state) == ("unit", "created")
        assert row.settings == SETTINGS
        assert (row.fingerprints, row.environment) == (FINGERPRINTS, {"cma": "4"})

    def test_a_second_search_of_the_name_is_refused(self, store: Store, place: str | Path) -> None:
        with pytest.raises(InputError, match="already"):
            create(place)
        assert store.search().settings == SETTINGS

    def test_a_place_without_a_search_is_refused(self, place: str | Path) -> None:
        with pytest.raises(InputError, match="holds no search"):
            Store.open(place)

    def test_a_search_of_another_name_is_not_found(self, store: Store, place: str | Path) -> None:
        with pytest.raises(InputError, match="no search named 'other'"):
            Store.open(place, name="other")

    def test_a_newer_format_is_refused(self, store: Store, place: str | Path) -> None:
        with store.transaction(writes=True) as connection:
            connection.execute(update(tables.search).values(schema_version=tables.SCHEMA_VERSION + 1))
        with pytest.raises(InputError, match="newer Evomerge"):
            Store.open(place)

    def test_state_and_settings_change_and_leave_an_event(self, store: Store, lease: Lease, reader: Store) -> None:
        store.set_state("stopped", why="asked to stop")
        store.update_settings({"budget": {"candidates": 80}})
        assert (reader.search().state, reader.search().why) == ("stopped", "asked to stop")
        assert reader.search().settings == {"budget": {"candidates": 80}}
        events = reader.events(kinds=("state", "settings"))
        assert [event.payload for event in events] == [
            {"state": "stopped", "why": "asked to stop"},
            {"before": SETTINGS},
        ]

    # The life of a candidate

    def test_a_candidate_comes_back_bit_for_bit(self, store: Store, lease: Lease, reader: Store) -> None:
        new = candidate(0, label="数学 alone", origin="baseline")
        store.record_ask(0, [new])
        row = reader.candidate(0)
        assert new.genome is not None
        assert row.genome is not None
        assert row.genome.dtype == np.float64
        assert row.genome.tobytes() == new.genome.tobytes()
        assert (row.recipe, row.recipe_hash) == (new.recipe, new.recipe_hash)
        assert (row.number, row.step, row.origin, row.label) == (0, 0, "baseline", "数学 alone")
        assert (row.status, row.attempts, row.losses, row.objectives, row.timings) == ("asked", 0, None, {}, {})
        assert row.asked_at > 1.7e9
        assert row.finished_at is None

    def test_a_baseline_outside_the_space_has_no_genome(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0, genome=None)])
        assert store.candidate(0).genome is None

    def test_a_result_is_kept_with_every_score(self, store: Store, lease: Lease, reader: Store) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "worker-3")
        assert reader.candidate(0).status == "running"
        given = scores()
        assert store.record_result(0, 1, [given], {"merge": 0.1}, {"acc": estimate(1 / 3)}, "worker-3")
        row = reader.candidate(0)
        assert (row.status, row.attempts, row.worker) == ("done", 1, "worker-3")
        assert (row.timings, row.objectives) == ({"merge": 0.1}, {"acc": Estimate(mean=1 / 3, stderr=0.125, n=3)})
        assert row.finished_at is not None
        [kept] = reader.scores(0, "search")
        assert (kept.evaluator, kept.split) == ("task@1", "search")
        assert kept.items.dtype == np.int32
        assert kept.items.tolist() == [4, 0, 7]
        assert list(kept.metrics) == ["acc", "chrf"]
        for name, values in kept.metrics.items():
            assert values.dtype == np.float32
            assert values.tobytes() == given.metrics[name].tobytes()
        assert reader.scores(0, "held_out") == []

    def test_answers_are_kept_by_item_and_the_last_attempt_counts(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0), candidate(1, recipe_hash="hash0")])
        store.record_dispatch(0, 1, "w")
        first = Answers("task@1", "search", [4, 0], ["答えは 1", 'a "quote"\n\0'])
        assert store.record_rung(0, 1, [scores()], {}, "w", answers=[first])
        store.record_dispatch(0, 2, "w")
        second = Answers("task@1", "search", [0, 7], ["later", ""])
        assert store.record_result(0, 2, [scores()], {}, {"acc": estimate(0.5)}, "w", answers=[second])
        store.record_scores(0, 3, [scores("held_out")], answers=[Answers("task@2", "held_out", [1], ["x"])])
        store.record_cached(1, 0, {"acc": estimate(0.5)})
        assert store.answers(0, "search") == {"task@1": {4: "答えは 1", 0: "later", 7: ""}}
        assert store.answers(1, "search") == store.answers(0, "search")
        assert store.answers(0, "held_out") == {"task@2": {1: "x"}}

    def test_drawings_are_kept_by_item_and_go_with_answers(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0), candidate(1, recipe_hash="hash0")])
        store.record_dispatch(0, 1, "w")
        assert store.record_rung(0, 1, [scores()], {}, "w", answers=[drawn("search", {4: b"a", 0: b"b"})])
        store.record_dispatch(0, 2, "w")
        again = [drawn("search", {0: b"c"})]
        assert store.record_result(0, 2, [scores()], {}, {"acc": estimate(0.5)}, "w", answers=again)
        store.record_scores(0, 3, [scores("held_out")], answers=[drawn("held_out", {1: b"d"})])
        store.record_cached(1, 0, {"acc": estimate(0.5)})
        assert store.drawings(0, "search") == store.drawings(1, "search") == {"task@1": {0: b"c", 4: b"a"}}
        assert store.drawn(1, "search", "task@1") == {0, 4}
        assert store.answers(0, "search") == {}
        assert store.answered() == [0]
        store.drop_answers([0])
        assert store.answered() == []
        assert (store.drawings(0, "search"), store.drawings(0, "held_out")) == ({}, {"task@1": {1: b"d"}})

    def test_answers_of_a_stale_attempt_are_not_kept(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        store.record_dispatch(0, 2, "w")
        late = Answers("task@1", "search", [0], ["late"])
        assert not store.record_result(0, 1, [scores()], {}, {"acc": estimate(0.5)}, "w", answers=[late])
        assert store.answers(0, "search") == {}

    def test_what_items_ask_is_kept(self, store: Store) -> None:
        assert store.item_texts("task@1", "search") == [("いくつ？", "12"), ("why", "")]
        assert store.item_texts("task@1", "held_out") == []
        assert store.item_pictures("task@1", "search") == [(), ()]

    def test_pictures_are_kept_beside_texts(self, place: str | Path) -> None:
        with create(place) as store:
            assert store.item_texts("seen@1", "search") == [("what?", "a cat"), ("why?", "")]
            assert store.item_pictures("seen@1", "search") == [("ab", "cd"), ()]
            assert [store.thumbnail(picture) for picture in ("ab", "cd", "ef")] == [b"1", b"2", None]

    def test_an_estimate_may_be_nan_or_infinite(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        odd = Estimate(mean=-math.inf, stderr=math.nan, n=1)
        store.record_result(0, 1, [], {}, {"acc": odd}, "w")
        recorded = store.candidate(0).objectives["acc"]
        assert recorded.mean == -math.inf
        assert recorded.stderr is None

    def test_scores_of_the_wrong_length_are_refused_whole(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        wrong = Scores("task@1", "search", np.arange(4, dtype=np.int32), {"acc": np.zeros(3, dtype=np.float32)})
        with pytest.raises(ValueError, match="4 items"):
            store.record_result(0, 1, [wrong], {}, {}, "w")
        assert store.candidate(0).status == "running"  # the transaction was rolled back

    def test_a_result_counts_once(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        finish(store, 0, mean=0.5)
        before = content(store.candidate(0))
        assert not store.record_result(0, 1, [scores(start=9.0)], {}, {"acc": estimate(0.9)}, "zombie")
        assert not store.record_failure(0, 1, {"reason": "died", "message": ""}, final=True)
        assert content(store.candidate(0)) == before
        assert store.scores(0, "search")[0].metrics["acc"][0] == 0.0
        assert [event.payload["what"] for event in store.events(kinds=("stale",))] == ["result", "failure"]

    def test_a_late_answer_of_an_old_attempt_is_stale(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "lost")
        store.record_dispatch(0, 2, "new")
        assert not store.record_result(0, 1, [scores()], {}, {"acc": estimate(0.1)}, "lost")
        assert (store.candidate(0).status, store.scores(0, "search")) == ("running", [])
        assert store.record_result(0, 2, [scores()], {}, {"acc": estimate(0.2)}, "new")
        [stale] = store.events(kinds=("stale",))
        assert (stale.candidate, stale.attempt) == (0, 1)

    def test_ends_of_several_attempts_are_written_at_once_or_not_at_all(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0), candidate(1)])
        for number in (0, 1):
            store.record_dispatch(number, 1, "w")

        def end(number: int) -> None:
            assert store.record_result(number, 1, [scores()], {}, {"acc": estimate(0.5)}, "w")
            assert store.candidate(number).status == "running"

        def end_and_fail() -> None:
            with store.atomically():
                end(0)
                raise KeyError

        with pytest.raises(KeyError):
            end_and_fail()
        assert store.candidate(0).status == "running"
        with store.atomically():
            end(0)
            end(1)
        assert [store.candidate(number).status for number in (0, 1)] == ["done", "done"]
        with pytest.raises(ValueError, match="had ended"), store.atomically():
            store.record_result(0, 1, [scores()], {}, {"acc": estimate(0.5)}, "w")

    def test_what_is_gathered_is_one_transaction_in_its_order_and_can_be_read(self, store: Store, lease: Lease) -> None:
        before = store.writes
        with store.batching():
            store.record_ask(0, [candidate(0), candidate(1)])
            store.record_dispatch(0, 1, "w")
            with store.atomically():
                assert store.record_result(0, 1, [scores()], {}, {"acc": estimate(0.5)}, "w")
            store.record_tell(0, {0: [-0.5]}, front=(0,), spent_s=1.0)
        assert store.writes == before + 1
        assert [event.kind for event in store.events()][-5:] == ["ask", "dispatch", "result", "front", "tell"]
        with store.batching():
            store.record_dispatch(1, 1, "w")
            assert store.candidate(1).status == "running"  # reading writes the buffered operations first
            store.record_tell(1, {}, front=(), spent_s=2.0)
        assert store.writes == before + 3

        def fail() -> None:
            with store.batching():
                store.record_failure(1, 1, {"reason": "error", "message": "broken"}, final=True)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert (store.candidate(1).status, store.front()) == ("failed", [])

    def test_a_failure_is_tried_again_or_final(self, store: Store, lease: Lease) -> None:
        failure = {"reason": "oom", "message": "out of memory", "log": "logs/0.txt"}
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        assert store.record_failure(0, 1, failure, final=False)
        assert (store.candidate(0).status, store.candidate(0).failure) == ("asked", failure)
        assert not store.record_result(0, 1, [scores()], {}, {}, "w")  # it was given up
        store.record_dispatch(0, 2, "w")
        assert store.record_failure(0, 2, failure, final=True)
        row = store.candidate(0)
        assert (row.status, row.attempts) == ("failed", 2)
        assert row.finished_at is not None
        with pytest.raises(ValueError, match="finished"):
            store.record_dispatch(0, 3, "w")

    def test_an_attempt_is_never_dispatched_twice(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        with pytest.raises(ValueError, match="attempt 1"):
            store.record_dispatch(0, 1, "w")

    def test_a_success_after_a_failure_forgets_the_failure(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        store.record_failure(0, 1, {"reason": "died", "message": ""}, final=False)
        store.record_dispatch(0, 2, "w")
        store.record_result(0, 2, [], {}, {"acc": estimate(0.5)}, "w")
        assert store.candidate(0).failure is None
        assert [event.payload["reason"] for event in store.events(kinds=("failure",))] == ["died"]

    def test_a_cached_candidate_shows_the_scores_that_answer_it(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0), candidate(1, recipe_hash="hash0")])
        finish(store, 0, mean=0.5)
        known = store.candidate(0).objectives
        store.record_cached(1, 0, known)
        row = store.candidate(1)
        assert (row.status, row.same_as, row.objectives) == ("cached", 0, known)
        assert row.finished_at is not None
        assert store.scores(1, "search")[0].items.tolist() == [4, 0, 7]
        with pytest.raises(ValueError, match="not waiting"):
            store.record_cached(0, 1, {})

    def test_held_out_scores_are_added_and_replaced(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0)])
        finish(store, 0, mean=0.5)
        store.record_scores(0, 1, [scores("held_out", start=1.0)])
        store.record_scores(0, 1, [scores("held_out", start=2.0)])
        [kept] = store.scores(0, "held_out")
        assert kept.metrics["acc"][0] == 2.0
        assert store.scores(0, "search")[0].metrics["acc"][0] == 0.0
        assert store.candidate(0).status == "done"

    # Queries of a status page and of a resumed driver

    def test_every_candidate_is_counted_once(self, store: Store, lease: Lease, reader: Store) -> None:
        assert reader.counts() == dict.fromkeys(("asked", "running", "done", "eliminated", "failed", "cached"), 0)
        store.record_ask(0, [candidate(number) for number in range(4)])
        store.record_ask(1, [candidate(4)])
        finish(store, 0, mean=0.5)
        store.record_cached(4, 0, {})
        store.record_dispatch(1, 1, "w")
        store.record_dispatch(2, 1, "w")
        store.record_failure(2, 1, {"reason": "nan", "message": ""}, final=True)
        assert reader.counts() == {"asked": 1, "running": 1, "done": 1, "eliminated": 0, "failed": 1, "cached": 1}

    def test_candidates_are_found_by_what_they_are(self, store: Store, lease: Lease) -> None:
        store.record_ask(0, [candidate(0, origin="baseline"), candidate(1, origin="baseline")])
        store.record_ask(1, [candidate(3), candidate(2)])
        finish(store, 1, mean=0.5)
        finish(store, 2, mean=0.5)

        def numbers(**where: object) -> list[int]:
            return [row.number for row in store.candidates(**where)]  # type: ignore[arg-type]

        assert numbers() == [0, 1, 2, 3]
        assert numbers(step=1) == [2, 3]
        assert numbers(statuses=("done",)) == [1, 2]
        assert numbers(statuses=("done", "asked"), step=1) == [2, 3]
        assert numbers(statuses=()) == []
        assert numbers(newest=2) == [2, 3]
        with pytest.raises(InputError, match="no candidate 9"):
            store.candidate(9)

    def test_the_best_are_ranked_by_any_objective(self, store: Store, lease: Lease) -> None:
        means = {0: (0.5, 3.0), 1: (0.9, math.nan), 2: (0.5, 1.0), 3: (0.2, 2.0)}
        store.record_ask(0, [candidate(number) for number in means])
        for number, (acc, cost) in means.items():
            store.record_dispatch(number, 1, "w")
            store.record_result(number, 1, [], {}, {"acc": estimate(acc), "cost": estimate(cost)}, "w")
        store.record_ask(1, [candidate(4)])
        store.record_cached(4, 1, {"acc": estimate(0.9)})
        assert [row.number for row in store.best("acc", maximise=True, k=3)] == [1, 0, 2]
        assert [row.number for row in store.best("cost", maximise=False, k=9)] == [2, 3, 0]
        assert store.best("cost", maximise=True)[0].objectives["cost"].mean == 3.0
        assert store.best("unknown", maximise=True) == []
        store.record_tell(1, {}, front=[1, 2], spent_s=1.0)
        assert [row.number for row in store.best("acc", maximise=True, k=3)] == [1, 2, 0], (
            "of equals those on the front"
        )

    def test_the_front_is_replaced(self, store: Store, lease: Lease, reader: Store) -> None:
        store.record_ask(0, [candidate(number) for number in range(4)])
        for step, front in enumerate(([0, 2], [3, 2], [2, 3])):
            store.record_tell(step, {}, front=front, spent_s=1.0)
        assert [row.number for row in reader.front()] == [2, 3]
        assert [event.payload["candidates"] for event in reader.events(kinds=("front",))] == [[0, 2], [2, 3]]

    def test_steps_replay_asks_and_tells_in_their_order(self, store: Store, lease: Lease, reader: Store) -> None:
        third = 1 / 3
        store.record_ask(0, [candidate(1), candidate(0)])
        store.record_tell(0, {0: [math.inf, -math.inf], 1: [third, math.nan]}, front=(), spent_s=12.5)
        store.record_ask(1, [candidate(2)])
        assert [(step.kind, step.step, step.candidates) for step in reader.steps()] == [
            ("ask", 0, (1, 0)),
            ("tell", 0, (0, 1)),
            ("ask", 1, (2,)),
        ]
        assert reader.search().spent_s == 12.5
        assert reader.candidate(0).losses == [math.inf, -math.inf]
        losses = reader.candidate(1).losses
        assert losses is not None
        assert losses[0] == third
        assert math.isnan(losses[1])

    def test_events_are_numbered_in_order(self, store: Store, lease: Lease, reader: Store) -> None:
        store.record_event(Screening(pairs=3, tau=math.inf, on=True))
        store.record_ask(0, [candidate(0)])
        finish(store, 0, mean=0.5)
        events = reader.events()
        kinds = [event.kind for event in events]
        assert kinds == ["created", "lease", "screen", "ask", "dispatch", "result"]
        assert all(before.seq < after.seq for before, after in itertools.pairwise(events))
        assert reader.events(since=events[2].seq) == events[3:]
        assert events[2].payload == {"pairs": 3, "tau": math.inf, "on": True}
        assert events[2].read(Screening) == Screening(pairs=3, tau=math.inf, on=True)
        assert (events[4].candidate, events[4].attempt) == (0, 1)

    def test_a_reader_never_sees_half_of_a_write(self, store: Store, lease: Lease, reader: Store) -> None:
        seen: list[int] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                seen.append(len(reader.candidates()))

        thread = threading.Thread(target=read)
        thread.start()
        for step in range(25):
            store.record_ask(step, [candidate(step * 8 + position) for position in range(8)])
        done.set()
        thread.join()
        assert len(seen) > 1
        assert all(count % 8 == 0 for count in seen)
        assert seen == sorted(seen)

    def test_a_snapshot_is_one_state_until_something_is_written(
        self, store: Store, lease: Lease, reader: Store
    ) -> None:
        store.record_ask(0, [candidate(0)])
        with reader.snapshot():
            assert reader.search().state == "created"
            store.set_state("running")
            store.record_ask(1, [candidate(1)])
            assert (reader.search().state, reader.counts()["asked"], len(reader.candidates())) == ("created", 1, 1)
            reader.request_command("pause")
            assert (reader.search().state, reader.counts()["asked"]) == ("running", 2)
        with reader.snapshot():
            assert reader.search().state == "running"
        store.set_state("finished")
        assert reader.search().state == "finished"

    def test_writers_wait_for_each_other(self, store: Store, lease: Lease, reader: Store) -> None:
        def command() -> None:
            for _ in range(30):
                reader.request_command("pause")

        thread = threading.Thread(target=command)
        thread.start()
        taken: list[str] = []
        while thread.is_alive():
            store.record_event(CopyingState(state="ended", why=""))
            taken += store.take_commands()
        thread.join()
        assert len(taken + store.take_commands()) == 30
