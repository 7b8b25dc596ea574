"""Drivers as jobs on a Ray cluster, which must see the searches' folders at the same paths as the server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from evomerge.search.clusters.launch import check_secured, has_ended, job_client, submit
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.sections import Cluster
from evomerge.service.processes import last_error

Command = Literal["resume", "confirm"]
"""What a driver is started for; each is a command of `evomerge`."""


class RayJobs:
    """Starts drivers as jobs, and finds them again through their records.

    Args:
        address: the cluster's address, as for ``evomerge search --address``.
        insecure: join a cluster that does not require a token.

    Raises:
        InputError: no job server answers there, or the cluster does not require a token.
    """

    def __init__(self, address: str, *, insecure: bool) -> None:
        self._client = job_client(address)
        check_secured(self._client.get_address(), insecure=insecure, place="--address")
        self._insecure = insecure

    def start(
        self, name: str, folder: Path, log: Path, cluster: Cluster, command: Command = "resume"
    ) -> dict[str, Any]:
        """Start a driver of a search on the cluster. Returns the entries that identify the job in its record.

        A driver that resumes the search has its workers on the cluster; one that confirms it has those of its search
        file. The output is appended to ``log``, where people look for it, and to Ray's own log of the job.
        """
        line = ["evomerge", command, str(folder)]
        if command == "resume":
            line += ["--set", "pool=ray", "--set", "cluster.address=auto"]
            line += ["--set", "cluster.insecure=true"] if self._insecure else []
        piped = f"{shlex.join(line)} 2>&1 | tee -a {shlex.quote(str(log))}"
        entrypoint = f"bash -o pipefail -c {shlex.quote(piped)}"
        return {"job": submit(self._client, name, folder, entrypoint, runtime_env_of(cluster))}

    def is_alive(self, record: Mapping[str, Any]) -> bool:
        """Whether the recorded job has not ended. A job that the cluster no longer knows has ended."""
        job = self._job_info(record)
        return job is not None and not has_ended(job.status)

    def last_error(self, record: Mapping[str, Any]) -> str:
        """The last error message of a failed job; empty if it succeeded or is no longer known."""
        job = self._job_info(record)
        message = str(job.message or "") if job is not None and job.status == "FAILED" else ""
        return last_error(message) or next(reversed(message.splitlines()), "")

    def _job_info(self, record: Mapping[str, Any]) -> Any:
        """What the cluster knows about a job; None if it does not know the job or does not answer."""
        try:
            return self._client.get_job_info(record["job"])
        except (RuntimeError, OSError):
            return None
