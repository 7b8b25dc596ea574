"""What can be done with an exported folder: the commands, and whether other programs find what they need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

_KNOWN_TOKENIZERS = ("BPE", "Unigram", "WordPiece")
"""The kinds of tokenizer.json that llama.cpp's converter supports."""

_KNOWN_TOWERS = (
    "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "InternVisionModel", "Llama4ForConditionalGeneration", "Mistral3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)  # fmt: skip
"""Mergeable architectures with image towers that llama.cpp's converter supports (``--mmproj``), as checked by
``scripts/parity/converter.py``. LLaVA is also supported if its tower is Pixtral's."""


def commands(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Commands of other programs for a plain model folder, by purpose.

    Args:
        config: the content of its config.json. llama.cpp needs the image tower in a second file.
    """
    whole, small, tower = (quote(f"{folder}{end}.gguf") for end in ("", "-Q4_K_M", "-mmproj"))
    here, other = quote(folder), quote(f"{folder}-W4A16")
    convert = f"python convert_hf_to_gguf.py {here} --outtype bf16 --outfile"
    made = {
        "serve it with vLLM": f"vllm serve {here}",
        "make GGUF for llama.cpp": f"{convert} {whole}",
        "quantise the GGUF": f"llama-quantize {whole} {small} Q4_K_M",
    }
    if _has_tower(config) and _is_known(config):
        made["make GGUF of what reads images"] = f"{convert} {tower} --mmproj"
        made["ask llama.cpp about an image"] = f"llama-mtmd-cli -m {small} --mmproj {tower} --image IMAGE -p QUESTION"
    return {**made, "quantise it for vLLM": f"auto-round --model {here} --scheme W4A16 --output_dir {other}"}


def section(folder: str, config: Mapping[str, Any]) -> str:
    """The section of a model card with these commands."""
    lines = [f"# {what}\n{command}" for what, command in commands(folder, config).items()]
    return "## Use\n\n```bash\n" + "\n".join(lines) + "\n```"


def missing(folder: Path) -> list[str]:
    """Sentences about what llama.cpp's converter, vLLM or a quantiser needs and does not find or support."""
    found = []
    config = _json(folder / "config.json")
    found += [f"config.json says no {key}" for key in ("architectures", "model_type") if not config.get(key)]
    if not any(folder.glob("*.safetensors")):
        found.append("there is no file of weights in safetensors")
    index = _json(folder / "model.safetensors.index.json")
    files = set(index.get("weight_map", {}).values())
    found += [f"the index names {name}, which is not there" for name in sorted(files) if not (folder / name).exists()]
    return found + _missing_of_tower(folder, config) + _missing_of_tokenizer(folder)


def _missing_of_tower(folder: Path, config: Mapping[str, Any]) -> list[str]:
    if not _has_tower(config):
        return []
    found = []
    if not _is_known(config):
        found.append(f"llama.cpp converts no tower of {_architecture(config)}; its GGUF reads texts alone")
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        found.append("there is no preprocessor_config.json, which says how images become pixels")
    return found


def _missing_of_tokenizer(folder: Path) -> list[str]:
    if (folder / "tokenizer.model").exists():
        return []
    tokenizer = _json(folder / "tokenizer.json")
    kind = tokenizer.get("model", {}).get("type") if tokenizer else None
    if kind is None:
        return ["there is neither a tokenizer.json nor a tokenizer.model"]
    if kind not in _KNOWN_TOKENIZERS:
        return [f"the tokenizer is a {kind}, and llama.cpp converts {', '.join(_KNOWN_TOKENIZERS)} alone"]
    return []


def _has_tower(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("vision_config"), dict)


def _architecture(config: Mapping[str, Any]) -> str:
    """The architecture by which llama.cpp's converter selects how to read a tower."""
    named = config["vision_config"].get("architectures") or config.get("architectures") or ["an unnamed architecture"]
    return str(named[0])


def _is_known(config: Mapping[str, Any]) -> bool:
    name = _architecture(config)
    is_pixtral = config["vision_config"].get("model_type") == "pixtral"
    return name in _KNOWN_TOWERS or (name == "LlavaForConditionalGeneration" and is_pixtral)


def say(console: Console, folder: str | Path) -> None:
    """Print the commands and the problems of a written folder; nothing if other programs do not read it."""
    if not (Path(folder) / "config.json").exists():  # in object storage, or an adapter
        return
    for sentence in missing(Path(folder)):
        console.print(f"other programs may not read it: {sentence}", style="yellow", soft_wrap=True)
    for what, command in commands(str(folder), _json(Path(folder) / "config.json")).items():
        console.print(f"{what}: {command}", style="dim", soft_wrap=True)


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content if isinstance(content, dict) else {}
