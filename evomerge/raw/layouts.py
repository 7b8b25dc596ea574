"""The layouts of image models, and the block of each tensor by the names in common use for merging.

A block has the same name in every layout of a model: IN02 of a single file is the second convolution and the second
attention of the first down block in diffusers. ``LAYOUTS`` has one entry per layout; unknown models have no blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

KEPT = ("VAE", "EMA", "SAFETY", "SCHEDULE")
"""Blocks that are copied from the first model unless a recipe names them: the autoencoder, averages from training,
checkers and image encoders beside the model, and constants of the noise schedule."""

TEXT = "TEXT"
"""The text encoder; if there are several, TEXT1, TEXT2 and so on."""

LAST = "OUT, the last"
"""What follows the last of the output blocks, and belongs to it."""


@dataclass(frozen=True)
class Depths:
    """How many convolutions (resnets) each down block and each up block of a UNet in diffusers has."""

    down: int
    up: int


Number = Callable[[re.Match[str], Depths], int]


@dataclass(frozen=True)
class Rule:
    """The block of names that begin with a match of a pattern: ``label``, with its number if it has one."""

    pattern: re.Pattern[str]
    label: str
    number: Number | None = None

    def block(self, match: re.Match[str], depths: Depths) -> str:
        """The block of a name that the pattern matched."""
        if self.number is None:
            return self.label
        number = self.number(match, depths)
        return f"{self.label}{number}" if self.label == TEXT else f"{self.label}{number:02d}"


@dataclass(frozen=True)
class Layout:
    """The layout of an image model.

    Attributes:
        name: its display name.
        mark: matches the beginning of a name that occurs in no layout before this one.
        rules: the first rule that matches a name gives its block.
    """

    name: str
    mark: re.Pattern[str]
    rules: tuple[Rule, ...]


def _rule(pattern: str, label: str, number: Number | None = None) -> Rule:
    return Rule(re.compile(pattern), label, number)


def _own(match: re.Match[str], depths: Depths) -> int:
    return int(match[1])


def _from_one(match: re.Match[str], depths: Depths) -> int:
    return int(match[1]) + 1


def _encoder(match: re.Match[str], depths: Depths) -> int:
    return int(match[1] or 1)


def _down(match: re.Match[str], depths: Depths) -> int:
    """The convolution ``match[2]`` of the down block ``match[1]``, or the downsampling after all of them."""
    inside = int(match[2]) if match[2] is not None else depths.down
    return 1 + int(match[1]) * (depths.down + 1) + inside


def _up(match: re.Match[str], depths: Depths) -> int:
    """The convolution ``match[2]`` of the up block ``match[1]``, the last of which upsamples."""
    inside = int(match[2]) if match[2] is not None else depths.up - 1
    return int(match[1]) * depths.up + inside


_IN_FILE = r"(?:model\.diffusion_model\.)"
_BESIDE = (
    _rule(r"model_ema\.", "EMA"),
    _rule(r"(?:first_stage_model|vae)\.", "VAE"),
    _rule(r"(?:alphas_|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|denoiser\.sigmas)", "SCHEDULE"),
    _rule(r"conditioner\.embedders\.(\d+)\.", TEXT, _from_one),
    _rule(r"(?:cond_stage_model|text_encoders\.clip_l|clip_l)\.", TEXT, lambda match, depths: 1),
    _rule(r"(?:text_encoders\.(?:clip_g|t5xxl)|clip_g|t5xxl)\.", TEXT, lambda match, depths: 2),
)
"""The content of a single file other than the denoising model."""

_UNET = (
    *_BESIDE,
    _rule(rf"{_IN_FILE}input_blocks\.(\d+)\.", "IN", _own),
    _rule(rf"{_IN_FILE}(?:time_embed|label_emb)\.", "IN00"),
    _rule(rf"{_IN_FILE}middle_block\.", "MID"),
    _rule(rf"{_IN_FILE}output_blocks\.(\d+)\.", "OUT", _own),
    _rule(rf"{_IN_FILE}out\.", LAST),
)
_FLUX = (
    *_BESIDE,
    _rule(rf"{_IN_FILE}?double_blocks\.(\d+)\.", "D", _own),
    _rule(rf"{_IN_FILE}?single_blocks\.(\d+)\.", "S", _own),
    _rule(rf"{_IN_FILE}?(?:img_in|txt_in|time_in|vector_in|guidance_in)\.", "IN"),
    _rule(rf"{_IN_FILE}?final_layer\.", "OUT"),
)
_COMPONENTS = (
    _rule(r"vae/", "VAE"),
    _rule(r"text_encoder(?:_(\d))?/", TEXT, _encoder),
    _rule(r"(?:safety_checker|image_encoder)/", "SAFETY"),
)
"""The other components of a diffusers folder, one per subfolder."""

_UNET_COMPONENT = (
    *_COMPONENTS,
    _rule(r"(?:unet/)?down_blocks\.(\d+)\.(?:(?:resnets|attentions)\.(\d+)|downsamplers)\.", "IN", _down),
    _rule(r"(?:unet/)?(?:conv_in|time_embedding|add_embedding|class_embedding)\.", "IN00"),
    _rule(r"(?:unet/)?mid_block\.", "MID"),
    _rule(r"(?:unet/)?up_blocks\.(\d+)\.(?:(?:resnets|attentions)\.(\d+)|upsamplers)\.", "OUT", _up),
    _rule(r"(?:unet/)?conv_(?:norm_)?out\.", LAST),
)
_FLUX_COMPONENT = (
    *_COMPONENTS,
    _rule(r"(?:transformer/)?transformer_blocks\.(\d+)\.", "D", _own),
    _rule(r"(?:transformer/)?single_transformer_blocks\.(\d+)\.", "S", _own),
    _rule(r"(?:transformer/)?(?:x_embedder|context_embedder|time_text_embed)\.", "IN"),
    _rule(r"(?:transformer/)?(?:norm_out|proj_out)\.", "OUT"),
)

LAYOUTS = tuple(
    Layout(name, re.compile(mark), rules)
    for name, mark, rules in (
        ("Stable Diffusion XL in one file", rf"conditioner\.embedders\.|{_IN_FILE}label_emb\.", _UNET),
        ("Stable Diffusion 1 or 2 in one file", rf"{_IN_FILE}(?:input_blocks|middle_block|output_blocks)\.", _UNET),
        ("Flux in one file", rf"{_IN_FILE}?(?:double|single)_blocks\.\d", _FLUX),
        ("a UNet of diffusers", r"(?:unet/)?(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.", _UNET_COMPONENT),
        ("Flux of diffusers", r"(?:transformer/)?single_transformer_blocks\.\d", _FLUX_COMPONENT),
    )
)
"""The layouts that are recognised; the first with a matching mark is used."""


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a model, given the names of its tensors; None if unknown."""
    names = list(names)
    return next((layout for layout in LAYOUTS if any(layout.mark.match(name) for name in names)), None)


def depths_of(names: Collection[str]) -> Depths:
    """The depths of the down and up blocks of a UNet in diffusers; those of Stable Diffusion if there are none."""

    def resnets(side: str, usual: int) -> int:
        numbers = re.compile(rf"(?:unet/)?{side}_blocks\.\d+\.resnets\.(\d+)\.")
        return max((int(match[1]) + 1 for name in names if (match := numbers.match(name))), default=usual)

    return Depths(resnets("down", 2), resnets("up", 3))
