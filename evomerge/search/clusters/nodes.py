"""Where workers of a Ray cluster can run: how many fit on which node, and how many are wanted."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group

from evomerge.errors import InputError, described
from evomerge.search.settings.sections import Cluster, Workers

Resources = Mapping[str, float]
"""Amounts by kind, as Ray names them: CPU, GPU."""

_ANSWER_S = 2.0  # a raylet of the same cluster takes milliseconds to accept a connection
_WORDS = 300  # characters of Ray's messages that are kept; the important part comes first
_FRAME = re.compile(r'File "(.+)", line (\d+)')


def gpus_per_worker(cluster: Cluster, resources: Resources) -> float:
    """As the search file says, or one if the cluster has any."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) else 0.0


def needs_of_worker(cluster: Cluster, *nodes: Resources) -> dict[str, float]:
    """The resources that one worker takes from a node."""
    gpus = gpus_per_worker(cluster, {"GPU": sum(node.get("GPU", 0) for node in nodes)})
    return {kind: n for kind, n in {"CPU": float(cluster.cpus_per_worker), "GPU": gpus}.items() if n}


def room(needs: Resources, *nodes: Resources) -> int:
    """How many workers fit; a worker is never spread over two nodes."""
    return sum(min(int(node.get(kind, 0) / need + 1e-9) for kind, need in needs.items()) for node in nodes)


def worker_limits(cluster: Cluster) -> tuple[int, int | None]:
    """The smallest and largest number of wanted workers; None means as many as fit."""
    wanted = cluster.workers
    if isinstance(wanted, Workers):
        return wanted.min, wanted.max
    return wanted or 1, wanted


def workers_that_fit(cluster: Cluster, *nodes: Resources) -> int:
    """How many workers to start on these nodes: as many as requested, or as many as fit.

    Raises:
        InputError: the cluster has fewer resources than requested; with the arithmetic.
    """
    needs, (least, most) = needs_of_worker(cluster, *nodes), worker_limits(cluster)
    fitting = room(needs, *nodes)
    if fitting >= least:
        return fitting if most is None else min(fitting, most)
    _check_node(needs, nodes)
    have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in needs}
    sums = [f"{least} x {need:g} {kind} = {least * need:g} of {have[kind]:g}" for kind, need in needs.items()]
    short = [text for text, (kind, need) in zip(sums, needs.items(), strict=True) if least * need > have[kind]]
    raise InputError(
        "cluster.workers",
        f"the cluster has too little: {'; '.join(short or sums)}",
        f"At most {fitting} such workers fit, each on one node.",
    )


def _check_node(needs: Resources, nodes: Sequence[Resources]) -> None:
    """Refuse a worker of more GPUs than any node has. Raises InputError."""
    wanted, most = needs.get("GPU", 0), max((node.get("GPU", 0) for node in nodes), default=0)
    if wanted > max(most, 1):
        problem = f"is {wanted:g}, all of one node, and the largest node has {most:g}: {wanted - most:g} are missing"
        raise InputError("cluster.gpus_per_worker", problem, "Lower it, or add nodes that have that many.")


def usable_nodes() -> dict[str, Resources]:
    """The resources of nodes that are alive and not about to leave, by node id."""
    leaving = draining_nodes()
    return {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving
    }


def node_names() -> dict[str, str]:
    """The name of each node that Ray knows, by its id: its host, and a part of the id if a host has several."""
    return {node["NodeID"]: f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}" for node in ray.nodes()}


def answers(node: str) -> bool:
    """Whether a node's raylet accepts connections. Ray itself takes 15 s to notice that a node is gone."""
    if ray.util.client.ray.is_connected():
        return True  # a Ray client's process need not reach the nodes
    for entry in ray.nodes():
        if entry["NodeID"] == node:
            try:
                socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), _ANSWER_S).close()
            except OSError:
                return False
            return True
    return False


def is_lost_node_error(error: RayError) -> bool:
    """Whether Ray says that an actor died with its node. Python can see the cause only in this message."""
    return "node has died" in str(error)


def words_of(error: RayError) -> str:
    """An error as one line: what a worker raised, otherwise Ray's message without its names."""
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        return described(error.cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayTaskError):  # what was raised could not be pickled
        return lines[-1][:_WORDS]
    messages = [line for line in lines if not re.match(r"(class_name|actor_id|pid|name|namespace|ip): ", line)]
    return " ".join(messages[1:] or messages)[:_WORDS]


def fault_of(error: RayError, node: str) -> InputError:
    """Why no worker can be started, from the error of the last start.

    An InputError keeps its place, message and hint. Of any other exception, the hint says where it was raised.

    Args:
        node: where it was.
    """
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, InputError):
        return InputError(cause.place, f"{cause.problem} (on {node}; no worker could be started)", cause.hint)
    frames = _FRAME.findall(str(error)) if cause is not None else []
    hint = "It was raised there in {}, line {}.".format(*frames[-1]) if frames else ""
    return InputError("cluster", f"no worker could be started: {node}: {words_of(error)}", hint)


def draining_nodes() -> set[str]:
    """Nodes that will be taken away: by an autoscaler, or by their provider.

    Ray exposes this only to its own libraries (``ray.train`` asks in this way); a Ray client's process cannot ask.
    """
    if ray.util.client.ray.is_connected():
        return set()
    return set(ray._private.state.state.get_draining_nodes())


def together_on_a_node(needs: Resources, node: str) -> PlacementGroup:
    """Reserve the resources of one worker, all on one node: this one, unless others have taken its resources."""
    return placement_group([dict(needs)], strategy="STRICT_PACK", _soft_target_node_id=node)


def ask_for(needs: Resources, workers: int) -> None:
    """Tell an autoscaler, if there is one, how many workers are wanted in total; 0 withdraws the request."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(needs)] * workers)
