"""Sources that are made from others before a search: a weighted sum of changes to one base, or a random change.

From low-rank adapters they are one adapter, with the ranks of all combined; otherwise a model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.merging.adapters.low_rank_change import is_low_rank, low_rank_factors
from evomerge.merging.building.export import add_companions, config_text, write_model, writing
from evomerge.recipes.stack import Blend, StackRecipe

_VERSION = "derived 1"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Derived:
    """What a source is made from.

    Attributes:
        terms: the coefficient of each source's change.
        seed: if given, the change is in a random direction instead, as long as the sum in each weight.
    """

    terms: Mapping[str, float]
    seed: int | None = None


def make_source(
    derived: Derived, name: str, base: str, sources: Mapping[str, Source], contents: Mapping[str, str], root: Path
) -> str:
    """Make a source in the folder ``root``, unless it exists, and return its reference.

    The folder's name is derived from what it is made from, so equal sources share a folder.

    Args:
        base: the source that the changes apply to.
        contents: a digest of each source's content.

    Raises:
        InputError: it cannot be written.
    """
    origin, of = sources[base], [sources[term] for term in derived.terms]
    made_of = [(contents[term], weight) for term, weight in derived.terms.items()]
    key = json.dumps([_VERSION, contents[base], made_of, derived.seed])
    out = root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    as_adapter = all(is_low_rank(origin, source) for source in of)
    if not out.exists():
        root.mkdir(parents=True, exist_ok=True)
        if as_adapter:
            _write_adapter(derived, origin, sources, out)
        elif derived.seed is None:
            _write_sum(derived, base, sources, out)
        else:
            _write_random(derived, derived.seed, base, sources, out)
    return f"{origin.reference}+{out}" if as_adapter else str(out)


def _write_adapter(derived: Derived, base: Source, sources: Mapping[str, Source], out: Path) -> None:
    """A LoRA in float32 whose scale is 1; weights with fewer ranks than others are padded with zeros."""
    changed = {tensor for term in derived.terms for tensor in sources[term].changes}
    factors = {tensor: _factors(derived, tensor, sources) for tensor in sorted(changed)}
    if derived.seed is not None:
        random = torch.Generator().manual_seed(derived.seed)
        factors = {tensor: _turned_away(pair, random) for tensor, pair in factors.items()}
    rank = max(left.shape[1] for left, _ in factors.values())
    weights = {}
    for tensor, (left, right) in factors.items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        down, up = (left.T, right.T) if tensor in base.transposed else (right, left)
        more = rank - left.shape[1]
        weights[f"{module}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, more)).float().contiguous()
        weights[f"{module}.lora_B.weight"] = torch.nn.functional.pad(up, (0, more)).float().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.reference, "bias": "none",
        "r": rank, "lora_alpha": rank, "fan_in_fan_out": any(tensor in base.transposed for tensor in factors),
        "target_modules": [tensor.removesuffix(".weight") for tensor in factors],
    }  # fmt: skip
    partial_folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    save_file(weights, partial_folder / _WEIGHTS)
    (partial_folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial_folder.rename(out)


def _factors(derived: Derived, tensor: str, sources: Mapping[str, Source]) -> tuple[Tensor, Tensor]:
    """L [rows, ranks] and R [ranks, columns] of the sum's change to a weight, as stored: float64."""
    lefts, rights = [], []
    for term, weight in derived.terms.items():
        if (pair := low_rank_factors(sources[term], tensor)) is not None:
            lefts.append(weight * pair[0])
            rights.append(pair[1])
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _turned_away(pair: tuple[Tensor, Tensor], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normally distributed factors of the same shapes, whose product is as long as theirs."""
    left, right = (torch.randn(factor.shape, generator=random, dtype=torch.float64) for factor in pair)
    return left * (_product_norm(*pair) / _product_norm(left, right)), right


def _product_norm(left: Tensor, right: Tensor) -> float:
    """norm(L R), from the small matrices L^T L and R R^T."""
    return float(((left.T @ left) * (right @ right.T).T).sum().clamp(min=0).sqrt())


def _recipe(derived: Derived, base: str, sources: Mapping[str, Source]) -> StackRecipe:
    origin = sources[base]
    blend = Blend(
        method="task_arithmetic", sources=tuple(derived.terms), base=base,
        parameters={"weight": dict(derived.terms), "lambda": 1.0, "normalize": False},
    )  # fmt: skip
    names = (base, *derived.terms)
    references = {name: sources[name].reference for name in names}
    return StackRecipe.uniform(blend, sources=references, tokenizer=base, layers=origin.layers)


def _write_sum(derived: Derived, base: str, sources: Mapping[str, Source], out: Path) -> None:
    used = {name: sources[name] for name in (base, *derived.terms)}
    write_model(_recipe(derived, base, sources), used, out, texts={})


def _write_random(derived: Derived, seed: int, base: str, sources: Mapping[str, Source], out: Path) -> None:
    """The base plus, in each tensor that the sum changes, a normally distributed change of the same length."""
    from evomerge.merging.materialise import Materialiser

    origin, used = sources[base], {name: sources[name] for name in (base, *derived.terms)}
    recipe, materialiser = _recipe(derived, base, sources), Materialiser(used)

    def tensors(done: set[str]) -> Iterator[tuple[str, Tensor]]:  # nothing is done yet in a folder without a key
        random = torch.Generator().manual_seed(seed)
        for name, merged in materialiser.tensors(recipe):
            stored = origin.read(name).float()
            noise = torch.randn(stored.shape, generator=random)
            length = torch.linalg.vector_norm(merged.float() - stored) / torch.linalg.vector_norm(noise)
            yield name, (stored + length * noise).to(merged.dtype)

    layout = materialiser.layout(recipe)
    with writing(out, layout, tensors, sources=used, key=None, progress=lambda done, of: None) as folder:
        add_companions(folder, origin, {"config.json": config_text(recipe, used)})
