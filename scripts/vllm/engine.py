"""The engine `vllm` compared with transformers, on the miniatures. Run by scripts/test-vllm, where both are installed.

python scripts/vllm/engine.py answers          # the same greedy text, with and without stop texts
python scripts/vllm/engine.py paths            # paths of several lengths in one engine: the same greedy text
python scripts/vllm/engine.py divided          # two processes share an engine's model: the same greedy text
python scripts/vllm/engine.py stale            # no candidate gets answers of another, and the check is able to fail
python scripts/vllm/engine.py search FOLDER    # a whole search gives every item the score that it has in transformers
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.stack import Step
from evomerge.inference.transformers_engine import generate
from evomerge.inference.vllm_engine import VllmEngine, import_vllm
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.settings.folder import open_store

ROOT = Path(__file__).parents[2]
MINIATURES = ROOT / "examples" / "miniatures"
NAMES = ("base", "maths", "japanese")
TOKENS = 32
BATCH = 16
PROMPTS = 48
STOPS: tuple[tuple[str, ...], ...] = ((), ("\n\n", "答え", "the answer"))
EXAMPLES = 3  # earlier prompts before each one of the stale-cache test, so that they fill blocks of the cache
BLOCK = 32  # tokens; on a CPU the default is 128, which the prompts of the miniatures do not fill
CANDIDATES = 12
ITEMS = 40


def prompts() -> list[str]:
    lines = (ROOT / "evaluators/tasks/data/mini_math_ja.search.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:PROMPTS]]


def open_miniatures() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / name), place=name) for name in NAMES}


def build(source: Source) -> LiveModel:
    """Build a model in float32, in which rounding does not decide between tokens."""
    return live_model(source, torch.device("cpu"), torch.float32)


def by_transformers(live: LiveModel, asked: Sequence[str], stop: Sequence[str] = ()) -> list[str]:
    return generate(live, asked, TOKENS, stop, BATCH)


def by_vllm(live: LiveModel, engine: VllmEngine, asked: Sequence[str], stop: Sequence[str] = ()) -> list[str]:
    return generate(live, asked, TOKENS, stop, BATCH, engine)


def differing(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def answers() -> list[str]:
    """Every miniature in one engine, one after the other."""
    sources, asked, faults = open_miniatures(), prompts(), []
    live = build(sources["maths"])
    engine = VllmEngine(sources["maths"], live)
    cut = 0
    for name, source in sources.items():
        load_weights(live, ((tensor, source.read(tensor)) for tensor in live.tensors))
        started = time.perf_counter()
        engine.load(live)
        loaded, whole = time.perf_counter(), by_transformers(live, asked)
        for stop in STOPS:
            begun = time.perf_counter()
            expected = by_transformers(live, asked, stop)
            middle = time.perf_counter()
            actual = by_vllm(live, engine, asked, stop)
            ended = time.perf_counter()
            cut += differing(expected, whole)
            apart = differing(expected, actual)
            print(
                f"{name:10} {len(asked) - apart} of {len(asked)} answers are the same, stop texts {list(stop)}; "
                f"swap {loaded - started:.3f} s, transformers {middle - begun:.3f} s, vLLM {ended - middle:.3f} s"
            )
            if apart:
                faults.append(f"{name}: {apart} answers differ with stop texts {list(stop)}")
    if not cut:
        faults.append("no stop text ended an answer, so that nothing was tested of them")
    return faults


def paths() -> list[str]:
    """Paths shorter than the engine's model, as long, with repeated and scaled layers, one after the other."""
    sources, asked, faults = open_miniatures(), prompts(), []
    source, hops = sources["maths"], 9
    live = build(source)
    load_weights(live, ((tensor, source.read(tensor)) for tensor in live.tensors))
    started = time.perf_counter()
    engine = VllmEngine(source, live, hops)
    print(f"an engine of {hops} layers starts in {time.perf_counter() - started:.1f} s")
    assert live.stack is not None
    whole = by_transformers(live, asked)
    for name, path in {
        "plain": [Step(n, n) for n in range(6)],
        "skips": [Step(n, n) for n in (0, 1, 2, 4, 5)],
        "repeats": [Step(n, n) for n in (0, 1, 2, 2, 3, 3, 4, 4, 5)],
        "scaled": [Step(n, n, factor) for n, factor in enumerate((0.9, 1.1, 1.0, 0.8, 1.05, 1.0))],
        "plain again": [Step(n, n) for n in range(6)],
    }.items():
        live.stack.lay(path)
        begun = time.perf_counter()
        engine.load(live)
        loaded, expected = time.perf_counter(), by_transformers(live, asked)
        middle = time.perf_counter()
        actual = by_vllm(live, engine, asked)
        ended = time.perf_counter()
        apart, changed = differing(expected, actual), differing(expected, whole)
        print(
            f"{name:12} {len(path)} hops: {len(asked) - apart} of {len(asked)} answers are the same, {changed} are not "
            f"those of the plain model; swap {loaded - begun:.3f} s, transformers {middle - loaded:.3f} s, vLLM "
            f"{ended - middle:.3f} s"
        )
        if apart:
            faults.append(f"{name}: {apart} answers differ")
        if bool(changed) is name.startswith("plain"):
            faults.append(f"{name}: {changed} answers are other than those of the plain model")
    return faults


