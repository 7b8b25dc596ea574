"""Exports a routed model as a folder with its own code: exact, for transformers with `trust_remote_code=True`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.errors import InputError
from evomerge.routed.computing import Experts, Routing, VectorExperts
from evomerge.routed.sites import Place
from evomerge.routed.units import Unit

CODE = ("modeling_routed.py", "computing.py", "gates.py")
_INDEX = "model.safetensors.index.json"


def add_experts(folder: Path, places: Mapping[str, Place], units: Sequence[Unit]) -> None:
    """Turn the folder of a trunk into a routed model.

    Args:
        folder: a plain folder, with weights and configuration.
        units: the units of experts and routers; units gated by one block's router share its place.

    Raises:
        InputError: the model's configuration names no class of transformers.
    """
    tensors: dict[str, Tensor] = {}
    said_places: list[dict[str, Any]] = []
    said_sites: list[dict[str, Any]] = []
    numbers: dict[tuple[str, ...], int] = {}
    for number, unit in enumerate(units):
        if unit.places not in numbers:
            at = numbers[unit.places] = len(numbers)
            found = _router_numbers(unit.routing)
            tensors |= {f"routers_float32.{at}.{key}": tensor for key, tensor in found.items()}
            said_places.append(_place(places[unit.places[0]], unit.routing, found))
        plain, float32 = _expert_numbers(unit.experts)
        tensors |= {f"experts.{number}.{key}": tensor for key, tensor in plain.items()}
        tensors |= {f"experts_float32.{number}.{key}": tensor for key, tensor in float32.items()}
        said_sites.append(
            {
                "modules": [site.module for site in unit.sites],
                "form": unit.sites[0].form,
                "place": numbers[unit.places],
                "shapes": _shapes(plain),
                "float32": _shapes(float32),
            }
        )
    _add_tensors(folder, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    base = _configure(folder, {"places": said_places, "sites": said_sites})
    for file in CODE:
        (folder / file).write_text(_code(file, base), encoding="utf-8")


def _place(place: Place, routing: Routing, numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "name": place.name,
        "is_block": place.is_block,
        "heads": place.heads,
        "kind": routing.router.kind,
        "gating": asdict(routing.gating),
        "routers": routing.routers,
        "shapes": _shapes(numbers),
    }


def _router_numbers(routing: Routing) -> dict[str, Tensor]:
    given = {
        "weight": routing.router.weight,
        "bias": routing.router.bias,
        "added": routing.bias,
        "present": None if routing.present is None else routing.present.float(),
    }
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _expert_numbers(experts: Experts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors in the model's dtype, and those in float32."""
    if isinstance(experts, VectorExperts):
        return {}, {"deltas": experts.deltas}
    ups = {f"up{number}": up for number, up in enumerate(experts.ups)}
    return {"down": experts.down, **ups}, {"spread": experts.spread}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a separate file beside those of the model, and add all of them to its index."""
    index = folder / _INDEX
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
    else:
        from safetensors import safe_open

        whole = "model-trunk.safetensors"
        (folder / "model.safetensors").rename(folder / whole)
        with safe_open(folder / whole, framework="pt") as opened:
            content = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(opened.keys(), whole)}
        content["metadata"]["total_size"] = (folder / whole).stat().st_size
    save_file(tensors, folder / "model-experts.safetensors", {"format": "pt"})
    content["weight_map"] |= dict.fromkeys(tensors, "model-experts.safetensors")
    content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _configure(folder: Path, routed: dict[str, Any]) -> tuple[str, str]:
    """Add the experts to the configuration; return the class names of the base model's configuration and model."""
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if not architectures:
        raise InputError("--as", "the base's config.json names no architecture", "Export it as a plain model.")
    names = CONFIG_MAPPING[config["model_type"]].__name__, str(architectures[0])
    config |= {
        "model_type": "evomerge_routed",
        "architectures": ["RoutedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_routed.RoutedConfig",
            "AutoModelForCausalLM": "modeling_routed.RoutedForCausalLM",
        },
        "routed": routed,
    }
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return names


def _code(file: str, base: tuple[str, str]) -> str:
    """A file of this package in the form it has in the folder: imports of the other files become relative."""
    text = files("evomerge.routed").joinpath(file).read_text(encoding="utf-8")
    text = text.replace("from evomerge.routed.", "from .")
    return text.replace("LlamaConfig as", f"{base[0]} as").replace("LlamaForCausalLM as", f"{base[1]} as")


def load(folder: Path, dtype: torch.dtype | None) -> Any:
    """Load the model of such a folder with transformers, running its code.

    Raises:
        Exception: any exception of transformers.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=True
    )
