"""Jobs that run before a search continues and are not candidates; the store does not record them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from evomerge.checkpoints.fingerprints import fingerprint
from evomerge.errors import InputError
from evomerge.files import FileFingerprint
from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher, NonCandidateRecorder, Pending, feed_of, write_log
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.folder import LOGS_NAME
from evomerge.search.work.deadlines import Deadlines
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import Store


class OutsideJobs(NonCandidateRecorder):
    """Some jobs of one kind, and the handling of their results. A final failure of any of them ends the command.

    Args:
        folder: the search's folder.
    """

    log_prefix: ClassVar[str]
    """The prefix of the names of logs."""

    def __init__(self, folder: Path, prepared: Prepared, store: Store) -> None:
        self.prepared = prepared
        self.store = store
        self._logs = folder / LOGS_NAME

    def run(self, pool: Pool, jobs: Iterable[Pending]) -> bool:
        """Run the jobs; returns False if the search was stopped first. Raises InputError if a job has failed."""
        dispatcher = Dispatcher(
            pool, Control(self.store.take_commands), self.prepared.setup.attempts, lambda: None,
            Deadlines(self.prepared.file.attempt_hours * 3600), check=self.prepared.untouched.check,
        )  # fmt: skip
        return dispatcher.run(feed_of(jobs), self)

    def files_of(self, prepared: Prepared) -> dict[str, dict[str, FileFingerprint]]:
        """Fingerprints of the files of a search's sources; known ones are not computed again."""
        known = self.store.search().record.files
        return {name: fingerprint(source, known.get(name)) for name, source in prepared.sources.items()}

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        """The error for people after a job's failure; ``log`` is a file in the search's folder, or empty."""
        raise NotImplementedError

    # As a ``Recorder``

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        log = write_log(self._logs, finished, failure, self.log_prefix)
        if final:
            raise self.error(finished, failure, log)
