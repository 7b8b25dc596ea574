"""Makes a base, two fine-tunes of it, and items, in this folder, for examples/state_dict.yaml.

    python examples/tables/make.py

This takes seconds on a processor. The base has seen few stripes; three quarters of the stripes of each fine-tune have
its own direction.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from denoise import SHAPES, UNET, denoised, stripes
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
ITEMS, FIRST_TRAINED = 400, 100_000


def begun() -> dict[str, Tensor]:
    """The network before training, with a text encoder and a VAE that are never trained."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (channels, inputs) in SHAPES.items():
        tensors[f"{UNET}{name}.weight"] = torch.randn(channels, inputs, 3, 3, generator=random) / (9 * inputs) ** 0.5
        tensors[f"{UNET}{name}.bias"] = torch.zeros(channels)
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"] = torch.ones(8)
    tensors["first_stage_model.decoder.conv_out.weight"] = torch.randn(3, 4, 3, 3, generator=random)
    return tensors


def trained(tensors: dict[str, Tensor], directions: list[str], steps: int) -> dict[str, Tensor]:
    """The network after some steps on batches of stripes, with the given directions in turn."""
    mine = {name: tensor.clone().requires_grad_(name.startswith(UNET)) for name, tensor in tensors.items()}
    adam = torch.optim.Adam([tensor for tensor in mine.values() if tensor.requires_grad], lr=3e-3)
    for step in range(steps):
        seeds = range(FIRST_TRAINED + 32 * step, FIRST_TRAINED + 32 * (step + 1))
        pairs = [stripes(directions[seed % len(directions)], seed) for seed in seeds]
        clean, noisy = (torch.stack(pictures) for pictures in zip(*pairs, strict=True))
        loss = (denoised(mine, noisy) - clean).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: tensor.detach() for name, tensor in mine.items()}


def main() -> None:
    torch.manual_seed(0)
    base = trained(begun(), ["horizontal", "vertical"], 30)
    save_file(base, HERE / "base.safetensors")
    for own, other in (("horizontal", "vertical"), ("vertical", "horizontal")):
        save_file(trained(base, [own, own, own, other], 200), HERE / f"{own}.safetensors")
    items = [{"direction": ("horizontal", "vertical")[seed % 2], "seed": seed} for seed in range(ITEMS)]
    (HERE / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
