"""Drivers as jobs of a Ray cluster, which sees the searches' folders at the same paths as the server does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from evomerge.search.clusters.launch import check_secured, has_ended, job_client, submit
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.sections import Cluster

Command = Literal["resume", "confirm"]
"""What a driver is started for: each is a command of `evomerge`."""


class RayJobs:
    """Starts drivers as jobs, and finds them again by the records that name them.

    Args:
        address: of the cluster, as ``evomerge search --address`` takes it.
        insecure: join a cluster that asks for no token.

    Raises:
        InputError: no job server answers there, or the cluster asks for no token.
    """

    def __init__(self, address: str, *, insecure: bool) -> None:
        self._client = job_client(address)
        check_secured(self._client.get_address(), insecure=insecure, place="--address")
        self._insecure = insecure

    def start(
        self, name: str, folder: Path, log: Path, cluster: Cluster, command: Command = "resume"
    ) -> dict[str, Any]:
        """Start a driver of a search on the cluster; what names the job in a record.

        One that goes on with the search has its workers there; one that confirms it has those of its search file.

        What it says is added to ``log``, where people look, and stands in Ray's own log of the job.
        """
        line = ["evomerge", command, str(folder)]
        if command == "resume":
            line += ["--set", "pool=ray", "--set", "cluster.address=auto"]
            line += ["--set", "cluster.insecure=true"] if self._insecure else []
        said = f"{shlex.join(line)} 2>&1 | tee -a {shlex.quote(str(log))}"
        entrypoint = f"bash -o pipefail -c {shlex.quote(said)}"
        return {"job": submit(self._client, name, folder, entrypoint, runtime_env_of(cluster))}

    def is_alive(self, record: Mapping[str, Any]) -> bool:
        """Whether the job of a record has not ended. One that the cluster does not know any more has."""
        job = self._look(record)
        return job is not None and not has_ended(job.status)

    def complaint(self, record: Mapping[str, Any]) -> str:
        """What a job that failed said last; nothing where it ended well, or is not known any more."""
        job = self._look(record)
        lines = str(job.message or "").splitlines() if job is not None and job.status == "FAILED" else []
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")

    def _look(self, record: Mapping[str, Any]) -> Any:
        """What the cluster knows of a job; None where it knows nothing, or does not answer."""
        try:
            return self._client.get_job_info(record["job"])
        except (RuntimeError, OSError):
            return None
