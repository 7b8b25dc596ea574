"""The cost of extracting an adapter, compared with mergekit-extract-lora in one run. Prints a table.

A bfloat16 model of 468 M parameters and one that differs from it in every weight, rank 32. Whole commands take turns on
two cores: process start, reading, the decomposition of 168 matrices, writing. Memory is without mapped files, because
the system can take back their pages at any time; the peak of resident memory includes them. On a machine with other
load, processor seconds are more reliable than those of the clock. Lost energy is that of the linear layers' changes,
for each adapter.

    python scripts/bench/extract.py --mergekit PYTHON [--layers 24] [--rank 32] [--rounds 3] [--json FILE]

PYTHON is the interpreter of an environment with mergekit, such as `scripts/parity/run` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from merging import make_models
from safetensors import safe_open

CORES = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
"""Waiting threads sleep, so that processor seconds measure work only."""

OURS, THEIRS = "evomerge extract", "mergekit-extract-lora"
_LOOKS_EVERY_S = 0.02  # seconds between looks at a process's memory

LARGEST = 4096 * 1024 * 4 / 1e9
"""GB of the largest matrix of the layers in float32, the dtype in which both decompose it."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Run:
    """What a process took: seconds of the clock and of processors, and its peak memory with and without files."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    own_gb: float


def run(command: list[str]) -> Run:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | CORES)
    most: dict[str, int] = {}
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        most = {key: max(now, most.get(key, 0)) for key, now in memory(process.pid).items()}
        time.sleep(_LOOKS_EVERY_S)
    _, status, used = ended
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    took = time.perf_counter() - begin
    # Not from wait4, where the peak of a process starts with the memory of its parent.
    return Run(took, used.ru_utime + used.ru_stime, most["VmHWM"] / 1e9, most["RssAnon"] / 1e9)


def memory(process: int) -> dict[str, int]:
    """The peak of a process's resident bytes, and its present bytes without files; 0 if it has ended."""
    found = dict.fromkeys(("VmHWM", "RssAnon"), 0)
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def lost(folder: Path, adapter: Path, layers: int) -> float:
    """The share of the energy of linear layers' changes that an adapter lacks, in a few layers of the model."""
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


def commands_for(folder: Path, mergekit: Path, rank: int) -> dict[str, list[str]]:
    """The two commands by name; each writes to a folder of that name."""
    model, base = str(folder / "one"), str(folder / "base")
    return {
        OURS: [
            sys.executable, "-m", "evomerge", "extract", model, str(folder / OURS), "--base", base,
            "--rank", str(rank), "--embeddings", "none",
        ],
        THEIRS: [
            str(mergekit.with_name(THEIRS)), "--model", model, "--base-model", base, "--out-path",
            str(folder / THEIRS), "--max-rank", str(rank), "-e", "lm_head", "-e", "embed_tokens",
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(2)
    runs: dict[str, list[Run]] = {OURS: [], THEIRS: []}
    share: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above)
        make_models(folder, given.layers)
        for _ in range(given.rounds):
            for name, command in commands_for(folder, given.mergekit.absolute(), given.rank).items():
                runs[name].append(took := run(command))
                share[name] = lost(folder, folder / name, given.layers)
                shutil.rmtree(folder / name)
                times = f"{took.seconds:7.1f} s {took.cpu_seconds:7.1f} s of processors"
                sizes = f"{took.own_gb:6.2f} GB, {took.peak_gb:6.2f} GB with files"
                print(f"{name:22} {times} {sizes}  {share[name]:.2%} lost", flush=True)
    ratios = {
        key: [getattr(theirs, key) / getattr(ours, key) for ours, theirs in zip(runs[OURS], runs[THEIRS], strict=True)]
        for key in ("seconds", "cpu_seconds")
    }
    by_clock, by_processor = (statistics.median(times) for times in ratios.values())
    print(f"{by_clock:.1f} times faster by the clock, {by_processor:.1f} times by seconds of processors")
    if given.json is not None:
        content = {
            "layers": given.layers, "rank": given.rank, "largest_matrix_gb": LARGEST, "times_faster": ratios,
            "commands": {
                name: {"lost_energy": share[name], "runs": [asdict(one) for one in of_name]}
                for name, of_name in runs.items()
            },
        }  # fmt: skip
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
