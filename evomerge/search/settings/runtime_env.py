"""What Ray sets up on a node before a worker's process starts: environment variables, packages, an image.

The words are Ray's (https://docs.ray.io/en/latest/ray-core/handling-dependencies.html), and Ray checks them.
"""

from __future__ import annotations

from typing import Any

from evomerge.errors import InputError
from evomerge.search.settings.sections import Cluster

_OURS = ("working_dir", "excludes")
"""A job's files are Evomerge's to send; what the search file names travels with them."""


def runtime_env_of(cluster: Cluster) -> dict[str, Any]:
    """The ``runtime_env`` of a search file as Ray understands it, files of requirements read.

    Raises:
        InputError: names the key and what Ray says of it.
    """
    if not cluster.runtime_env:
        return {}
    from ray.runtime_env import RuntimeEnv  # a second's import, for those who ask for it

    known = sorted(key for key in RuntimeEnv.known_fields if not key.startswith("_") and key not in _OURS)
    for key in cluster.runtime_env:
        if key not in known:
            raise InputError(f"cluster.runtime_env.{key}", "is not a known key", f"Known: {', '.join(known)}.")
    try:
        env: dict[str, Any] = RuntimeEnv(**cluster.runtime_env).to_dict()
    except (TypeError, ValueError, OSError) as error:
        raise InputError("cluster.runtime_env", " ".join(str(error).split())) from None
    return {key: value for key, value in env.items() if not key.startswith("_")}
