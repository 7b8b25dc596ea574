"""Ray's runtime environment, set up on a node before a worker starts: environment variables, packages, an image.

Its keys are Ray's (https://docs.ray.io/en/latest/ray-core/handling-dependencies.html), and Ray checks their values.
"""

from __future__ import annotations

from typing import Any

from evomerge.errors import InputError
from evomerge.search.settings.sections import Cluster

_OURS = ("working_dir", "excludes")
"""Keys that Evomerge sets itself: it sends a job's files, including those that the search file names."""


def runtime_env_of(cluster: Cluster) -> dict[str, Any]:
    """The ``runtime_env`` of a search file in Ray's form, with the content of requirements files; empty if not given.

    Raises:
        InputError: a key is not known, or Ray refuses a value; the message is Ray's.
    """
    if not cluster.runtime_env:
        return {}
    from ray.runtime_env import RuntimeEnv  # takes a second to import

    known = sorted(key for key in RuntimeEnv.known_fields if not key.startswith("_") and key not in _OURS)
    for key in cluster.runtime_env:
        if key not in known:
            raise InputError(f"cluster.runtime_env.{key}", "is not a known key", f"Known: {', '.join(known)}.")
    try:
        env: dict[str, Any] = RuntimeEnv(**cluster.runtime_env).to_dict()
    except (TypeError, ValueError, OSError) as error:
        raise InputError("cluster.runtime_env", " ".join(str(error).split())) from None
    return {key: value for key, value in env.items() if not key.startswith("_")}
