"""A structured log of a search for log collectors, with one JSON object per line."""

from __future__ import annotations

import json
import mmap
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from evomerge.observers.base import News, Observer, ObserverSettings, locked, named
from evomerge.printable import without_nan
from evomerge.store.rows import CandidateRow, EventRow, SearchRow

FILE = Path("logs", "search.jsonl")
"""In the search's folder, next to the logs of failed attempts."""


class LogsSettings(ObserverSettings):
    """Writes every event as a line of ``logs/search.jsonl``."""

    kind: Literal["logs"]

    def build(self, folder: Path, search: SearchRow) -> Logs:
        return Logs(folder / FILE)


class Logs(Observer):
    """Appends to a file after its last complete line, so that each event has one line even if the search is resumed.

    A line has ``time`` (ISO 8601, UTC), ``search``, ``seq``, ``kind``, ``candidate`` (its id), ``attempt``, and the
    event's ``payload``. If the event ended a candidate, it also has the ``seconds`` of each phase and its
    ``objectives``.
    """

    def __init__(self, path: Path) -> None:
        self._file = locked(path, "logs")
        self.seq = _last_seq(self._file)

    def tell(self, news: News) -> None:
        lines = [_line(news.search.name, event, news.ended_by(event)) for event in news.events]
        self._file.write("".join(lines).encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(search: str, event: EventRow, ended: CandidateRow | None) -> str:
    content: dict[str, Any] = {
        "time": datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds"),
        "search": search,
        "seq": event.seq,
        "kind": event.kind,
    }
    if event.candidate is not None:
        content["candidate"] = named(event.candidate)
    if event.attempt is not None:
        content["attempt"] = event.attempt
    if event.payload:
        content["payload"] = event.payload
    if ended is not None:
        objectives = {name: estimate.model_dump() for name, estimate in ended.objectives.items()}
        content |= {"seconds": ended.timings, "objectives": objectives}
    return json.dumps(without_nan(content), ensure_ascii=False, allow_nan=False) + "\n"


def _last_seq(file: IO[bytes]) -> int:
    """The event of the last line, or 0 if there is none; an incomplete line, left by a killed process, is cut off."""
    if file.seek(0, 2) == 0:
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        last = text[text.rfind(b"\n", 0, max(end - 1, 0)) + 1 : end]
    file.truncate(end)
    return int(json.loads(last)["seq"]) if last else 0