def divided() -> list[str]:
    """Tensor parallelism over two processes: every miniature, a scaled path and the first again, in one engine."""
    sources, asked, faults = open_miniatures(), prompts(), []
    cpu, plain = torch.device("cpu"), [Step(n, n) for n in range(6)]
    live = live_model(sources["maths"], (cpu, cpu), torch.float32)
    assert live.stack is not None
    started = time.perf_counter()
    engine = VllmEngine(sources["maths"], live, 7)
    print(f"an engine in two processes starts in {time.perf_counter() - started:.1f} s")
    scaled = [Step(n, n, factor) for n, factor in ((0, 0.9), (1, 1.0), (3, 1.1), (4, 1.0), (5, 0.95))]
    answers_of: dict[str, list[str]] = {}
    for name, source, path in (*((n, n, plain) for n in sources), ("path", "maths", scaled), ("base", "base", plain)):
        live.stack.lay(plain)
        load_weights(live, ((tensor, sources[source].read(tensor)) for tensor in live.tensors))
        live.stack.lay(path)
        begun = time.perf_counter()
        engine.load(live)
        loaded, expected = time.perf_counter(), by_transformers(live, asked)
        actual = by_vllm(live, engine, asked)
        apart = differing(expected, actual)
        print(f"{name:10} {len(asked) - apart} of {len(asked)} answers are the same; swap {loaded - begun:.3f} s")
        if apart:
            faults.append(f"{name}: {apart} answers differ")
        if differing(answers_of.setdefault(name, actual), actual):
            faults.append(f"{name}: its answers differ after another model was there")
    for one, other in (("maths", "base"), ("maths", "path")):
        if not differing(answers_of[one], answers_of[other]):
            faults.append(f"{one} and {other} give the same answers, so that nothing was tested")
    return faults


def recipe(maths: float, japanese: float) -> StackRecipe:
    weights = {"maths": maths, "japanese": japanese}
    blend = Blend(
        method="task_arithmetic", sources=("maths", "japanese"), base="base", parameters={"weight": weights}
    )  # fmt: skip
    return StackRecipe.compose(
        sources=dict.fromkeys(NAMES, ""), tokenizer="maths", dtype="float32", embedding=blend, norm=blend, head=blend,
        hops=[(layer, blend, blend, blend) for layer in range(6)],
    )  # fmt: skip


