"""GGUF files with unquantised weights, opened as model folders.

A file is converted once into the user's cache (XDG_CACHE_HOME on Linux), under a hash of its path, size and
modification time: llama.cpp permutes some weights, and tokenizer and configuration have to be rewritten. The mapping of
names and settings is transformers' own; every weight keeps its exact value.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.folder import WEIGHTS
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.checkpoints.whole import whole_folder
from evomerge.errors import InputError

_VERSION = 1
"""The version of the conversion."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_folder(file: Path, place: str) -> Path:
    """The folder for a GGUF file, which is converted if it has not been yet.

    Raises:
        InputError: it is not a GGUF file, quantised, one of several files of a model, or of an architecture that
            transformers cannot read from GGUF.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(place, f"{file} is GGUF, which is read by a package", "`pip install gguf`") from None
    state = file.stat()
    text = json.dumps([_VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns])
    name = f"{re.sub(r'[^0-9A-Za-z_.-]', '_', file.stem)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    folder = user_cache_path("evomerge") / "gguf" / name
    if folder.exists():
        return folder
    try:
        reader = GGUFReader(str(file))
    except Exception as error:  # numpy may raise anything on a truncated or foreign file
        raise InputError(place, f"{file} cannot be read as GGUF ({first_line(error)})") from None
    _check(reader, file, place)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            _convert(reader, file, folder, place)
    return folder


def _check(reader: Any, file: Path, place: str) -> None:
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors} - _DTYPES.keys())
    if kinds:
        problem = f"{file} is quantised ({', '.join(kinds)}), and its weights have lost what merging needs"
        hint = (
            "Name the model in full precision that it was made from. If there is none: "
            f"`llama-quantize --allow-requantize {file} {file.stem}-BF16.gguf BF16` writes what is left of it."
        )
        raise InputError(place, problem, hint)
    split = reader.fields.get("split.count")
    if split is not None and int(split.parts[split.data[0]][0]) > 1:
        hint = f"`llama-gguf-split --merge {file} whole.gguf` puts them together."
        raise InputError(place, f"{file} is one of several files of a model", hint)
    if not reader.tensors:
        raise InputError(place, f"{file} holds no tensors")


def _convert(reader: Any, file: Path, folder: Path, place: str) -> None:
    from transformers import CONFIG_MAPPING, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        parsed = load_gguf_checkpoint(str(file))
        config = CONFIG_MAPPING[parsed["config"]["model_type"]].from_dict(parsed["config"])
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:  # an unusual file may raise anything inside transformers
        hint = "Name the folder of the model that it was made from."
        raise InputError(place, f"transformers does not read {file} ({first_line(error)})", hint) from None
    sizes = dict.fromkeys(_DTYPES, 0)
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    config.dtype = _DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]
    with whole_folder(folder) as making:
        config.save_pretrained(making)
        tokenizer.save_pretrained(making)
        _without_tokens_beyond(making, config.vocab_size)
        with TensorFile(making / WEIGHTS) as weights:
            for name, made in _tensors(reader, parsed, config, place):
                weights.add(name, made)


def _without_tokens_beyond(folder: Path, rows: int) -> None:
    """Remove tokens that the model has no rows for: transformers adds one for padding if a file names none."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    beyond = {token["content"] for token in content.get("added_tokens") or () if token["id"] >= rows}
    if not beyond:
        return
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    kept = {key: value for key, value in kept.items() if not (isinstance(value, str) and value in beyond)}
    settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")


def _tensors(reader: Any, parsed: dict[str, Any], config: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with transformers' names and the file's dtypes, the wide ones first so that all are aligned."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from evomerge.checkpoints.structure import empty_model

    architecture = reader.fields["general.architecture"]
    kind = bytes(architecture.parts[architecture.data[0]]).decode()
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(empty_model(config, place), processor)
    parsed["tensors"] = {}
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.tensor_type.name != "F32"):
        made = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),  # float32, which represents every 16-bit float exactly
            name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed,
        )  # fmt: skip
        if made.name in names:
            yield names[made.name], torch.from_numpy(made.weights.copy()).to(_DTYPES[tensor.tensor_type.name])
    for name, together in parsed["tensors"].items():  # experts, which come one matrix after another
        yield name, together.to(config.dtype)
