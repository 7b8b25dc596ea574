"""Whether a model can be divided among the devices that the search file gives a worker, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.sharding import sharding_problem
from evomerge.errors import InputError
from evomerge.search.settings.search_file import SearchFile

PLACE = "cluster.gpus_per_worker"
LAYOUTS = (1, 2, 4, 8)
"""Usual numbers of devices per worker, to suggest in hints."""


def is_here(file: SearchFile) -> bool:
    """Whether workers run on this machine."""
    return file.pool == "in_process" or file.cluster.address is None


def check_layout(file: SearchFile, config: Mapping[str, Any], layers: int) -> None:
    """Refuse a worker with several devices among which the model cannot be divided.

    Args:
        config: config.json of the source whose configuration the merged model gets.
        layers: the smallest number of layers with which a model of the search starts.

    Raises:
        InputError: naming the numbers that do not fit.
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
