"""Launch on a Ray cluster: the driver of a search as a Ray job, its log, the running searches, and access control.

The job's files are the search file and the small files that it names, but not the sources: they are gigabytes, and
each node reads them from where the search file says.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

import evomerge
from evomerge.errors import InputError, described
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.search_file import SearchFile, load_search_file

INTERRUPTED = 130

_MAX_BYTES = 100 * 2**20  # of a file or folder that is uploaded with the job; Ray refuses 500 MiB in total
_FILE, _FILES = "search.yaml", "files"
_SEARCH, _FOLDER, _VERSION = "evomerge_search", "evomerge_folder", "evomerge_version"  # keys of a job's metadata
_PROBE_S = 5.0
_LOST_S = 300.0  # a head node that restarts is back by then
_RETRY_S = 2.0


@dataclass(frozen=True)
class Running:
    """A search whose driver is a job of a cluster, pending or running.

    ``started`` is in seconds since 1970; ``folder`` is on the cluster.
    """

    name: str
    folder: str
    job: str
    status: str
    started: float


@dataclass(frozen=True)
class ListeningPort:
    """A port that a process of this search's own Ray cluster listens on."""

    process: str
    host: str
    port: int


def launch(
    path: Path,
    folder: Path | None,
    overrides: Sequence[str],
    address: str,
    *,
    detach: bool,
    insecure: bool,
    say: Callable[[str], None] = print,
) -> int:
    """Start a search as a job of the cluster at ``address``, and follow its log unless told to ``detach``.

    Args:
        path: the search file, on this machine.
        folder: the search's folder on the cluster; a search that is there already is resumed.
        address: ``auto``, ``ray://HOST:10001``, ``HOST:6379`` or the job server's ``http://HOST:8265``.
        insecure: join a cluster that admits everybody.

    Returns:
        The exit code of the job; 0 if detached at once, 130 if Ctrl-C only ended the following.

    Raises:
        InputError: the search file is wrong, no job server answers, or the cluster requires no token.
    """
    file = load_search_file(path, overrides)
    if folder is None or not folder.is_absolute():
        hint = "Name it with --dir: a path that is the same on every node of the cluster."
        raise InputError("--dir", "must be the full path of a folder on the cluster", hint)
    client = job_client(address)
    check_secured(client.get_address(), insecure=insecure, place="--address")
    with tempfile.TemporaryDirectory(prefix="evomerge-") as staging:
        for left in stage(file, Path(staging)):
            say(f"not uploaded, so it must be at the same place on the cluster: {left}")
        with_files = runtime_env_of(file.cluster) | {"working_dir": staging}
        job = submit(client, file.name, folder, entrypoint(folder), with_files)
    again = f"ray job logs --address {client.get_address()} --follow {job}"
    say(f"{file.name} is job {job} at {client.get_address()}, in {folder}")
    if detach:
        say(f"follow: {again}")
        return 0
    code = follow(client, job, lambda text: print(text, end="", flush=True))
    if code == INTERRUPTED and not has_ended(client.get_job_info(job).status):
        say(f"\ndetached: the search goes on. Follow it again: {again}")
    return code


def job_client(address: str) -> Any:
    """Ray's ``JobSubmissionClient`` for a cluster.

    Raises:
        InputError: no job server answers there, or it refuses our token.
    """
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they would print every package and connection
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise _refused(address) from None
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        if "401" in str(error) or "403" in str(error):
            raise _refused(address) from None
        problem = f"no Ray job server answers at {address} ({str(error).strip().splitlines()[0]})"
        hint = "Its head node serves jobs at http://HEAD:8265, where `ray[default]` is installed."
        raise InputError("--address", problem, hint) from None


def _refused(address: str) -> InputError:
    hint = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own."
    return InputError("--address", f"the cluster at {address} refuses our token", hint)


