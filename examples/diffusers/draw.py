"""The function of examples/image.yaml: a candidate draws the prompts of items, and is scored by the colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

STEPS = 8


@torch.no_grad()
def score(items: Sequence[Mapping[str, Any]], weights: Path) -> dict[str, Sequence[object]]:
    """The negative distance of each picture's colour from the wanted one, and the pictures. ``weights`` is a folder."""
    model = StableDiffusionPipeline.from_pretrained(weights, local_files_only=True)
    model.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(item["seed"]) for item in items]
    prompts = [item["prompt"] for item in items]
    pictures = model(prompts, num_inference_steps=STEPS, guidance_scale=1.0, generator=seeds).images
    pixels = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    return {"reward": [-distance(*pair) for pair in zip(pixels, items, strict=True)], "pictures": pictures}


def distance(pixels: np.ndarray, item: Mapping[str, Any]) -> float:
    """The distance of the wanted colour from that of the most colourful sixth of the pixels; 0 if they are equal."""
    flat = pixels.reshape(-1, 3)
    vivid = flat[np.argsort(flat.std(axis=1))[-len(flat) // 6 :]]
    return float(np.linalg.norm(vivid.mean(axis=0) - np.array(item["colour"], dtype=np.float32)))
