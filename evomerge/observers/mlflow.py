"""MLflow: a run for the search, with a child run for each candidate."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from evomerge.observers.base import ENDED, FOLDER_NAME, News, ObserverSettings, ObserverState, named, package
from evomerge.observers.tracker import Row, Tracker
from evomerge.store.rows import CandidateRow, SearchRow

_MAX = 100
"""The maximum number of parameters per call of MLflow's API."""


class MlflowSettings(ObserverSettings):
    """Logs to the server at ``uri``; by default, to a database file in the search's folder.

    Set the user and password through MLflow's own MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """

    kind: Literal["mlflow"]
    uri: str | None = None
    experiment: str = "evomerge"

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError("holds a password, and the file is copied; set MLFLOW_TRACKING_PASSWORD instead")
        return uri

    def check(self) -> None:
        package("mlflow", "mlflow")

    def build(self, folder: Path, search: SearchRow) -> Mlflow:
        return Mlflow(ObserverState(folder, "mlflow"), folder.absolute() / FOLDER_NAME, search, self)


class Mlflow(Tracker):
    """The metrics of the search's run are the best so far; a candidate's run has its genome as parameters."""

    def __init__(self, kept: ObserverState, folder: Path, search: SearchRow, settings: MlflowSettings) -> None:
        super().__init__(kept)
        self._entities: Any = package("mlflow.entities", "mlflow")
        self._client: Any = package("mlflow", "mlflow").MlflowClient(
            tracking_uri=settings.uri or f"sqlite:///{folder / 'mlflow.db'}"
        )
        if "run" not in kept.content:
            artifacts = None if settings.uri else (folder / "mlflow").as_uri()
            experiment = self._experiment(settings.experiment, artifacts)
            run = self._client.create_run(experiment, run_name=search.name)
            kept.save(run=run.info.run_id, experiment=experiment)
            self._client.log_dict(run.info.run_id, search.settings, "search.json")
        self._run: str = kept.content["run"]
        self._client.update_run(self._run, status="RUNNING")

    def _experiment(self, name: str, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(name)
        return str(
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(name, artifact_location=artifacts)
        )

    def candidate(self, step: int, row: CandidateRow, values: Mapping[str, float], genome: Mapping[str, float]) -> None:
        tags = {"mlflow.parentRunId": self._run, "status": row.status, "origin": row.origin}
        experiment = self.kept.content["experiment"]
        run = self._client.create_run(experiment, run_name=named(row.number), tags=tags).info.run_id
        own = {name.removeprefix("candidate/"): v for name, v in values.items() if name.startswith("candidate/")}
        self._client.log_batch(run, metrics=list(self._metrics(own, row.number)))
        params = [self._entities.Param(_name(name), repr(value)) for name, value in genome.items()]
        for first in range(0, len(params), _MAX):
            self._client.log_batch(run, params=params[first : first + _MAX])
        self._client.set_terminated(run, "FAILED" if row.status == "failed" else "FINISHED")
        best = {name: value for name, value in values.items() if name.startswith("best/")}
        self._client.log_batch(self._run, metrics=list(self._metrics(best, step)))

    def _metrics(self, values: Mapping[str, float], step: int) -> Iterator[Any]:
        moment = int(time.time() * 1000)
        return (self._entities.Metric(_name(name), value, moment, step) for name, value in values.items())

    def front(self, step: int, rows: Sequence[Row], news: News) -> None:
        self._client.log_text(self._run, json.dumps(list(rows)), "front.json")
        if news.winner is not None:
            self._client.set_tag(self._run, "winner", named(news.winner))
        status = "FINISHED" if news.search.state == "finished" else "KILLED"
        if news.search.state in ENDED:
            self._client.set_terminated(self._run, status)

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""


def _name(name: str) -> str:
    """The name with only the characters that MLflow allows."""
    return re.sub(r"[^\w.\- :/]", "_", name, flags=re.ASCII)