def stage(file: SearchFile, into: Path) -> list[str]:
    """Write the search file for the cluster, with copies of the small local files that it names.

    In it ``pool`` is ray, ``cluster.address`` is auto, and copied files are named relative to it. Sources and the
    folder of tasks' data, which may contain anything, stay where they are.

    Returns:
        The local files that were too large to be copied.
    """
    settings = file.model_dump(mode="json")
    settings["pool"] = "ray"
    settings["cluster"] |= {"address": "auto", "runtime_env": runtime_env_of(file.cluster)}
    stays = {"sources": settings.pop("sources"), "data_folder": settings.pop("data_folder")}
    left: list[str] = []
    copies: dict[str, str] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner) for inner in value]
        if not isinstance(value, str) or not os.path.isabs(value) or not os.path.exists(value):
            return value
        if value not in copies and _bytes(Path(value)) > _MAX_BYTES:
            left.append(value)
            copies[value] = value
        if value not in copies:
            copies[value] = f"{_FILES}/{len(copies)}/{Path(value).name}"
            _copy(Path(value), into / copies[value])
        return copies[value]

    content = {"name": settings.pop("name"), **stays, **moved(settings)}
    (into / _FILE).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return left


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True)
    if path.is_file():
        shutil.copyfile(path, to)
    else:
        shutil.copytree(path, to)


def entrypoint(folder: Path) -> str:
    """The job's shell command: resume the search in ``folder``, or start it.

    The job's files are copied next to the folder first, because Ray deletes them after the job, and `resume` and
    the workers on other nodes need them.
    """
    there, files = shlex.quote(str(folder)), shlex.quote(f"{folder}.files")
    return (
        f"if [ -e {there}/search.yaml ]; then exec evomerge resume {there}; fi; "
        f"mkdir -p {files} && cp -R . {files} && exec evomerge search {files}/{_FILE} --dir {there}"
    )


