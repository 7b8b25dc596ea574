"""Whether a model can be laid over as many devices as the search file gives a worker, by its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.sharding import sharding_problem
from evomerge.errors import InputError
from evomerge.search.settings.search_file import SearchFile

PLACE = "cluster.gpus_per_worker"
LAYOUTS = (1, 2, 4, 8)
"""Devices of a worker that are usual."""


def is_here(file: SearchFile) -> bool:
    """Whether workers are on this very machine."""
    return file.pool == "in_process" or file.cluster.address is None


def check_layout(file: SearchFile, config: Mapping[str, Any], layers: int) -> None:
    """Refuse a worker of several devices whose model cannot be laid over them.

    Args:
        config: that of the source which gives the merged model its own.
        layers: the fewest that a model of the search begins with.

    Raises:
        InputError: with the arithmetic.
    """
    devices = file.cluster.devices
    if devices == 1:
        return
    if file.device not in (None, "cuda"):
        problem = f"is {devices}, and device: {file.device} names one device"
        raise InputError(PLACE, problem, "Leave `device` out, or give a worker one GPU.")
    if layers < devices:
        problem = f"is {devices}, and the model has {layers} layers: {devices - layers} of the GPUs would have none"
        raise InputError(PLACE, problem, f"Give a worker at most {layers}.")
    if file.engine == "vllm" and (problem := sharding_problem(config, devices)):
        fitting = [str(each) for each in LAYOUTS if not sharding_problem(config, each)]
        hint = f"vLLM can divide it among {', '.join(fitting)}; or leave `engine` out."
        raise InputError(PLACE, f"is {devices}, and vLLM cannot divide the model: {problem}", hint)
