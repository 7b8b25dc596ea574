"""Tiny models of the families that read images, from their own configuration classes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers_checkpoints import WORDS, save_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config, text_config

IMAGE = len(WORDS)
"""The id of the image token, after all words of the text models."""

TOKENS = ("<image>", "<begin>", "<end>", "<video>")
"""The tokens of the models here in addition to the words."""

_TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS) + 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_CLIP = {**_TOWER, "model_type": "clip_vision_model"}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model"}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3,
}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
_IDS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": IMAGE + 1,
    "vision_end_token_id": IMAGE + 2,
    "video_token_id": IMAGE + 3,
}
_LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

VISION: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _CLIP, "image_token_id": IMAGE},
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral"}, "vision_config": _CLIP, "image_token_id": IMAGE,
        "image_grid_pinpoints": [[28, 56], [56, 28]],
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"}, "vision_config": _SIGLIP, "image_token_id": IMAGE,
        "image_grid_pinpoints": [[28, 56], [56, 28]], "video_token_id": IMAGE + 1,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS}, **_IDS,
        "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS}, **_IDS,
        "vision_config": {
            **_QWEN_TOWER, "intermediate_size": 24, "out_hidden_size": 16, "window_size": 28,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS}, **_IDS,
        "vision_config": {
            **_QWEN_TOWER, "intermediate_size": 24, "out_hidden_size": 16, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen3_5": {
        "text_config": {**_TEXT, **_LINEAR, "rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}, **_IDS,
        "vision_config": {
            **_QWEN_TOWER, "intermediate_size": 24, "out_hidden_size": 16, "num_position_embeddings": 16,
        },
    },
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 4}, "vision_config": _SIGLIP, "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {
            **_TEXT, "sliding_window": 4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "global_head_dim": 4, "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {
            **_TOWER, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2, "standardize": True,
            "use_clipped_linears": True,
        },
        "image_token_id": IMAGE, "audio_config": None,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"}, "image_token_index": IMAGE,
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8, "image_size": 56},
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"}, "image_token_id": IMAGE,
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "idefics2": {
        "text_config": {**_TEXT, "model_type": "mistral"}, "vision_config": _TOWER, "image_token_id": IMAGE,
        "perceiver_config": {
            "hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _TOWER, "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _TOWER, "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma"}, "vision_config": {**_SIGLIP, "projection_dim": 16},
        "image_token_index": IMAGE, "projection_dim": 16,
    },
}  # fmt: skip
"""The settings of a tiny model for each family."""


IMAGES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, list[Any]]]] = {
    "llava": ({"pixel_values": (1, 3, 28, 28)}, {}),
    "llava_next": ({"pixel_values": (1, 3, 3, 28, 28)}, {"image_sizes": [[28, 28]]}),
    "qwen2_vl": ({"pixel_values": (4, 3 * 2 * 14 * 14)}, {"image_grid_thw": [[1, 2, 2]]}),
    "gemma4": (
        {"pixel_values": (1, 4, 3 * 14 * 14)}, {"image_position_ids": [[[0, 0], [1, 0], [0, 1], [1, 1]]]}
    ),
    "mistral3": ({"pixel_values": (1, 3, 56, 28)}, {"image_sizes": [[56, 28]]}),
    "idefics2": ({"pixel_values": (1, 1, 3, 28, 28)}, {}),
}  # fmt: skip
"""One image as from the family's processor: shapes for random values, and integers as they are."""

_LIKE = {
    "llava_onevision": "llava_next", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen2_vl", "qwen3_5": "qwen2_vl",
    "gemma3": "llava", "internvl": "llava", "paligemma": "llava", "idefics3": "idefics2", "smolvlm": "idefics2",
}  # fmt: skip


def image_inputs(family: str, model: Any) -> dict[str, torch.Tensor]:
    """A text with one image in the middle, as inputs of a model of the family."""
    shapes, numbers = IMAGES[_LIKE.get(family, family)]
    generator = torch.Generator().manual_seed(0)
    pixels: dict[str, torch.Tensor] = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    pixels |= {name: torch.tensor(values) for name, values in numbers.items()}
    with torch.inference_mode():
        features = model.model.get_image_features(**pixels).pooler_output
    tokens = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
    ids = torch.tensor([[3, 4, *[IMAGE] * tokens, 5, 6]])
    kinds = {"mm_token_type_ids": (ids == IMAGE).int()} if family.startswith("qwen") else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **pixels}


def vision_config(family: str, **changes: Any) -> Any:
    settings: Mapping[str, Any] = {**VISION[family], **changes}
    return CONFIG_MAPPING[family](**settings)


COMMIT = ("llava", "gemma3", "qwen3_5")
"""The families that are tested for every commit: a foreign tower with a plain text model, a tied head, and layers with
linear attention."""

_TWINS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""The plain text models from which families with text models of their own were made."""


def save_vision(
    family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random model of a family with a tokenizer that has its image token."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(vision_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.buffers():  # in Gemma 4: bounds of activations, and the numbers that standardize them
            if buffer.is_floating_point():
                buffer.copy_(buffer.nan_to_num(neginf=-50.0, posinf=50.0))
    model.save_pretrained(folder)
    save_tokenizer(folder, [*WORDS, *TOKENS], extra_special_tokens=list(TOKENS))
    return folder


def save_next_processor(folder: Path) -> None:
    """Write the processor of a tiny LLaVA-NeXT, for images of 28 pixels, whole and in two halves."""
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    pinpoints = VISION["llava_next"]["image_grid_pinpoints"]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints), AutoTokenizer.from_pretrained(folder),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)


def save_twin(source: Source, folder: Path, seed: int | None = None) -> Path:
    """Write the text model alone, with the text tensors of a source or random ones, and the same tokenizer."""
    parsed = text_config(parse_config(source.config, source.place))
    kind = CONFIG_MAPPING[_TWINS.get(parsed.model_type, parsed.model_type)]
    settings = {key: value for key, value in parsed.to_dict().items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        kind(**settings | {"tie_word_embeddings": source.tied}), dtype=source.dtype
    )
    tensors = {name: source.read(name) for name, role in source.roles.items() if role.kind != "vision"}
    if seed is not None:
        torch.manual_seed(seed)
        tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    model.save_pretrained(folder)
    shutil.copy(source.folder / "tokenizer.json", folder)
    shutil.copy(source.folder / "tokenizer_config.json", folder)
    return folder
