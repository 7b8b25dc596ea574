"""The time of a candidate's merge, compared with copying its bytes and with mergekit. Prints a table and JSON.

Three synthetic bfloat16 models of 468 M parameters (a base and two fine-tunes of it) are in memory. Each method writes
the live model several times, each time with different numbers; the median counts. The roofline is a plain copy of the
same tensors in the same run: bytes read and written per time. A merge of n tensors into one moves n + 1 of them.

mergekit runs in its own environment on the same tensors, through its Python API, once with defaults and once with glibc
set to keep freed memory (MALLOC_*), because much of its time is spent on new pages.

With --adapters the fine-tunes are LoRA adapters of the base (rank 16, on all matrices of the layers) that are folded in
each time; such a merge only moves the base and its result.

With --matrix the methods and steps that work on whole matrices are timed: candidates after the first, with different
numbers each time. They take turns with one matrix product for each weight (of its short side with itself, the least
that gives a full-rank change), and are compared with the algorithm of the papers' code for every candidate, in plain
float32, on one layer. The first candidate computes what all others use.

    python scripts/bench/merging.py [--mergekit PYTHON | --adapters | --matrix] [--end-to-end] [--layers 24]
    [--methods ties,linear] [--json FILE]

PYTHON is the interpreter of an environment with mergekit, such as `scripts/parity/run` makes. ``--end-to-end`` compares
whole commands, `evomerge merge` and `mergekit-yaml`, with process start, reading and writing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plain
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured.evidence import Evidence
from evomerge.method import default_parameters, find_method
from evomerge.plugins import OWN
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.step import find_step
from evomerge.yaml import dump_yaml

ROOT = Path(__file__).parents[2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NAMES = ("base", "one", "two")
REPEATS = 5
RANK = 16
SPAN_GOAL = 0.9

# Method: (parameters besides weights, required share of copy bandwidth). mergekit gets the same numbers.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "linear": ({}, SPAN_GOAL),
    "slerp": ({}, SPAN_GOAL),
    "nuslerp": ({}, SPAN_GOAL),
    "task_arithmetic": ({}, SPAN_GOAL),
    "model_stock": ({}, SPAN_GOAL),
    "karcher": ({}, SPAN_GOAL),
    "ties": ({"density": 0.5, "normalize": False}, 0.5),
    "ties, normalised": ({"density": 0.5, "normalize": True}, 0.5),
    "dare_linear": ({"density": 0.5}, 0.5),
    "dare_ties": ({"density": 0.5}, 0.5),
    "breadcrumbs": ({"density": 0.5}, 0.5),
    "della": ({"density": 0.5, "normalize": False}, 0.5),
    "sce": ({"select_topk": 0.5}, 0.0),
    "yoyo": ({}, SPAN_GOAL),
    "magmax": ({}, 0.5),
    "consensus": ({}, 0.5),
    "localize_and_stitch": ({}, 0.5),
    "cabs": ({}, 0.0),
    "resmerge": ({}, 0.0),
    "pcb": ({}, 0.0),
}

# For whole matrices. Method, or step after task arithmetic: values of its parameters besides weights.
MATRIX: dict[str, dict[str, Any]] = {
    "tsv": {}, "gram": {}, "actmat": {}, "wudi": {}, "swudi": {}, "ace": {},
    "iso": {"strength": 0.7}, "iso_cts": {}, "subspace_boosting": {}, "svc": {},
}  # fmt: skip

MERGEKIT = """
import json, sys, time, torch
from safetensors.torch import load_file
from mergekit.merge_methods.api import merge_state_dicts
folder, cases = sys.argv[1], json.loads(sys.argv[2])
models = {name: load_file(f"{folder}/{name}/model.safetensors") for name in ("base", "one", "two")}
for label, method, inputs, base, parameters, repeats in cases:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        merge_state_dicts([models[name] for name in inputs], method, parameters=parameters, base=base)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > 10:
            break
    print(json.dumps([label, sorted(seconds)[len(seconds) // 2]]), flush=True)
"""
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def make_models(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=32000
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for name in NAMES:
        (folder / name).mkdir()
        config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
        config.save_pretrained(folder / name)
        for file in TOKENIZER:
            shutil.copy(ROOT / "examples/miniatures/base" / file, folder / name)
        tensors = {}
        for number, (tensor, shape) in enumerate(shapes.items()):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
            seed = 1000 * NAMES.index(name) + number
            delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.002
            tensors[tensor] = (base + delta if name != "base" else base).bfloat16()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def make_adapters(folder: Path) -> dict[str, str]:
    """Write two adapters of the base, and return references to the base and to these."""
    base = open_source("base", str(folder / "base"), place="base")
    matrices = {name: base.tensors[name].shape for name, role in base.roles.items() if role.layer is not None}
    for seed, name in enumerate(NAMES[1:]):
        adapter = folder / f"{name}-adapter"
        adapter.mkdir()
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        random, factors = torch.Generator().manual_seed(seed), {}
        for matrix, shape in matrices.items():
            if len(shape) == 2:
                key = f"base_model.model.{matrix.removesuffix('.weight')}.lora_"
                factors[f"{key}A.weight"] = torch.randn(RANK, shape[1], generator=random) * 0.01
                factors[f"{key}B.weight"] = torch.randn(shape[0], RANK, generator=random) * 0.01
        save_file(factors, adapter / "adapter_model.safetensors")
    base_folder = str(folder / "base")
    return {"base": base_folder} | {name: f"{base_folder}+{folder / name}-adapter" for name in NAMES[1:]}


def blend(label: str, number: int) -> Blend:
    """The blend of a case; a different one for each ``number``."""
    parameters, _ = CASES[label]
    method = find_method(label.split(",")[0], "--methods")
    names = NAMES[1:]
    values: dict[str, Any] = default_parameters(method, names)
    for p in method.parameters:
        value = float(parameters.get(p.name, p.default)) - 1e-4 * number * (p.high > p.low and p.kind == "real")
        values[p.name] = dict.fromkeys(names, value) if p.scope == "source" else value
    values |= {name: value for name, value in parameters.items() if name in method.switches}
    return Blend(method=method.name, sources=names, base="base" if method.needs_base else None, parameters=values)


def timed(run: Callable[[int], None], number: int) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    begin, of_processor = time.perf_counter(), time.process_time()
    run(number)
    return time.perf_counter() - begin, time.process_time() - of_processor


def beside(copy: Callable[[int], None], merge: Callable[[int], None]) -> tuple[float, float, float, float]:
    """Medians of a copy's seconds, a merge's seconds and processor seconds, and the ratio of a copy to a merge.

    Both run in turns and are compared in pairs. The speed of a shared machine changes, and a copy in a slow moment,
    compared with a merge in a fast one, would mean that the merge exceeds the bandwidth of the memory.
    """
    pairs = [(timed(copy, number), timed(merge, number)) for number in range(REPEATS + 1)][1:]  # the first warms up
    return (
        statistics.median(copied for (copied, _), _ in pairs),
        statistics.median(merged for _, (merged, _) in pairs),
        statistics.median(of_processor for _, (_, of_processor) in pairs),
        statistics.median(copied / merged for (copied, _), (merged, _) in pairs),
    )


def ours(references: dict[str, str], labels: list[str]) -> tuple[float, int, list[dict[str, Any]]]:
    """The copy bandwidth in bytes per second, the bytes of a model, and a row for each case."""
    sources = {name: open_source(name, reference, place=name) for name, reference in references.items()}
    layers = sources["base"].layers
    live = live_model(sources["base"], torch.device("cpu"))
    size = sum(tensor.nbytes for tensor in live.tensors.values())
    materialiser = Materialiser(sources)
    kept = {name: materialiser.read(("base", name)) for name in live.tensors}

    def copy(number: int) -> None:
        for name, tensor in live.tensors.items():
            tensor.copy_(kept[name])

    rows, bandwidths = [], []
    for label in labels:

        def merge(number: int, label: str = label) -> None:
            recipe = StackRecipe.uniform(blend(label, number), sources=references, tokenizer="base", layers=layers)
            materialiser.write(recipe, live)

        start = time.perf_counter()
        merge(-1)
        first = time.perf_counter() - start
        copy_seconds, seconds, on_processor, ratio = beside(copy, merge)
        bandwidths.append(2 * size / copy_seconds)
        read = sum(not source.changes for source in sources.values())
        moved = size * (read + (1 if blend(label, 0).base or read == 1 else 0))
        fraction, peak = ratio * moved / (2 * size), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            {"name": label, "seconds": seconds, "fraction_of_copy": fraction, "first_seconds": first,
             "cpu_seconds": on_processor, "peak_bytes": peak}
        )  # fmt: skip
        print(
            f"  {label:18} {seconds:7.3f} s  {fraction:5.0%} of copy  (first {first:.2f} s; "
            f"{on_processor:.3f} s of the processor; peak {peak / 1e9:.2f} GB)", flush=True
        )  # fmt: skip
    return statistics.median(bandwidths), size, rows


def matrix_blend(label: str, number: int) -> Blend:
    """The blend of a method or step of whole matrices, with different numbers for each ``number``."""
    is_step = label in OWN["evomerge.merge_steps"]
    method, names = find_method("task_arithmetic" if is_step else label, "--methods"), NAMES[1:]
    values: dict[str, Any] = default_parameters(method, names)
    for p in method.parameters:
        if p.kind == "real" and (p.searched or p.name == "lambda"):
            value = float(p.default) - 1e-3 * number
            values[p.name] = dict.fromkeys(names, value) if p.scope == "source" else value
    steps = ()
    if is_step:
        given = {**find_step(label, "--methods").values({}), **MATRIX[label]}
        steps = (BlendStep(name=label, parameters={k: float(v) - 1e-3 * number for k, v in given.items()}),)
    return Blend(method=method.name, sources=names, base="base", parameters=values, steps=steps)


def matrices(references: dict[str, str], labels: list[str]) -> list[dict[str, Any]]:
    """A row for each method or step on whole matrices."""
    sources = {name: open_source(name, reference, place=name) for name, reference in references.items()}
    layers = sources["base"].layers
    live = live_model(sources["base"], torch.device("cpu"))
    kept = [live.tensors[name].float() for name, role in sources["base"].roles.items() if role.layer is not None]
    kept = [tensor for tensor in kept if tensor.ndim == 2]

    def products(number: int) -> None:
        for tensor in kept:
            wide = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T
            torch.mm(wide[:, : len(wide)], wide)

    rows = []
    for label in labels:
        with tempfile.TemporaryDirectory() as temporary:
            evidence = Evidence(Path(temporary), {name: name for name in references})
            materialiser = Materialiser(sources, evidence=evidence)

            def merge(number: int, label: str = label, materialiser: Materialiser = materialiser) -> None:
                recipe = StackRecipe.uniform(
                    matrix_blend(label, number + 1), sources=references, tokenizer="base", layers=layers
                )
                materialiser.write(recipe, live)

            first, _ = timed(merge, -1)
            of_products, seconds, on_processor, ratio = beside(products, merge)
            stored = sum(file.stat().st_size for file in Path(temporary).iterdir())
        naive = layers * naive_seconds(sources, label)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            {"name": label, "seconds": seconds, "first_seconds": first, "products_seconds": of_products,
             "vs_products": 1 / ratio, "naive_seconds": naive, "vs_naive": naive / seconds,
             "cpu_seconds": on_processor, "evidence_bytes": stored, "peak_bytes": peak}
        )  # fmt: skip
        print(
            f"  {label:18} {seconds:7.2f} s (first {first:.1f} s), {1 / ratio:.2f} x {of_products:.2f} s of products; "
            f"naive {naive:.0f} s, {naive / seconds:.1f} times; {stored / 1e9:.2f} GB kept; peak {peak / 1e9:.2f} GB",
            flush=True,
        )
    return rows


def naive_seconds(sources: Mapping[str, Source], label: str) -> float:
    """Seconds of one layer of a candidate if nothing is shared between candidates."""
    names = [name for name, role in sources["base"].roles.items() if role.layer == 0]
    started = time.perf_counter()
    for name in names:
        base, *others = (sources[source].read(name).float() for source in NAMES)
        changes = torch.stack([other - base for other in others])
        (base + (plain.merged(label, changes) if base.ndim == 2 else changes.mean(dim=0))).bfloat16()
    return time.perf_counter() - started


def theirs(folder: Path, labels: list[str], python: str, environment: dict[str, str]) -> dict[str, float]:
    cases = []
    for label in labels:
        mix = blend(label, 0)
        if find_method(mix.method, "--methods").mergekit is None:
            continue
        base = "base" if mix.base or mix.method == "slerp" else None
        inputs = ["one", "two"] if mix.base is None else ["base", "one", "two"]
        parameters = {
            name: list(value.values()) if isinstance(value, dict) else value
            for name, value in mix.parameters.items()
            if name not in ("flatten", "row_wise", "gamma", "lambda") and mix.method != "karcher"
        }
        cases.append([label, mix.method, inputs, 0 if base else None, parameters, 3])
    command = [python, "-c", MERGEKIT, str(folder), json.dumps(cases)]
    ran = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=3600
    )
    seconds = dict(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("["))
    if ran.returncode:
        print(ran.stderr[-1500:], file=sys.stderr)
    return seconds


def end_to_end(folder: Path, labels: list[str], python: str | None) -> list[dict[str, Any]]:
    """Seconds of whole commands."""
    rows = []
    commands = {"evomerge": [sys.executable, "-m", "evomerge", "merge"]}
    if python is not None:
        commands["mergekit"] = [str(Path(python).with_name("mergekit-yaml"))]
    for label in labels:
        mix = blend(label, 0)
        models = [{"model": str(folder / name), "parameters": {
            p: value[name] for p, value in mix.parameters.items() if isinstance(value, dict) and p not in ("gamma",)
        }} for name in mix.sources]  # fmt: skip
        if mix.method == "karcher":
            models = [{"model": model["model"]} for model in models]
        config: dict[str, Any] = {"merge_method": mix.method, "models": models, "dtype": "bfloat16"}
        if mix.base or mix.method == "slerp":
            config["base_model"] = str(folder / ("base" if mix.base else mix.sources[0]))
        config["parameters"] = {
            p: value
            for p, value in mix.parameters.items()
            if not isinstance(value, dict) and p not in ("flatten", "row_wise", "lambda", "filter_wise", "rescale")
        }
        file = folder / "merge.yaml"
        file.write_text(dump_yaml({key: value for key, value in config.items() if value != {}}))
        row: dict[str, Any] = {"name": label}
        for name, command in commands.items():
            seconds = []
            for number in range(3 if name == "evomerge" else 1):
                out = folder / f"out-{name}-{number}"
                more = ["--no-copy-tokenizer"] if name == "mergekit" else []
                whole = [*command, str(file), str(out), *more]
                start = time.perf_counter()
                ran = subprocess.run(whole, capture_output=True, text=True, check=False)
                seconds.append(time.perf_counter() - start)
                if ran.returncode:
                    print(label, name, ran.stdout[-500:], ran.stderr[-1500:], file=sys.stderr)
                shutil.rmtree(out, ignore_errors=True)
            row[name] = statistics.median(seconds)
        if python is not None:
            row["times_faster"] = row["mergekit"] / row["evomerge"]
        rows.append(row)
        print("  " + "  ".join(f"{key} {value:.2f}" if key != "name" else f"{value:18}" for key, value in row.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--adapters", action="store_true")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--methods", help="those of the table unless given")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.adapters and (given.mergekit or given.end_to_end):
        parser.error("--adapters stands alone: mergekit folds adapters to disk, once")
    table = MATRIX if given.matrix else CASES
    wanted = given.methods.split(",") if given.methods else list(table)
    labels = [label for label in table if label in wanted or label.split(",")[0] in wanted]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, given.layers)
        if given.end_to_end:
            results: dict[str, Any] = {"end_to_end": end_to_end(folder, labels, given.mergekit)}
        else:
            references = {name: str(folder / name) for name in NAMES}
            if given.matrix:
                finish({"rows": matrices(references, labels)}, given.json)
                return
            bandwidth, size, rows = ours(make_adapters(folder) if given.adapters else references, labels)
            results = {"copy_bandwidth_gbps": bandwidth / 1e9, "model_gb": size / 1e9, "rows": rows}
            if given.mergekit:
                plain = theirs(folder, labels, given.mergekit, {})
                # If most of the time is spent on sorting, new pages do not matter.
                spans = [label for label in labels if CASES[label][1] == SPAN_GOAL]
                kept = theirs(folder, spans, given.mergekit, KEPT)
                for row in rows:
                    row["vs_mergekit"] = plain[row["name"]] / row["seconds"] if row["name"] in plain else None
                    row["vs_mergekit_malloc"] = kept[row["name"]] / row["seconds"] if row["name"] in kept else None
            print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
            for row in rows:
                print(line_of(row))
    finish(results, given.json)


def finish(results: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(results, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    else:
        print(text)


def line_of(row: dict[str, Any]) -> str:
    goal = CASES[row["name"]][1]
    against = [f"{row[key]:7.1f}x" if row.get(key) else "      -" for key in ("vs_mergekit", "vs_mergekit_malloc")]
    return (
        f"{row['name']:18} {row['seconds']:7.3f} s  {row['fraction_of_copy']:5.0%} of copy (goal {goal:.0%})"
        f"  mergekit {against[0]}, with MALLOC_ {against[1]}"
    )


if __name__ == "__main__":
    main()