def stale() -> list[str]:
    """Score two candidates, then the first again; and repeat that with a cache that is not emptied."""
    vllm = import_vllm()
    vllm.LLM = partial(vllm.LLM, block_size=BLOCK)
    sources, faults, single = open_miniatures(), [], prompts()
    asked = ["".join(single[number : number + EXAMPLES + 1]) for number in range(PROMPTS - EXAMPLES)]
    one, other = recipe(1.0, 0.2), recipe(0.3, 1.0)
    live, materialiser = build(sources["maths"]), Materialiser(sources)
    engine = VllmEngine(sources["maths"], live)

    def score(candidate: StackRecipe, engine: VllmEngine) -> tuple[list[str], list[str]]:
        materialiser.write(candidate, live)
        engine.load(live)
        return by_transformers(live, asked), by_vllm(live, engine, asked)

    rounds = [score(candidate, engine) for candidate in (one, other, one)]
    emptied, engine._llm.reset_prefix_cache = engine._llm.reset_prefix_cache, lambda: True
    score(one, engine)
    wrong = differing(score(other, engine)[1], rounds[1][1])
    engine._llm.reset_prefix_cache = emptied
    # Last, and while the other one exists: closing an engine also closes what all engines of a process share.
    alone = VllmEngine(sources["maths"], live)
    fresh = score(other, alone)
    print(f"two candidates differ in {differing(rounds[0][0], rounds[1][0])} of {len(asked)} answers")
    for name, first, second in (
        ("vLLM: the first candidate, scored again", rounds[0][1], rounds[2][1]),
        ("vLLM: the second candidate in an engine of its own", rounds[1][1], fresh[1]),
        ("transformers: the first candidate, scored again", rounds[0][0], rounds[2][0]),
        ("vLLM and transformers: the first candidate", *rounds[0]),
        ("vLLM and transformers: the second candidate", *rounds[1]),
    ):
        print(f"{name}: {differing(first, second)} of {len(asked)} answers differ")
        if differing(first, second):
            faults.append(f"{name}: {differing(first, second)} answers differ")
    if not differing(rounds[0][0], rounds[1][0]):
        faults.append("the two candidates give the same answers, so that nothing was tested")
    print(f"with the cache left as it is, {wrong} of {len(asked)} answers of the second candidate are wrong")
    if not wrong:
        faults.append("a cache that is not emptied changes no answer, so that this check cannot fail")
    return faults


def search_file(engine: str) -> dict[str, Any]:
    return {
        "name": engine,
        "sources": {name: str(MINIATURES / name) for name in NAMES},
        "base": "base",
        "space": {"method": "task_arithmetic"},
        "dtype": "float32",
        "engine": engine,
        "objectives": {
            "maths": {
                "task": "mini_math_ja", "metric": "acc_ja",
                "search": f"validation[:{ITEMS}]", "held_out": f"test[:{ITEMS}]",
            },
        },
        "optimizer": {"name": "cma", "population": 4},
        "budget": {"candidates": CANDIDATES},
        "confirm": {"top": 2},
    }  # fmt: skip


Scores = dict[str, dict[str, list[float]]]


def searched(folder: Path, engine: str) -> Scores:
    """Run a search on the command line, and return the scores of every item by recipe and split."""
    file, out = folder / f"{engine}.yaml", folder / engine
    file.write_text(yaml.safe_dump(search_file(engine)))
    subprocess.run([sys.executable, "-m", "evomerge", "search", str(file), "--dir", str(out)], check=True)
    scores: Scores = {"search": {}, "held_out": {}}
    with open_store(out) as store:
        for row in store.candidates():
            for split, kept in scores.items():
                for score in store.scores(row.number, split):
                    kept[row.recipe_hash] = [float(value) for value in score.metrics["acc_ja"]]
    return scores


def search(folder: Path) -> list[str]:
    expected, actual = searched(folder, "transformers"), searched(folder, "vllm")
    faults = []
    for split, kept in expected.items():
        shared = kept.keys() & actual[split].keys()
        apart = sum(a != b for key in shared for a, b in zip(kept[key], actual[split][key], strict=True))
        print(f"{split}: {apart} of {sum(len(kept[key]) for key in shared)} scores differ, {len(shared)} recipes")
        if apart or kept.keys() != actual[split].keys():
            lonely = len(kept.keys() ^ actual[split].keys())
            faults.append(f"{split}: {apart} scores differ; {lonely} recipes are in one search alone")
        if not shared:
            faults.append(f"{split}: nothing was scored")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "paths", "divided", "stale", "search"))
    parser.add_argument("folder", type=Path, nargs="?", help="for what a search writes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    checks = {
        "answers": answers, "paths": paths, "divided": divided, "stale": stale,
        "search": partial(search, given.folder),
    }  # fmt: skip
    faults = checks[given.what]()
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