def submit(client: Any, name: str, folder: Path, command: str, runtime_env: Mapping[str, Any]) -> str:
    """Start a shell command as a job that ``running`` lists as the search of this name; the job's id.

    Raises:
        InputError: the cluster refuses it.
    """
    metadata = {_SEARCH: name, _FOLDER: str(folder), _VERSION: evomerge.__version__}
    try:
        job: str = client.submit_job(
            entrypoint=command,
            submission_id=f"{name}-{secrets.token_hex(4)}",
            runtime_env=dict(runtime_env),
            metadata=metadata,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError("--address", f"the cluster refuses the job: {described(error)}") from None
    return job


def follow(client: Any, job: str, write: Callable[[str], None]) -> int:
    """Copy a job's log until it ends; its exit code, or 130 after Ctrl-C, which leaves the job alone.

    Raises:
        InputError: the job server has been unreachable for five minutes.
    """
    try:
        asyncio.run(_copy_log(client, job, write))
    except KeyboardInterrupt:
        return INTERRUPTED
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return INTERRUPTED
    if info.driver_exit_code is None:  # it has not begun, and its log is empty
        write(f"error: the job has failed: {info.message}\n")
    return int(info.driver_exit_code or 1)


async def _copy_log(client: Any, job: str, write: Callable[[str], None]) -> None:
    """Every connection returns the log from its start, so text that was already shown is skipped."""
    import aiohttp
    import requests

    shown, heard = 0, time.monotonic()
    while True:
        seen = 0
        try:
            async with aclosing(client.tail_job_logs(job)) as log:
                async for text in log:
                    heard = time.monotonic()
                    if fresh := text[max(0, shown - seen) :]:
                        write(fresh)
                    seen += len(text)
                    shown = max(shown, seen)
            if has_ended(client.get_job_info(job).status):
                return
            heard = time.monotonic()
        except (RuntimeError, aiohttp.ClientError, requests.RequestException) as error:
            if time.monotonic() - heard > _LOST_S:
                raise InputError(
                    "--address", f"the job server is lost: {error}", "The search may still be running."
                ) from None
        await asyncio.sleep(_RETRY_S)


def has_ended(status: Any) -> bool:
    """Whether this status is final."""
    return bool(status.is_terminal())


def running(address: str) -> list[Running]:
    """The searches whose drivers are jobs of the cluster at ``address`` and have not ended, oldest first.

    Raises:
        InputError: no job server answers there.
    """
    searches = []
    for job in job_client(address).list_jobs():
        metadata = job.metadata or {}
        if _SEARCH in metadata and not has_ended(job.status):
            started = (job.start_time or 0) / 1000
            folder = metadata.get(_FOLDER, "")
            searches.append(Running(metadata[_SEARCH], folder, job.submission_id, job.status.value, started))
    return sorted(searches, key=lambda row: row.started)


def check_secured(job_server: str | None, *, insecure: bool, place: str = "cluster.insecure") -> None:
    """Refuse a cluster that admits everybody: whoever reaches its ports can run commands on it.

    The job server is asked without a token, and must refuse. If there is none, or it cannot be reached from here,
    this process itself must be in token mode.

    Args:
        job_server: its URL, such as ``http://HEAD:8265``.
        insecure: the user has consented to join it anyway.
        place: the place that the error names.

    Raises:
        InputError: the cluster requires no token.
    """
    if insecure:
        return
    asks = None if job_server is None else requires_token(job_server)
    if asks is None:
        asks = in_token_mode()
    if not asks:
        raise InputError(
            place,
            "the Ray cluster requires no token: whoever reaches its ports can run commands on it",
            "Start it with RAY_AUTH_MODE=token (docs/cluster.md), or consent: --insecure, or `cluster.insecure: true`.",
        )


def in_token_mode() -> bool:
    """Whether Ray requires a token in this process, and in the clusters that it starts."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def requires_token(job_server: str) -> bool | None:
    """Whether a job server refuses requests without a token; None if it cannot be reached."""
    url = job_server if "://" in job_server else f"http://{job_server}"
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=_PROBE_S):
            return False
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return None


def listeners() -> list[ListeningPort]:
    """The ports on which child processes of this one listen: those of the Ray cluster that it has started."""
    return sorted(set(_listening()), key=lambda listener: (listener.process, listener.host, listener.port))


def _listening() -> Iterator[ListeningPort]:
    for process in psutil.Process().children(recursive=True):
        try:
            name, connections = _role(process.cmdline()), process.net_connections("tcp")
        except psutil.Error:  # it has ended, or belongs to another user
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                yield ListeningPort(name, connection.laddr.ip, connection.laddr.port)


def _role(command: Sequence[str]) -> str:
    """The role of a Ray process, for people."""
    known = {"gcs_server": "gcs", "raylet": "raylet", "dashboard.py": "job server"}
    for word in command[:3]:
        name = Path(word).name
        if name in known:
            return known[name]
        if "agent" in name.lower():
            return "agent"
    return "worker"


def who_listens(all_listeners: Sequence[ListeningPort], *, secured: bool, ports: bool) -> str:
    """One line for people: whether other machines can reach the cluster of this search, and what they need for that.

    Args:
        secured: whether the cluster requires a token.
        ports: name every port, for a log.
    """
    near: dict[str, list[str]] = {}
    far: dict[str, list[str]] = {}
    for listener in all_listeners:
        side = near if listener.host in ("127.0.0.1", "::1") else far
        side.setdefault(listener.process, []).append(str(listener.port))
    who = "whoever has its private token" if secured else "anybody: it requires no token"
    who = who if far else "this machine alone"
    text = f"Ray runs on this machine, open to {who} (docs/cluster.md, Who may get in)"
    if not ports:
        return text
    sides = [
        "; ".join(f"{name} {' '.join(numbers)}" for name, numbers in side.items()) or "nothing" for side in (far, near)
    ]
    return f"{text}. On every interface: {sides[0]}. On this machine alone: {sides[1]}."
