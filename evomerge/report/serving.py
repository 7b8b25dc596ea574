"""What can be done with an exported folder: the commands, and whether those who read it find what they look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

_KNOWN_TOKENIZERS = ("BPE", "Unigram", "WordPiece")
"""Kinds of tokenizer.json that llama.cpp's converter knows."""


def commands(folder: str) -> dict[str, str]:
    """Commands of others on a plain model folder, by what they are for."""
    return {
        "serve it with vLLM": f"vllm serve {folder}",
        "make GGUF for llama.cpp": f"python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf --outtype bf16",
        "quantise the GGUF": f"llama-quantize {folder}.gguf {folder}-Q4_K_M.gguf Q4_K_M",
        "quantise it for vLLM": f"auto-round --model {folder} --scheme W4A16 --output_dir {folder}-W4A16",
    }


def section(folder: str) -> str:
    """The section of a model card that says so."""
    lines = [f"# {what}\n{command}" for what, command in commands(folder).items()]
    return "## Use\n\n```bash\n" + "\n".join(lines) + "\n```"


def missing(folder: Path) -> list[str]:
    """What llama.cpp's converter, vLLM or a quantiser reads and does not find, or not as they know it; in sentences."""
    found = []
    config = _json(folder / "config.json")
    found += [f"config.json says no {key}" for key in ("architectures", "model_type") if not config.get(key)]
    if not any(folder.glob("*.safetensors")):
        found.append("there is no file of weights in safetensors")
    index = _json(folder / "model.safetensors.index.json")
    files = set(index.get("weight_map", {}).values())
    found += [f"the index names {name}, which is not there" for name in sorted(files) if not (folder / name).exists()]
    if (folder / "tokenizer.model").exists():
        return found
    tokenizer = _json(folder / "tokenizer.json")
    kind = tokenizer.get("model", {}).get("type") if tokenizer else None
    if kind is None:
        found.append("there is neither a tokenizer.json nor a tokenizer.model")
    elif kind not in _KNOWN_TOKENIZERS:
        found.append(f"the tokenizer is a {kind}, and llama.cpp converts {', '.join(_KNOWN_TOKENIZERS)} alone")
    return found


def say(console: Console, folder: str | Path) -> None:
    """Print both of a folder that was made; nothing of what others do not read."""
    if not (Path(folder) / "config.json").exists():  # in object storage, or an adapter
        return
    for sentence in missing(Path(folder)):
        console.print(f"others may not read it: {sentence}", style="yellow", soft_wrap=True)
    for what, command in commands(str(folder)).items():
        console.print(f"{what}: {command}", style="dim", soft_wrap=True)


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content if isinstance(content, dict) else {}
