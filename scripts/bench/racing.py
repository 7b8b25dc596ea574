"""How often a race is wrong: how many candidates it eliminates from which the optimizer would have learned.

Generations of searches that scored every candidate on every item (recorded by ``search_cost.py``, or simulated here)
are raced again from their scores, with rungs of fewer items. A candidate is wrongly eliminated if it is among the best
``keep`` by all items.

    python scripts/bench/racing.py [--recorded NAME=FOLDER]... [--json docs/racing.json]

FOLDER has the searches of ``search_cost.py run``, and NAME is a name for their results. Results with other names are
kept in the file, and the printed table, which is that of docs/scoring.md, contains all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.estimation.items import ItemOrder, item_order
from evomerge.search.estimation.racing import surely_better, verdicts
from evomerge.store import Store

Losses = NDArray[np.float64]
RUNGS = ((25, 50), (25, 75), (50, 150), (100, 300))
CONFIDENCES = (0.8, 0.9, 0.95)
ORDERS = 10  # of items, for each recorded search
SEARCHES = 100  # simulated ones
SIMULATED = "simulated"
SHOWN = 0.9  # the default confidence, which the table shows in bold

Rows = Sequence[Mapping[str, Any]]


@dataclass
class Tally:
    """Counts of candidates by how their race ended, and of items."""

    candidates: int = 0
    eliminated: int = 0
    wrongly: int = 0
    settled: int = 0
    items: int = 0
    of_items: int = 0

    def row(self) -> dict[str, float]:
        return {
            "candidates": self.candidates,
            "eliminated": self.eliminated / self.candidates,
            "wrongly_eliminated": self.wrongly / self.candidates,
            "wrongly_of_eliminated": self.wrongly / max(1, self.eliminated),
            "settled": self.settled / self.candidates,
            "items": self.items / self.of_items,
        }


def race(losses: Losses, order: ItemOrder, rungs: Sequence[int], keep: int, confidence: float, tally: Tally) -> None:
    """Race one generation, losses [candidates, items], up to all items."""
    count, items = losses.shape
    scored = np.zeros(count, dtype=np.int64)
    racing = np.ones(count, dtype=np.bool_)
    eliminated, settled = np.zeros((2, count), dtype=np.bool_)
    for rung in rungs:
        scored[racing] = rung
        better = np.zeros((count, count), dtype=np.bool_)
        for level in sorted(set(scored.tolist())):
            there = np.flatnonzero(scored >= level)
            known = order.positions[:level]
            sure = surely_better([losses[np.ix_(there, known)]], [order.sample(known, items)], confidence)
            lower = np.minimum(scored[there][:, None], scored[there][None, :]) == level
            block = better[np.ix_(there, there)]
            block[lower] = sure[lower]
            better[np.ix_(there, there)] = block
        now = verdicts(better, keep)
        eliminated |= now.eliminated & racing
        settled |= now.settled & racing & ~eliminated
        racing &= ~(eliminated | settled)
    scored[racing] = items
    means = np.sort(losses.mean(axis=1))
    selected = losses.mean(axis=1) < means[keep]  # dropping one that is equal to the first that is not kept is no error
    tally.candidates += count
    tally.eliminated += int(eliminated.sum())
    tally.wrongly += int((eliminated & selected).sum())
    tally.settled += int(settled.sum())
    tally.items += int(scored.sum())
    tally.of_items += count * items


def recorded(folder: Path) -> Iterator[list[Losses]]:
    """The generations of each search by CMA-ES that scored every candidate on all items, baselines first."""
    for path in sorted(folder.glob("*/search.db")):
        with Store.open(path) as store:
            settings = store.search().settings
            if settings.get("racing") or settings.get("screen") or settings["optimizer"]["name"] != "cma":
                continue
            (objective,) = store.search().fingerprints["objectives"]
            sign = -1.0 if objective["maximise"] else 1.0
            generations: dict[int, list[Losses]] = {}
            for row in store.candidates(statuses=("done", "cached")):
                (scores,) = store.scores(row.number, "search")
                losses = sign * scores.metrics[objective["metric"]].astype(np.float64)
                generations.setdefault(row.step, []).append(losses)
            yield [np.array(generation) for generation in generations.values()]


def simulated(searches: int, items: int = 500, population: int = 9) -> Iterator[list[Losses]]:
    """Searches whose generations are wide at first and narrow later, as with an optimizer that converges.

    An item is solved with a probability that is logistic in ability minus difficulty; half of the randomness belongs to
    the item, is the same for all candidates, and is drawn for each search.
    """
    for seed in range(searches):
        random = np.random.default_rng(seed)
        difficulty, own = random.normal(0, 1.5, items), random.uniform(0.1, 1.0)
        generations = []
        for spread in (1.5, 1.2, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05):
            ability = random.normal(0, spread, (population, 1))
            noise = random.logistic(0, own, (population, items))
            generations.append(-(ability - difficulty + noise > 0).astype(np.float64))
        yield generations


def measure(searches: Sequence[list[Losses]], orders: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for rungs in RUNGS:
        longer = [search for search in searches if search[0].shape[1] > rungs[-1]]
        for confidence in CONFIDENCES if longer else ():
            tally = Tally()
            for number, (baselines, *generations) in enumerate(longer):
                for seed in range(orders):
                    order = item_order(baselines, 1000 * number + seed)
                    for losses in generations:
                        if len(losses) > 3:
                            race(losses, order, rungs, len(losses) // 2, confidence, tally)
            rows.append({"rungs": list(rungs), "confidence": confidence} | tally.row())
    return rows


def table(results: Mapping[str, Rows]) -> str:
    """The results as a Markdown table: ranges over all kinds of searches, and the error rate of each."""
    by_race: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for name, rows in results.items():
        for row in rows:
            by_race.setdefault((", ".join(map(str, row["rungs"])), row["confidence"]), {})[name] = row
    first, *others = results
    lines = [
        f"| rungs | confidence | items | eliminated | wrongly, of all candidates: {' | '.join([first, *others])} |",
        "| --- " * (4 + len(results)) + "|",
    ]
    for (rungs, confidence), found in by_race.items():
        shown = f"**{confidence}**" if confidence == SHOWN else str(confidence)
        wrongly = [f"{found[name]['wrongly_eliminated']:.1%}" if name in found else "" for name in results]
        cells = [rungs, shown, _range(found, "items"), _range(found, "eliminated"), *wrongly]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(found: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """The smallest and the largest share, in percent."""
    values = [row[key] for row in found.values()]
    return f"{100 * min(values):.0f}-{max(values):.0%}"


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or name in ("", SIMULATED):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=_named, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    earlier = json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else {}
    results: dict[str, Rows] = {SIMULATED: measure(list(simulated(SEARCHES)), 1)}
    results |= {name: measure(list(recorded(folder)), ORDERS) for name, folder in given.recorded}
    for name, rows in results.items():
        for row in rows:
            columns = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{name}  {columns}")
    results = earlier | results  # of searches that were not raced again
    print(table(results))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
