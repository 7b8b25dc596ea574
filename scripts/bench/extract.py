"""What extracting an adapter costs next to mergekit-extract-lora, in one run. Prints a table.

A bfloat16 model of 468 M parameters and one that differs from it in every weight, rank 32, whole commands: process
start, reading, the decomposition of 168 matrices, writing. Energy lost is of the linear layers, each adapter's own.

    python scripts/bench/extract.py --mergekit PYTHON [--layers 24] [--rank 32] [--json FILE]

PYTHON is the interpreter of an environment with mergekit, such as `scripts/parity/run` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from merging import make_models
from safetensors import safe_open

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most memory in GB of all processes that were waited for so far."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "2"})
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def lost(folder: Path, adapter: Path, layers: int) -> float:
    """The share of the change of all linear layers that an adapter does not hold, in a few layers of the model."""
    total = rest = 0.0
    with (
        safe_open(folder / "base" / "model.safetensors", "pt") as base,
        safe_open(folder / "one" / "model.safetensors", "pt") as model,
        safe_open(adapter / "adapter_model.safetensors", "pt") as factors,
    ):
        for layer in range(0, layers, 6):
            for linear in LINEAR:
                block = "mlp" if linear in LINEAR[4:] else "self_attn"
                name = f"model.layers.{layer}.{block}.{linear}"
                change = model.get_tensor(f"{name}.weight").float() - base.get_tensor(f"{name}.weight").float()
                down, up = (factors.get_tensor(f"base_model.model.{name}.lora_{half}.weight").float() for half in "AB")
                total += float(change.square().sum())
                rest += float((change - up @ down).square().sum())
    return rest / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above)
        make_models(folder, given.layers)
        model, base = str(folder / "one"), str(folder / "base")
        commands = {
            "evomerge extract": [
                sys.executable, "-m", "evomerge", "extract", model, str(folder / "ours"), "--base", base,
                "--rank", str(given.rank), "--embeddings", "none",
            ],
            "mergekit-extract-lora": [
                str(Path(given.mergekit).with_name("mergekit-extract-lora")), "--model", model, "--base-model", base,
                "--out-path", str(folder / "theirs"), "--max-rank", str(given.rank),
                "-e", "lm_head", "-e", "embed_tokens",
            ],
        }  # fmt: skip
        for (name, command), out in zip(commands.items(), ("ours", "theirs"), strict=True):
            seconds, peak = run(command)
            rows.append(
                {"command": name, "seconds": seconds, "peak_gb": peak, "lost": lost(folder, folder / out, given.layers)}
            )
            print(f"{name:22} {seconds:7.1f} s {peak:6.2f} GB  {rows[-1]['lost']:.2%} lost", flush=True)
    print(f"{rows[1]['seconds'] / rows[0]['seconds']:.1f} times faster")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
