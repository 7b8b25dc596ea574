"""A model folder as files: which may be opened, the content of its JSON, and the location of every tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evomerge.checkpoints.headers import TensorEntry, read_header
from evomerge.errors import InputError
from evomerge.files import JSON_BYTES, TEXT_BYTES, check_plain, is_path, read_json, read_text
from evomerge.printable import printable

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TEMPLATES = "additional_chat_templates"
_TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab.txt", "merges.txt",
    "bpe.codes", "dict.txt", "tekken.json", "*.model", "*.spm", "*.tiktoken", "chat_template.jinja",
    f"{TEMPLATES}/*.jinja",
)  # fmt: skip
"""The files of a tokenizer that a folder may have: those that the classes of transformers look for."""

IMAGE_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Where transformers 5 stores the processor's settings, and where older versions stored them."""

_COMPANIONS = re.compile(
    r"[^.].*\.(json|jinja|txt|model|spm|tiktoken|codes)|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY).*", re.I
)
"""Files that describe how a model is to be used, and by whom."""

_MADE_ANEW = re.compile(
    r"(config|params)\.json|.*\.index\.json|adapter_\w+\.json|lineage\.json|README.*|requirements.*\.txt"
    r"|(trainer_state|training_args|train_results|eval_results|all_results)\.json|.*\.(bin|pt|pth|safetensors)"
)
"""Files about these particular weights or their training: a merge writes its own, or none."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
_READS_FILES = ("init_inputs", "vocab", "merges", "tokenizer_object", "rewriting_rules", "entity_vocab", "subfolder")
"""Keys of a tokenizer's configuration that its class may interpret as a file, or as a place to look for files."""

_MAX_PATH = 4_096  # characters
_MAX_FILES = 5_000

_QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
"""Files that quantisation tools write beside weights, some of them without mentioning it in config.json."""

_CONFIG_BYTES = 10_000_000  # the largest list 20,000 labels
_CONVERT = "To convert it where you trust it: `AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`."


def check_files(folder: Path, place: str) -> tuple[str, ...]:
    """Reject a folder with a link that leads outside of models, or with something in it that is not a regular file.

    Everything that a loader could open is checked: the folder itself and its chat templates, whatever the names. Links
    are allowed

    - within the folder;
    - in a hub cache, which consists of links: ``snapshots/<revision>/x -> ../../blobs/<hash>``;
    - to the file with the same name in another model's folder, which people use for variants of a model.

    Returns:
        names of links of the last kind, for a warning.

    Raises:
        InputError: naming the file.
    """
    elsewhere = []
    for number, file in enumerate(_entries(folder, place)):
        if number == _MAX_FILES:
            raise InputError(place, f"holds more than {_MAX_FILES:,} files, which no model has")
        name = str(file.relative_to(folder))
        if file.is_symlink():
            if not _is_loop_free(file):
                raise InputError(place, f"{name} is a link that leads back to itself", "Remove it.")
            if not _stays(file, folder):
                if not _leads_to_a_model(file):
                    raise InputError(place, f"{name} is a link that leaves the folder", "Put the file itself there.")
                elsewhere.append(name)
        if os.path.exists(file) and not file.is_dir():
            check_plain(file, place)
    return tuple(elsewhere)


def _entries(folder: Path, place: str) -> Iterator[Path]:
    """The entries of a model's folder and of its chat templates; loaders do not follow links to other folders."""
    for file in sorted(folder.iterdir()):
        if not (file.is_symlink() and os.path.isdir(file) and file.name != TEMPLATES):
            yield file
    templates = folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        yield from sorted(templates.iterdir())


def _is_loop_free(link: Path) -> bool:
    try:
        os.stat(link)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


def _stays(file: Path, folder: Path) -> bool:
    """Whether a link stays within the folder, or within the hub cache that the folder belongs to."""
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    real = Path(os.path.realpath(file))
    return any(real.is_relative_to(root) for root in allowed)


def _leads_to_a_model(link: Path) -> bool:
    """Whether a link leads to the file with its own name in another folder with a model or an adapter."""
    target = Path(os.path.join(link.parent, os.readlink(link)))
    folder = Path(os.path.realpath(target.parent))
    described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    holds_model = described and any(folder.glob("*.safetensors"))
    if target.name != link.name or not holds_model:
        return False
    target = folder / target.name
    return not target.is_symlink() or _stays(target, folder) or _leads_to_a_model(target)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a model's folder, including chat templates, by name."""
    return sorted({file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()})


def processor_files(folder: Path) -> list[Path]:
    """The processor's files, in addition to those of its tokenizer."""
    names = (*IMAGE_PROCESSORS, "video_preprocessor_config.json", "chat_template.json")
    return [folder / name for name in names if has(folder, name)]


def companion_files(folder: Path) -> list[Path]:
    """The files that accompany a model, except its weights and config.json, by name.

    These are its tokenizer, chat templates, generation settings, processor settings, licence, and everything else that
    describes its use. Code, training records, and data too large to be settings are excluded.
    """
    named = (file for file in folder.iterdir() if file.is_file() and _COMPANIONS.fullmatch(file.name))
    texts = (file for file in named if file.stat().st_size <= TEXT_BYTES)
    return sorted({*tokenizer_files(folder), *(file for file in texts if not _MADE_ANEW.fullmatch(file.name))})


