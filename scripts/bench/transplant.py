"""The cost and the quality of `evomerge transplant` at the size of a real model. Prints a table.

The model is reduced to its first tokens, as if it had been trained with a smaller vocabulary, and then gets the whole
vocabulary again with each method, with itself as the donor. So there is a true row for every new one, and the donor's
rows are in the same space as the model's, which is the best case for matching pursuit.

    python scripts/bench/transplant.py --model FOLDER [--tokens 32000] [--methods mean,subword,omp:4,omp:16,omp:64]

FOLDER is a model with a byte-level BPE tokenizer, such as `scripts/real/prepare` fetches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from extract import run
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.source import open_source
from evomerge.commands.transplant import SHIPPED, bits_per_byte

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def cut(model: Path, out: Path, tokens: int) -> None:
    """Write a model with only its first tokens."""
    out.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    known = tokenizer["model"]
    kept = known["vocab"] = {token: number for token, number in known["vocab"].items() if number < tokens}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in known["merges"]]
    known["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"vocab_size": tokens}))
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: tensors[name][:tokens].clone() for name in ROWS if name in tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def bits(folder: Path) -> float:
    """The bits per byte of a model on the shipped text."""
    return bits_per_byte(open_source("model", str(folder), place=str(folder)), SHIPPED.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32000)
    parser.add_argument("--methods", default="mean,subword,omp:4,omp:16,omp:64")
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as above:
        small = Path(above) / "small"
        cut(given.model, small, given.tokens)
        print(
            f"whole {bits(given.model):.3f}, cut to {given.tokens:,} tokens {bits(small):.3f} bits per byte", flush=True
        )
        for label in given.methods.split(","):
            method, _, atoms = label.partition(":")
            out = Path(above) / "out"
            command = ["transplant", str(small), str(given.model), str(out), "--method", method]
            took = run([sys.executable, "-m", "evomerge", *command, *(["-k", atoms] if atoms else [])])
            cost = f"{took.seconds:6.1f} s, {took.cpu_seconds:6.1f} s of processors, {took.own_gb:.2f} GB"
            print(f"{label:8} {bits(out):.3f} bits per byte, {cost}", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
