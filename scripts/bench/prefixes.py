"""How much work candidates of one generation share at the start of their paths, which a trie over hops would save.

Two candidates whose first k hops are the same layers with the same scales compute the same hidden states up to there.
For tasks without decoding, a generation could be scored as a trie, with each shared prefix computed once. This counts
for each encoding the share of hops that this would save: in the first generation, and in the last generation of a
search whose optimum is A without its middle layers, when candidates are more similar. No model is needed.

    python scripts/bench/prefixes.py [--layers 32] [--generations 40]
"""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import TypeAdapter

from evomerge.method import find_method
from evomerge.optimizers import Observation, OptimizerSettings
from evomerge.recipes.stack import StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpaceSettings

POPULATION = 16
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "indicators, as in the paper": ({"start": "paper", "repeats": 3}, {"name": "cma", "x0": "default"}),
    "indicators, unscaled": ({"scale": "none"}, {"name": "cma", "x0": "default"}),
    "bits, unscaled": ({"bits": True, "scale": "none"}, {"name": "catcma"}),
    "integers, unscaled": ({"encoding": "integers", "scale": "none"}, {"name": "catcma"}),
    "blocks, unscaled": ({"encoding": "blocks", "scale": "none"}, {"name": "catcma"}),
    "blocks": ({"encoding": "blocks"}, {"name": "catcma"}),
    "pruning, unscaled": ({"encoding": "pruning", "bits": True, "scale": "none"}, {"name": "catcma"}),
}


def path(recipe: StackRecipe) -> tuple[object, ...]:
    return tuple((recipe.blends[hop.attention].sources[0], hop.layer, hop.scale) for hop in recipe.hops)


def shared(paths: list[tuple[object, ...]]) -> float:
    """The share of hops that are in a prefix of another path; equal paths count once, as the store answers the rest."""
    distinct = set(paths)
    nodes = {one[: k + 1] for one in distinct for k in range(len(one))}
    return 1 - len(nodes) / sum(map(len, distinct))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--generations", type=int, default=40)
    given = parser.parse_args()
    layers = given.layers
    wanted = {*range(layers // 3), *range(layers - layers // 3, layers)}
    context = SpaceContext(
        {"a": "a", "b": "b"}, None, "a", layers, True, lambda name: find_method(name, "method"), 0, None
    )
    print(f"{'':30} first generation   last")
    for label, (space, optimizer) in CASES.items():
        built = DataFlowSpaceSettings(**space).build(context)
        settings: Any = TypeAdapter(OptimizerSettings).validate_python(optimizer | {"population": POPULATION})
        chooser = settings.build(built.parameters, 1, 0)
        saved = []
        for _ in range(given.generations):
            genomes = chooser.ask(POPULATION)
            paths = [path(built.decode(genome)) for genome in genomes]
            saved.append(shared(paths))
            layers_of = [{layer for source, layer, _ in one if source == "a"} for one in paths]  # type: ignore[misc]
            losses = [len(wanted ^ used) + 0.1 * len(one) for used, one in zip(layers_of, paths, strict=True)]
            chooser.tell([Observation(genome, [loss]) for genome, loss in zip(genomes, losses, strict=True)])
        print(f"{label:30} {saved[0]:15.0%} {saved[-1]:8.0%}")


if __name__ == "__main__":
    main()