def check_tokenizer(folder: Path, place: str) -> None:
    """Reject a tokenizer that loads code, or files from elsewhere, or paths that are not regular files.

    transformers passes all keys to the tokenizer's class, and some classes open what they are given. Keys that name
    files (``vocab_file``) are harmless, because transformers overwrites them with the files of the folder.

    Raises:
        InputError: naming the file, or the key of tokenizer_config.json.
    """
    for pattern in _TOKENIZER:
        for file in folder.glob(pattern):
            if not is_path(file.name):
                raise InputError(place, f"{file.name!r} is a name that cannot be written down", "Rename the file.")
            if file.exists():
                check_plain(file, place, JSON_BYTES)
    if not has(folder, _TOKENIZER_CONFIG):
        return
    content = load_json(folder / _TOKENIZER_CONFIG, place)
    if content.get("auto_map") is not None:
        raise InputError(
            place,
            f"{_TOKENIZER_CONFIG}: auto_map asks for code from the model's folder",
            "Read what it names; if transformers knows the tokenizer without it, delete the key from a copy.",
        )
    for key, value in content.items():
        if _reads_files(key, value):
            raise InputError(
                place,
                f"{_TOKENIZER_CONFIG}: {printable(key, 100)} would make transformers read files from elsewhere",
                "Delete the key from a copy.",
            )
    versions = content.get("fast_tokenizer_files") or []
    known = {file.name for file in tokenizer_files(folder)}
    for name in versions if isinstance(versions, list) else [versions]:
        if name not in known:
            shown = printable(repr(name), 100)
            problem = f"{_TOKENIZER_CONFIG}: fast_tokenizer_files names {shown}, which is not there"
            raise InputError(place, problem, "Copy it there, or delete the key.")


def _reads_files(key: str, value: Any) -> bool:
    if key in _READS_FILES:
        return bool(value)
    if key.endswith("_kwargs") and isinstance(value, dict):  # for SentencePiece and MeCab, which accept file names
        return any(isinstance(inner, str) and "/" in inner for inner in value.values())
    named = isinstance(value, str) and len(value) < _MAX_PATH and "/" in value and not key.endswith("_file")
    return named and "\0" not in value and os.path.isfile(value)


def has(folder: Path, name: str) -> bool:
    """Whether something exists under a name, even if it would be rejected when read."""
    return os.path.exists(folder / name)


def zero_folder(folder: Path) -> Path | None:
    """The folder with the shards of a DeepSpeed ZeRO checkpoint: this one, or its subfolder with the last step.

    None if there is no such checkpoint. The file ``latest`` may only name a direct subfolder.

    Raises:
        InputError: ``latest`` is not a regular file.
    """
    latest = folder / "latest"
    if has(folder, latest.name):
        named = read_text(latest, str(folder), most=1_000, errors="replace").strip()
        steps = [step for step in folder.iterdir() if step.name == named]
    else:
        steps = sorted(folder.glob("global_step*"))
    for step in [folder, *steps[-1:]]:
        if any(step.glob("*_optim_states.pt")) or any(step.glob("*_model_states.pt")):
            return step
    return None


def refuse_unreadable(folder: Path, place: str) -> None:
    """Reject a folder whose weights are in an unsupported format, recognised by file names.

    Raises:
        InputError: it says what to do.
    """
    for name, kind in _QUANTISERS.items():
        if has(folder, name):
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
            f"{folder} holds GGUF ({files[0].name}), which is a model by itself",
            f"Name the file: {files[0]}.",
        )


def load_json(file: Path, place: str, most: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, which may have at most ``most`` bytes.

    Raises:
        InputError: the file is missing, not a regular file, too large, not JSON, or not an object.
    """
    if not os.path.lexists(file):
        raise InputError(place, f"has no {file.name} in {file.parent}", "Name a folder that holds a model.")
    content = read_json(file, place, most)
    if not isinstance(content, dict):
        raise InputError(place, f"{file.name} is not a JSON object", "Download it again.")
    return content


def load_config(folder: Path, place: str) -> dict[str, Any]:
    """The content of a model's config.json, not checked yet.

    Raises:
        InputError: as for ``load_json``.
    """
    return load_json(folder / "config.json", place, _CONFIG_BYTES)


def find_tensors(folder: Path, place: str) -> dict[str, TensorEntry]:
    """Every tensor in the folder's safetensors files, reading only headers.

    Raises:
        InputError: no safetensors, a missing or broken shard, an index that is missing, points outside the folder or
            disagrees with its shards.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if has(folder, WEIGHTS) and has(folder, INDEX):
        raise InputError(place, f"has both {WEIGHTS} and {INDEX}", "Remove the one that is out of date.")
    if has(folder, WEIGHTS):
        return read_header(single, place)
    if has(folder, INDEX):
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
        # The name is untrusted: it may only name a file directly in this folder.
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise InputError(place, f"{INDEX} names {shard!r}, which leads outside the folder", "Do not use it.")
    listed: dict[str, set[str]] = {shard: set() for shard in shards}
    for name, shard in weight_map.items():
        listed[shard].add(name)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        file = folder / shard
        if not has(folder, shard):
            raise InputError(place, f"the shard {shard} is missing from {folder}", "Complete the download.")
        in_shard = read_header(file, place)
        if wrong := sorted(listed[shard] ^ in_shard.keys()):
            where = "lacks it" if wrong[0] in listed[shard] else "has it unlisted"
            problem = f"{INDEX} disagrees with {shard} on {wrong[0]!r}: the shard {where}"
            raise InputError(place, problem, "Copy the index and all shards again, from one place.")
        tensors |= in_shard
    return tensors
