"""The blocks of image models, by the names that people who merge them use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

KEPT = ("VAE", "EMA")
"""Blocks that stay the first model's, unless a recipe says something of them."""

_Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


def _numbered(label: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{label}{int(match[1]):02d}"


def _plain(label: str) -> Callable[[re.Match[str]], str]:
    return lambda match: label


_RULES: tuple[_Rule, ...] = tuple(
    (re.compile(pattern), label)
    for pattern, label in (
        # One file for all, as Stable Diffusion 1, 2 and XL have it.
        (r"model_ema\.", _plain("EMA")),
        (r"(?:model\.diffusion_model\.)input_blocks\.(\d+)\.", _numbered("IN")),
        (r"(?:model\.diffusion_model\.)middle_block\.", _plain("MID")),
        (r"(?:model\.diffusion_model\.)output_blocks\.(\d+)\.", _numbered("OUT")),
        (r"model\.diffusion_model\.(?:time_embed|label_emb)\.", _plain("IN00")),
        (r"(?:cond_stage_model|conditioner|text_encoders?|clip_[lg]|t5xxl)\.", _plain("TEXT")),
        (r"(?:first_stage_model|vae)[./]", _plain("VAE")),
        # Flux: double and single blocks.
        (r"(?:model\.diffusion_model\.|transformer/)?double_blocks\.(\d+)\.", _numbered("D")),
        (r"(?:model\.diffusion_model\.|transformer/)?single_blocks\.(\d+)\.", _numbered("S")),
        (r"(?:model\.diffusion_model\.)?(?:img_in|txt_in|time_in|vector_in|guidance_in)\.", _plain("IN")),
        (r"(?:model\.diffusion_model\.)?final_layer\.", _plain("OUT")),
        # Folders of diffusers, a component a folder.
        (r"text_encoder(?:_\d)?/", _plain("TEXT")),
        (r"unet/down_blocks\.(\d+)\.", _numbered("IN")),
        (r"unet/mid_block\.", _plain("MID")),
        (r"unet/up_blocks\.(\d+)\.", _numbered("OUT")),
        (r"unet/(?:conv_in|time_embedding|add_embedding)\.", _plain("IN00")),
        (r"transformer/transformer_blocks\.(\d+)\.", _numbered("D")),
        (r"transformer/single_transformer_blocks\.(\d+)\.", _numbered("S")),
    )
)
_LAST = re.compile(r"model\.diffusion_model\.out\.|unet/conv_(?:norm_)?out\.")
"""What stands behind the last of the output blocks, and goes with it."""


def blocks_of(names: Iterable[str]) -> dict[str, str]:
    """The block of each tensor; empty for those that are in none, as all are of a model of another kind."""
    found: dict[str, str] = {}
    last: list[str] = []
    for name in names:
        match = next(((rule.match(name), label) for rule, label in _RULES if rule.match(name)), None)
        found[name] = match[1](match[0]) if match is not None and match[0] is not None else ""
        if _LAST.match(name):
            last.append(name)
    ends = sorted({block for block in found.values() if re.fullmatch(r"OUT\d\d", block)})
    return found | dict.fromkeys(last, ends[-1] if ends else "OUT")


def grouped(names: Iterable[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The group of each tensor that is in one: the first of which a pattern is that of its name, or of its block.

    Patterns are as in a shell: ``*attn*``, ``IN0?``. A tensor of a block in ``KEPT`` is in a group that names this
    block, and in no other.

    Args:
        patterns: by group.
    """
    found = {}
    for name, block in blocks_of(names).items():
        for group, of_group in patterns.items():
            if block in of_group or (block not in KEPT and any(_fits(name, block, one) for one in of_group)):
                found[name] = group
                break
    return found


def _fits(name: str, block: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or (block != "" and fnmatchcase(block, pattern))
