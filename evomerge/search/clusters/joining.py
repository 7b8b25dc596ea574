"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from evomerge.errors import InputError, described
from evomerge.search.clusters.launch import check_secured, in_token_mode, listeners, who_listens
from evomerge.search.settings.sections import Cluster

PORTS_VARIABLE = "EVOMERGE_PORTS"
"""The environment variable that asks for the ports on which Ray listens, by process."""


def connect(cluster: Cluster) -> bool:
    """Join the cluster, or start one on this machine; True if it was started here, so that we must end it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _private_files():
        try:
            context = ray.init(
                address=cluster.address or "local",
                include_dashboard=False if cluster.address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        except Exception as error:  # Ray raises plain ones, such as for a node that is too slow to start
            raise _unavailable(cluster.address, error) from None
    try:
        check_secured(context.dashboard_url if cluster.address else None, insecure=cluster.insecure)
    except InputError:
        ray.shutdown()
        raise
    if cluster.address is None:
        line = who_listens(listeners(), secured=in_token_mode(), ports=bool(os.environ.get(PORTS_VARIABLE)))
        print(line, file=sys.stderr)
    return True


def _unavailable(address: str | None, error: Exception) -> InputError:
    if address is None:
        problem = f"Ray cannot be started on this machine: {described(error)}"
        return InputError("pool", problem, "Take `pool: in_process`, or name a running cluster in `cluster.address`.")
    problem = f"no Ray cluster answers at {address}: {described(error)}"
    hint = f"See whether it runs: ray status --address {address}. Or it requires another token: RAY_AUTH_MODE=token."
    return InputError("cluster.address", problem, hint)


@contextmanager
def _private_files() -> Iterator[None]:
    """Ray writes its authentication token readable by everyone on the machine unless the umask forbids it."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
