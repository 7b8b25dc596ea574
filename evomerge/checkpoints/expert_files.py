"""Folders that hold many experts of one base and their routers, as the codes of MoLA and LoRAMoE write them.

Beside the configuration of a LoRA there are, for each adapted module ("...mlp.up_proj") in the file of weights,

    MoLA      lora_A_{e}.weight, or lora_A.default_{e}.weight, lora_B as well; router.router.weight  (arXiv 2402.08562)
    LoRAMoE   lora_A{e}.weight, lora_B{e}.weight; lora_route.weight                                  (arXiv 2312.09979)

with experts e = 0, 1, ...; of MoLA fewer in some layers. A router is [experts, inputs] and has no bias. MoLA's
configuration gives the rank of each layer, in a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.headers import TensorEntry
from evomerge.errors import InputError

_HALF = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])(\.[^.]+_|_)?(?P<expert>\d+)\.weight")
_ROUTER = re.compile(r"(?P<module>.+)\.(router\.router|lora_route)\.weight")


def holds_experts(stored: Mapping[str, TensorEntry]) -> bool:
    """Whether a file has several experts, each with its number, and routers."""
    return any(_ROUTER.fullmatch(name) for name in stored)


def of_expert(
    stored: Mapping[str, TensorEntry], number: int | None, folder: Path, place: str
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """One expert's tensors as PEFT names them, and the router of each module that it is in, by the module.

    Raises:
        InputError: no expert is named, or one that is not there.
    """
    halves = {name: match for name in stored if (match := _HALF.fullmatch(name))}
    routers = {match["module"]: stored[name] for name in stored if (match := _ROUTER.fullmatch(name))}
    numbers = sorted({int(match["expert"]) for match in halves.values()})
    if number not in numbers:
        has = f"{folder} holds the experts {numbers[0]} to {numbers[-1]}" if numbers else f"{folder} holds no experts"
        problem = has if number is None else f"{has}, and no expert {number}"
        raise InputError(place, problem, f"Name each as a source of its own: `BASE+{folder}#{numbers[0]}`, and so on.")
    own = {name: match for name, match in halves.items() if int(match["expert"]) == number}
    tensors = {f"{match['module']}.{match['half']}.weight": stored[name] for name, match in own.items()}
    return tensors, {match["module"]: routers[match["module"]] for match in own.values() if match["module"] in routers}


def with_one_rank(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration whose ranks are a number for each layer, as PEFT has them: by pattern of the module."""
    ranks = config.get("r")
    if not isinstance(ranks, list) or not ranks:
        return config
    patterns = {rf"layers\.{layer}\..*": rank for layer, rank in enumerate(ranks)}
    return {**config, "r": ranks[0], "rank_pattern": patterns | (config.get("rank_pattern") or {})}
