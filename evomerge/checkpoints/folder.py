"""A model folder as files: which of them may be opened, what its JSON says, and where every tensor lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evomerge.checkpoints.headers import TensorEntry, read_header
from evomerge.errors import InputError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""The files that make a tokenizer, where a folder has them."""

_QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
"""Files that quantisers put beside weights, some of them without a word in config.json."""

_MAX_JSON_BYTES = 200_000_000
_CONVERT = "To convert it where you trust it: `AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`."


def check_links(folder: Path, place: str) -> None:
    """Refuse a folder with a file that is a link to somewhere else.

    A hub cache is made of such links, ``snapshots/<revision>/x -> ../../blobs/<hash>``; those are let through.

    Raises:
        InputError: naming the file.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in allowed):
            raise InputError(place, f"{file.name} is a link that leaves the folder", "Put the file itself there.")


def zero_folder(folder: Path) -> Path | None:
    """The folder with the shards of a DeepSpeed ZeRO checkpoint: this one, or the one below that holds its last step.

    None when there is no such checkpoint. What the file ``latest`` says is followed only to a folder right here.
    """
    latest = folder / "latest"
    if latest.is_file():
        steps = [step for step in folder.iterdir() if step.name == latest.read_text("utf-8", "replace").strip()]
    else:
        steps = sorted(folder.glob("global_step*"))
    for step in [folder, *steps[-1:]]:
        if any(step.glob("*_optim_states.pt")) or any(step.glob("*_model_states.pt")):
            return step
    return None


def refuse_unreadable(folder: Path, place: str) -> None:
    """Refuse a folder whose weights are in a form of their own, by its name.

    Raises:
        InputError: it tells what to do.
    """
    for name, kind in _QUANTISERS.items():
        if (folder / name).exists():
            raise InputError(
                place, f"{name} says that the weights are quantised ({kind})", "Use the full-precision model."
            )
    if any(folder.glob("*.safetensors")):
        return
    if (step := zero_folder(folder)) is not None:
        raise InputError(
            place,
            f"{folder} is a DeepSpeed ZeRO checkpoint: its weights are cut up among the shards in {step.name}",
            "Put them together with `evomerge consolidate` and name the folder that it makes.",
        )
    if files := sorted(folder.glob("*.gguf")):
        raise InputError(
            place,
            f"{folder} holds GGUF ({files[0].name}), which llama.cpp reads and which mostly is quantised",
            "Use the model in full precision that it was made from.",
        )


def load_json(file: Path, place: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: it is missing, too large, no JSON, or no object.
    """
    try:
        size = file.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise InputError(place, f"{file.name} is absurdly large: {size:,} bytes")
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(place, f"has no {file.name} in {file.parent}", "Name a folder that holds a model.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(place, f"{file.name} is not JSON ({error})", "Download it again.") from None
    if not isinstance(content, dict):
        raise InputError(place, f"{file.name} is not a JSON object", "Download it again.")
    return content


def find_tensors(folder: Path, place: str) -> dict[str, TensorEntry]:
    """Every tensor in the folder's safetensors files, headers only.

    Raises:
        InputError: no safetensors, a shard missing or broken, an index that is missing, leads outside the folder or
            disagrees with its shards.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(place, f"has both {WEIGHTS} and {INDEX}", "Remove the one that is out of date.")
    if single.exists():
        return read_header(single, place)
    if index.exists():
        return _indexed(folder, load_json(index, place).get("weight_map"), place)
    if shards := sorted(folder.glob("model-*.safetensors")):
        raise InputError(place, f"has {shards[0].name} but no {INDEX}", "Download the index as well.")
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise InputError(place, f"holds pickled weights only ({pickled[0].name}), which can run code", _CONVERT)
    raise InputError(place, f"has no {WEIGHTS} in {folder}", f"Pickled weights are not read. {_CONVERT}")


def _indexed(folder: Path, weight_map: Any, place: str) -> dict[str, TensorEntry]:
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(place, f"{INDEX} has no weight_map from tensors to files", "Download it again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # The name comes from a stranger: it may only ever name a file that lies right here.
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise InputError(place, f"{INDEX} names {shard!r}, which leads outside the folder", "Do not use it.")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        file = folder / shard
        if not file.is_file():
            raise InputError(place, f"the shard {shard} is missing from {folder}", "Complete the download.")
        found = read_header(file, place)
        listed = {name for name, where in weight_map.items() if where == shard}
        if wrong := sorted(listed ^ found.keys()):
            where = "lacks it" if wrong[0] in listed else "has it unlisted"
            raise InputError(place, f"{INDEX} disagrees with {shard} on {wrong[0]!r}: the shard {where}")
        tensors |= found
    return tensors
