"""TensorBoard: event files in the search's folder. tensorboardX writes them without torch or TensorBoard itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evomerge.observers.base import News, ObserverSettings, ObserverState, named, package
from evomerge.observers.tracker import Row, Tracker
from evomerge.store.rows import CandidateRow, SearchRow


class TensorBoardSettings(ObserverSettings):
    """Writes to ``tensorboard/`` in the search's folder: ``tensorboard --logdir DIR/tensorboard``."""

    kind: Literal["tensorboard"]

    def check(self) -> None:
        package("tensorboardX", "tensorboard")

    def build(self, folder: Path, search: SearchRow) -> TensorBoard:
        return TensorBoard(ObserverState(folder, "tensorboard"), folder / "tensorboard")


class TensorBoard(Tracker):
    """Curves over finished candidates; a resumed search adds a file to the same run."""

    def __init__(self, kept: ObserverState, folder: Path) -> None:
        super().__init__(kept)
        # File names have a resolution of one second, so a new writer could truncate the file of an earlier one. Readers
        # read files in the order of their names.
        suffix = f".{time.time_ns()}"
        self._writer: Any = package("tensorboardX", "tensorboard").SummaryWriter(str(folder), filename_suffix=suffix)

    def candidate(self, step: int, row: CandidateRow, values: Mapping[str, float], genome: Mapping[str, float]) -> None:
        curves = {**values, **{f"genome/{name}": value for name, value in genome.items()}, "number": row.number}
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step, walltime=row.finished_at)

    def front(self, step: int, rows: Sequence[Row], news: News) -> None:
        self._writer.add_text("front", _markdown(rows), step)
        if news.winner is not None:
            self._writer.add_text("winner", named(news.winner), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        super().close()


def _markdown(rows: Sequence[Row]) -> str:
    if not rows:
        return "empty"
    cells = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *(["" if v is None else str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
