"""A small network with tensor names as in Stable Diffusion's single file, and how well it removes noise from stripes.

``score`` is the function that examples/state_dict.yaml names: it receives items and the path of a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, silu

UNET = "model.diffusion_model."
SHAPES = {
    "input_blocks.0.0": (8, 1), "input_blocks.1.0": (16, 8), "middle_block.0": (16, 16), "output_blocks.0.0": (8, 24),
    "out.2": (1, 8),
}  # fmt: skip
"""Output and input channels of each 3 x 3 convolution."""

SIZE, NOISE = 8, 0.7


def denoised(tensors: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """Remove the noise from pictures [count, 1, size, size]."""

    def convolved(name: str, inputs: Tensor, stride: int = 1) -> Tensor:
        weight, bias = (tensors[f"{UNET}{name}.{part}"].float() for part in ("weight", "bias"))
        return conv2d(inputs, weight, bias, stride=stride, padding=1)

    fine = silu(convolved("input_blocks.0.0", pictures))
    coarse = silu(convolved("middle_block.0", silu(convolved("input_blocks.1.0", fine, stride=2))))
    joined = torch.cat([interpolate(coarse, scale_factor=2), fine], dim=1)
    return convolved("out.2", silu(convolved("output_blocks.0.0", joined)))


def stripes(direction: str, seed: int) -> tuple[Tensor, Tensor]:
    """A picture of horizontal or vertical stripes [1, size, size], and the same with noise."""
    random = torch.Generator().manual_seed(seed)
    width, begin = 0.6 + torch.rand(1, generator=random), 6.28 * torch.rand(1, generator=random)
    rows = torch.sin(width * torch.arange(SIZE) + begin).expand(SIZE, SIZE)
    picture = (rows.T if direction == "horizontal" else rows)[None]
    return picture, picture + NOISE * torch.randn(picture.shape, generator=random)


def score(items: Sequence[Mapping[str, Any]], weights: Path) -> list[float]:
    """The mean squared error of each item's picture, denoised with the table of tensors at ``weights``."""
    pairs = [stripes(item["direction"], item["seed"]) for item in items]
    clean, noisy = (torch.stack(pictures) for pictures in zip(*pairs, strict=True))
    errors: list[float] = (denoised(load_file(weights), noisy) - clean).square().mean(dim=(1, 2, 3)).tolist()
    return errors
