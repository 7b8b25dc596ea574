"""The lease of a search's only driver, and the commands sent to it: the contract of every database."""

from __future__ import annotations

import time

import pytest

from evomerge.errors import InputError
from evomerge.store.events import CopyingState
from evomerge.store.fence import Holder, LeaseLostError
from evomerge.store.lease import Lease, acquire, current_holder
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import StoreFixtures, candidate, estimate, expire, scores


class LeaseContract(StoreFixtures):
    """Tests of leases, fences and commands."""

    # Commands

    def test_a_command_is_taken_once(self, store: Store, lease: Lease, reader: Store) -> None:
        assert store.take_commands() == []
        reader.request_command("pause")
        reader.request_command("stop")
        assert store.take_commands() == ["pause", "stop"]
        assert store.take_commands() == []
        assert [event.payload["verb"] for event in reader.events(kinds=("command",))] == ["pause", "stop"]
        with pytest.raises(ValueError, match="unknown command"):
            reader.request_command("explode")  # type: ignore[arg-type]

    def test_a_new_driver_does_not_obey_commands_to_the_last(self, store: Store) -> None:
        store.request_command("stop")
        with acquire(store):
            assert store.take_commands() == []

    # One driver

    def test_writing_needs_the_lease(self, store: Store) -> None:
        with pytest.raises(LeaseLostError, match="opened for reading"):
            store.set_state("running")
        with acquire(store):
            store.set_state("running")
        with pytest.raises(LeaseLostError):
            store.set_state("done")
        assert store.search().state == "running"

    def test_a_second_driver_is_refused_with_the_holders_name(self, store: Store, lease: Lease, reader: Store) -> None:
        me = Holder.this_process()
        with pytest.raises(InputError) as refusal:
            acquire(reader)
        for part in (f"process {me.pid}", me.host, "since 20"):
            assert part in refusal.value.problem
        assert current_holder(reader) == me
        store.set_state("running")  # the attempt did not affect the holder

    def test_a_released_lease_is_free_at_once(self, store: Store, reader: Store) -> None:
        first = acquire(store)
        first.release()
        assert current_holder(store) is None
        with acquire(reader) as second:
            assert second.epoch == first.epoch + 1

    def test_a_silent_driver_is_followed_and_fenced_off(self, store: Store, lease: Lease, reader: Store) -> None:
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        expire(store)
        assert current_holder(store) is None
        with acquire(reader):
            before = reader.events()
            for write in (
                lambda: store.record_ask(1, [candidate(1)]),
                lambda: store.record_cached(0, 0, {}),
                lambda: store.record_dispatch(0, 2, "w"),
                lambda: store.record_result(0, 1, [scores()], {}, {"acc": estimate(0.5)}, "w"),
                lambda: store.record_failure(0, 1, {"reason": "died", "message": ""}, final=True),
                lambda: store.record_scores(0, 1, [scores()]),
                lambda: store.record_tell(0, {0: [0.0]}, front=(0,), spent_s=1.0),
                lambda: store.set_state("done"),
                lambda: store.update_settings({}),
                lambda: store.record_event(CopyingState(state="ended", why="")),
                lease.renew,
            ):
                with pytest.raises(LeaseLostError, match="taken over"):
                    write()
            assert reader.events() == before
            assert reader.candidate(0).status == "running"
            lease.release()
            assert current_holder(reader) is not None  # it did not release a lease that it no longer holds

    def test_the_heartbeat_renews_the_lease(self, store: Store) -> None:
        with acquire(store, expiry_s=1.0):
            expire(store)
            deadline = time.monotonic() + 60
            while current_holder(store) is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
