"""Weights & Biases: one run per search."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import InputError
from evomerge.observers.base import FOLDER_NAME, News, ObserverSettings, ObserverState, named, package
from evomerge.observers.tracker import Row, Tracker
from evomerge.store.rows import CandidateRow, SearchRow


class WandbSettings(ObserverSettings):
    """Logs to a project of Weights & Biases. Set the key with ``wandb login`` or WANDB_API_KEY.

    ``mode: offline`` only writes to ``observers/wandb/`` in the search's folder, for ``wandb sync``.
    """

    kind: Literal["wandb"]
    project: str = "evomerge"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def check(self) -> None:
        wandb = package("wandb", "wandb")
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            hint = "Run `wandb login`, set WANDB_API_KEY, or say mode: offline."
            raise InputError("observers: wandb", "has no key", hint)

    def build(self, folder: Path, search: SearchRow) -> Wandb:
        return Wandb(ObserverState(folder, "wandb"), folder / FOLDER_NAME, search, self)


class Wandb(Tracker):
    """A history row per candidate; a resumed search continues the run with the same id."""

    def __init__(self, kept: ObserverState, folder: Path, search: SearchRow, settings: WandbSettings) -> None:
        super().__init__(kept)
        if "run" not in kept.content:
            kept.save(run=uuid.uuid4().hex[:16])  # saved before the run is created, so that there is never a second one
        self._wandb: Any = package("wandb", "wandb")
        self._run = self._wandb.init(
            project=settings.project, entity=settings.entity, mode=settings.mode, name=search.name,
            id=kept.content["run"], resume="allow", reinit="create_new", dir=str(folder), config=search.settings,
            # wandb must not record the console output or the code of the user.
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )  # fmt: skip

    def candidate(self, step: int, row: CandidateRow, values: Mapping[str, float], genome: Mapping[str, float]) -> None:
        content = {"candidate": named(row.number), "status": row.status, **values}
        self._run.log(content | {f"genome/{name}": value for name, value in genome.items()}, step=step)

    def front(self, step: int, rows: Sequence[Row], news: News) -> None:
        columns = list(rows[0]) if rows else []
        table = self._wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({"front": table}, step=step)
        if news.winner is not None:
            self._run.summary["winner"] = named(news.winner)

    def flush(self) -> None:
        """Do nothing, because wandb's own process sends the data."""

    def close(self) -> None:
        self._run.finish()
        super().close()
