"""Folders with several experts of one base and their routers, in the formats of the MoLA and LoRAMoE code.

In addition to the configuration of a LoRA, the weights file has, for each adapted module ("...mlp.up_proj"),

    MoLA      lora_A_{e}.weight, or lora_A.default_{e}.weight, lora_B as well; router.router.weight  (arXiv 2402.08562)
    LoRAMoE   lora_A{e}.weight, lora_B{e}.weight; lora_route.weight                                  (arXiv 2312.09979)

with experts e = 0, 1, ...; with MoLA some layers have fewer. A router is [experts, inputs] and has no bias. MoLA's
configuration gives the rank of each layer in a list.
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
    """Whether a file contains several numbered experts, and routers."""
    return any(_ROUTER.fullmatch(name) for name in stored)


def of_expert(
    stored: Mapping[str, TensorEntry], number: int | None, folder: Path, place: str
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """One expert's tensors with PEFT's names, and the router of each module that it is part of, by module.

    Raises:
        InputError: no expert is named, or one that does not exist.
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
    """Convert a configuration with a list of ranks per layer to PEFT's form, a pattern of module names."""
    ranks = config.get("r")
    if not isinstance(ranks, list) or not ranks:
        return config
    patterns = {rf"layers\.{layer}\..*": rank for layer, rank in enumerate(ranks)}
    return {**config, "r": ranks[0], "rank_pattern": patterns | (config.get("rank_pattern") or {})}
