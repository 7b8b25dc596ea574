"""Compares commands of Evomerge with the corresponding ones of mergekit, on small random models. Fails if one differs.

    python scripts/parity/commands.py --python PYTHON    # an interpreter of an environment that has mergekit

What each row compares, and what differs on purpose, is in docs/from-mergekit.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from models import make_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SAME = 1e-5
"""Relative to a tensor's largest magnitude."""

PROMPT = torch.arange(3, 15).reshape(2, 6)


class Pair:
    """A folder in which mergekit's commands and ours run."""

    def __init__(self, folder: Path, mergekit: Path) -> None:
        self.folder, self._mergekit = folder, mergekit

    def theirs(self, command: str, *arguments: object) -> None:
        self._run([str(self._mergekit.with_name(command)), *map(str, arguments)])

    def ours(self, *arguments: object) -> None:
        self._run([sys.executable, "-m", "evomerge", *map(str, arguments)])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def path(self, model: str) -> str:
        """The path of a model, because mergekit looks for names on the hub."""
        return str(self.folder / model)

    def write(self, name: str, *documents: dict[str, Any]) -> str:
        (self.folder / name).write_text("---\n".join(yaml.safe_dump(document) for document in documents))
        return name

    def off(self, one: str, other: str, names: Callable[[str], bool] = lambda name: True) -> float:
        """The largest difference between the tensors of two folders, relative to each tensor's largest magnitude."""
        ours, theirs = (load_file(self.folder / name / "model.safetensors") for name in (one, other))
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        return max(
            float((ours[name].double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max())
            for name in ours
            if names(name) and ours[name].is_floating_point()
        )


def weighted(*models: str) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": {"weight": 1 - 0.3 * number}} for number, model in enumerate(models)]


def multi(pair: Pair) -> str:
    one, two, three = (pair.path(f"plain/{name}") for name in ("one", "two", "three"))
    first = {"name": "pair", "merge_method": "linear", "models": weighted(one, two), "dtype": "float32"}
    last = {
        "merge_method": "slerp", "base_model": "pair", "models": [{"model": "pair"}, {"model": three}],
        "parameters": {"t": 0.3}, "dtype": "float32",
    }  # fmt: skip
    file = pair.write("multi.yaml", first, last)
    pair.theirs("mergekit-multi", file, "-I", "stages", "--out-path", "theirs", "--no-write-model-card")
    pair.ours("merge", file, "ours")
    return within(pair.off("ours", "theirs"))


def raw(pair: Pair) -> str:
    for number, name in enumerate(("a", "b", "c")):
        random = torch.Generator().manual_seed(number)
        tensors = {f"block.{i}.weight": torch.randn(8, 8, generator=random) for i in range(3)}
        save_file(tensors, pair.folder / f"{name}.safetensors")
    worst = 0.0
    for number, config in enumerate(
        (
            {"merge_method": "linear", "models": weighted("a.safetensors", "b.safetensors")},
            {
                "merge_method": "task_arithmetic", "base_model": "c.safetensors", "dtype": "float32",
                "models": weighted("a.safetensors", "b.safetensors"),
            },
        )
    ):  # fmt: skip
        file = pair.write(f"raw {number}.yaml", {**config, "parameters": {"normalize": False}})
        pair.theirs("mergekit-pytorch", file, f"theirs {number}")
        pair.ours("merge", file, f"ours {number}")
        worst = max(worst, pair.off(f"ours {number}", f"theirs {number}"))
    return within(worst)


def extract_lora(pair: Pair) -> str:
    """Adapters loaded in peft: no further from the model than mergekit's at the same rank, and exact at full rank."""
    told = []
    for family in ("plain", "biased"):
        one, base = pair.path(f"{family}/one"), pair.path(f"{family}/base")
        off = {}
        for rank, most in (("4", 4), ("full", 67)):
            theirs, ours = f"theirs {family} {rank}", f"ours {family} {rank}"
            given = ("--model", one, "--base-model", base, "--out-path", theirs, "--max-rank", most)
            pair.theirs("mergekit-extract-lora", *given)
            pair.ours("extract", one, ours, "--base", base, "--rank", rank)
            off[rank] = [distance(pair.folder / name, Path(base), Path(one)) for name in (ours, theirs)]
        figures = "; ".join(
            f"{mine:.2g} (mergekit's {other:.2g}) at rank {rank}" for rank, (mine, other) in off.items()
        )
        if off["full"][0] > SAME or off["4"][0] > 1.01 * off["4"][1]:
            raise AssertionError(f"{family}: logits in peft are off by {figures}")
        told.append(f"{family}: logits in peft are off by {figures}")
    return ". ".join(told)


def distance(adapter: Path, base: Path, model: Path) -> float:
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(PROMPT).logits
        return float((adapted.eval()(PROMPT).logits - theirs).norm() / theirs.norm())


def tokensurgeon(pair: Pair) -> str:
    """A model moved to another vocabulary: rows of tokens that both have."""
    model, donor = pair.path("vocabulary/base"), pair.path("vocabulary/other")
    pair.theirs("mergekit-tokensurgeon", model, donor, "theirs", "-k", 4)
    pair.ours("transplant", model, donor, "ours", "-k", 4)
    known, wanted = (AutoTokenizer.from_pretrained(pair.folder / name).get_vocab() for name in (model, donor))
    shared = [number for token, number in wanted.items() if token in known]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one, other = (load_file(pair.folder / out / "model.safetensors")[name] for out in ("ours", "theirs"))
        if not torch.equal(one[shared], other[shared]):
            raise AssertionError(f"shared rows of {name} differ")
    return (
        f"{len(shared)} shared rows are equal to the bit; {len(wanted) - len(shared)} are made by each its own pursuit"
    )


def within(off: float) -> str:
    if off > SAME:
        raise AssertionError(f"tensors are off by {off:.2g} of their largest number")
    return f"tensors are off by at most {off:.0e} of their largest number"


ROWS = {"multi": multi, "pytorch": raw, "extract-lora": extract_lora, "tokensurgeon": tokensurgeon}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--only")
    given = parser.parse_args()
    failed = 0
    for name, row in ROWS.items():
        if given.only and given.only not in name:
            continue
        with tempfile.TemporaryDirectory() as above:
            make_models(Path(above))
            try:
                print(f"mergekit-{name:14} {row(Pair(Path(above), given.python.absolute()))}", flush=True)
            except Exception as error:
                failed += 1
                print(f"mergekit-{name:14} FAILED: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
