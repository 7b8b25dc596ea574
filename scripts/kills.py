"""Kills searches with SIGKILL at random moments, resumes them, and compares them with searches that were not killed.

They are small searches of the miniatures and of the zoo, one of each kind, in child processes. Each is first run
without interruption; then it is killed again and again, after a random number of events, and resumed until it has
finished.

    python scripts/kills.py [--kills 200] [--kinds generations,race,...] [--seed 0] [--json]

Prints a row per kind: how often its searches were killed, in which states, how many of them were finished, and how many
differ in anything from the uninterrupted one: genomes, recipes, statuses, scores of each item on both splits, answers,
losses, the front, the shortlist, the winner. ``doubled`` counts candidates with two results, ``damaged`` counts damaged
stores, and ``hung`` counts runs that took longer than HUNG_S. The exit code is 0 if all of these are 0. PostgreSQL
comes from the ``test`` extra, and the adapters of ``together`` from peft.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MINIATURES = ROOT / "examples" / "miniatures"
ZOO = ROOT / "examples" / "zoo"
HUNG_S = 300.0
KILLS_EACH = 8  # of one search, before it is left to finish

RACE: dict[str, Any] = {"racing": {"rungs": [10, 16]}}
STEADY: dict[str, Any] = {"mode": "asynchronous"}
CATCMA: dict[str, Any] = {"optimizer": {"name": "catcma", "population": 5}}
ROUTED: dict[str, Any] = {"kind": "routed", "granularity": "model", "refits": 2}
MIXTURE: dict[str, Any] = {"kind": "mixture", "architecture": "mixtral"}
FIT: dict[str, Any] = {"fit": {"file": str(ZOO / "fit.jsonl"), "items": 12, "drawn": 4, "steps": 3}}


def on_the_zoo(space: dict[str, Any], *adapters: str) -> dict[str, Any]:
    """The content of a search over some adapters or prompts of the zoo."""
    sources = {name: f"{ZOO / 'base'}+{ZOO / name}" for name in adapters}
    return {"sources": {"base": str(ZOO / "base"), **sources}, "space": space}


KINDS: dict[str, dict[str, Any]] = {
    "generations": {},
    "race": RACE,
    "asynchronous": STEADY,
    "asynchronous race": STEADY | RACE,
    "asynchronous race by tpe": STEADY | RACE | {"optimizer": {"name": "tpe", "population": 5}},
    "two objectives": {"optimizer": {"name": "nsga2", "population": 6}},
    "together": {"together": 4},
    "postgres": RACE,
    "routed": CATCMA | FIT | on_the_zoo(ROUTED, "steps_en", "extraction"),
    "mixture": CATCMA | FIT | on_the_zoo(MIXTURE, "steps_ja", "extraction"),
    "prompts": CATCMA | on_the_zoo({"kind": "prompts", "block": 4}, "soft_japanese", "soft_steps"),
}


@dataclass
class Row:
    """The results for one kind of search."""

    kind: str
    kills: int = 0
    searches: int = 0
    differ: int = 0
    doubled: int = 0
    damaged: int = 0
    hung: int = 0
    states: Counter[str] = field(default_factory=Counter)
    first_difference: str = ""

    @property
    def is_right(self) -> bool:
        return not (self.differ or self.doubled or self.damaged or self.hung)

    @property
    def line(self) -> str:
        states = ", ".join(f"{state} {count}" for state, count in self.states.most_common())
        counts = (
            f"{self.kills:>5} {self.searches:>8} {self.differ:>6} {self.doubled:>7} {self.damaged:>7} {self.hung:>4}"
        )
        first = f"  FIRST: {self.first_difference}" if self.first_difference else ""
        return f"{self.kind:<26} {counts}  {states}{first}"


class Searches:
    """Makes and runs searches of one kind in a folder."""

    def __init__(self, kind: str, folder: Path, server: Any) -> None:
        self.kind = kind
        self._folder = folder
        self._server = server
        folder.mkdir()
        items = [(7 * k % 60 + 1, 11 * k % 40 + 1) for k in range(60)]
        text = "".join(
            json.dumps({"q": f"{a} + {b} =", "a": str(a + b), "i": i}) + "\n" for i, (a, b) in enumerate(items)
        )
        (folder / "items.jsonl").write_text(text)

    def file(self, name: str) -> Path:
        sums = {
            "evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl", "prompt": "{q}",
            "answer": " {a}",
        }  # fmt: skip
        settings: dict[str, Any] = {
            "name": name.replace(" ", "-"), "seed": 3, "dtype": "float32", "base": "base",
            "sources": {model: str(MINIATURES / model) for model in ("base", "maths", "japanese")},
            "space": {"kind": "parameter_space", "method": "task_arithmetic", "granularity": 2},
            "objectives": {"sums": sums}, "optimizer": {"name": "cma", "population": 5}, "budget": {"candidates": 26},
            "confirm": {"top": 2}, "pool": "in_process",
        }  # fmt: skip
        changes = dict(KINDS[self.kind])
        if self.kind == "two objectives":
            short = sums | {"prompt": "{q} ", "answer": "{a}"}
            changes["objectives"] = {"sums": sums, "spaced": short}
        if self.kind == "together":
            changes["sources"] = {"base": str(MINIATURES / "base"), **self._adapters()}
        if self.kind == "postgres":
            changes["store"] = self._server.url("kills")
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | changes, sort_keys=False))
        return path

    def _adapters(self) -> dict[str, str]:
        from test_adapters import LINEAR, train

        base, references = MINIATURES / "base", {}
        for seed, name in enumerate(("one", "two")):
            if not (adapter := self._folder / name).exists():
                train(base, adapter, seed=seed, r=4, lora_alpha=8, target_modules=LINEAR)
            references[name] = f"{base}+{adapter}"
        return references

    def path(self, name: str) -> Path:
        return self._folder / name

    def start(self, name: str) -> int:
        """Start the search, or resume it, in a child process; return the child's process id."""
        folder = self.path(name)
        arguments = (
            ["resume", str(folder)] if folder.exists() else ["search", str(self.file(name)), "--dir", str(folder)]
        )
        sys.stdout.flush()
        if child := os.fork():
            return child
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from evomerge.cli import main

        code: int | str | None = 1
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
        finally:
            os._exit(code if isinstance(code, int) else 1)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a child, or None after killing it if it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def events(folder: Path) -> int:
    """The number of events recorded so far."""
    from evomerge.errors import InputError
    from evomerge.search.settings.folder import open_store

    try:
        with open_store(folder) as store:
            return max((event.seq for event in store.events(newest=1)), default=0)
    except InputError:  # not made yet
        return 0


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, in two equal searches."""
    from evomerge.search.settings.folder import open_store

    with open_store(folder) as store:
        content: dict[str, Any] = {}
        for row in store.candidates():
            scores = [
                (split, s.evaluator, s.items.tobytes(), {name: v.tobytes() for name, v in s.metrics.items()})
                for split in ("search", "held_out")
                for s in store.scores(row.number, split)
            ]
            genome = None if row.genome is None else row.genome.tobytes()
            content[f"candidate {row.number}"] = (
                row.step, row.origin, row.label, genome, row.recipe_hash, row.status, row.same_as, row.objectives,
                row.losses, row.eligible, row.on_front, scores, store.answers(row.number, "search"),
            )  # fmt: skip
        for kind in ("shortlist", "winner"):
            content[kind] = [event.payload for event in store.events(kinds=(kind,), newest=1)]
        content["state"] = store.search().state
    return content


def faults(folder: Path) -> Iterator[str]:
    """One "doubled" for each candidate with two results, and "damaged" for a damaged store."""
    from evomerge.errors import InputError
    from evomerge.search.settings.folder import open_store
    from evomerge.store.engine import check_intact

    with open_store(folder) as store:
        results = Counter(event.candidate for event in store.events(kinds=("result",)))
        yield from ["doubled"] * sum(count > 1 for count in results.values())
        try:
            with store.transaction() as connection:
                check_intact(connection, store.place)
        except InputError:
            yield "damaged"


def kill_one(searches: Searches, row: Row, whole: dict[str, Any], length: int, kills: int, rng: random.Random) -> None:
    """Run a search, kill it the given number of times, let it finish, and compare."""
    name = f"killed-{row.searches}"
    folder = searches.path(name)
    row.searches += 1
    for _ in range(kills):
        before, child = events(folder), searches.start(name)
        wanted = before + rng.randint(1, max(2, 2 * length // KILLS_EACH))
        deadline, over = time.monotonic() + HUNG_S, None
        while time.monotonic() < deadline and over is None and events(folder) < wanted:
            done, status = os.waitpid(child, os.WNOHANG)
            over = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(rng.random() / 100)
        if over is not None:
            break
        time.sleep(rng.random() / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        row.kills += 1
        row.states[_state(folder)] += 1
    code = ended(searches.start(name), HUNG_S)
    row.hung += code is None
    if code != 0:
        row.differ += 1
        row.first_difference = (
            row.first_difference or f"exit code {code}: {folder.with_suffix('.log').read_text()[-300:]}"
        )
        return
    now = snapshot(folder)
    different = [what for what in whole.keys() | now.keys() if whole.get(what) != now.get(what)]
    row.differ += bool(different)
    row.first_difference = row.first_difference or ", ".join(sorted(different)[:5])
    for fault in faults(folder):
        setattr(row, fault, getattr(row, fault) + 1)


def _state(folder: Path) -> str:
    from evomerge.errors import InputError
    from evomerge.search.settings.folder import open_store

    try:
        with open_store(folder) as store:
            return store.search().state
    except InputError:
        return "before it was made"


def run(kind: str, folder: Path, server: Any, kills: int, rng: random.Random) -> Row:
    """Kill searches of one kind the given number of times."""
    searches, row = Searches(kind, folder, server), Row(kind)
    if (code := ended(searches.start("whole"), HUNG_S)) != 0:
        row.hung, row.differ = int(code is None), 1
        row.first_difference = f"whole: exit code {code}: {(folder / 'whole.log').read_text()[-300:]}"
        return row
    whole, length = snapshot(folder / "whole"), events(folder / "whole")
    while row.kills < kills and row.searches <= kills:
        kill_one(searches, row, whole, length, min(KILLS_EACH, kills - row.kills), rng)
        print(row.line, file=sys.stderr, flush=True)
    return row


def table(rows: list[Row]) -> str:
    title = f"{'kind':<26} kills searches differ doubled damaged hung  killed while"
    return "\n".join([title, *(row.line for row in rows), "", f"{sum(row.kills for row in rows)} kills"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.append(str(ROOT / "tests"))
    # Imported here, so that a forked child can start its search at once.
    import evomerge.cli
    import evomerge.commands.driving
    import evomerge.report.plan  # noqa: F401

    kinds, rng = options.kinds.split(","), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        server = None
        if "postgres" in kinds:
            from helpers_postgres import running_server

            server = stack.enter_context(running_server())
            server.execute("CREATE DATABASE kills")
        rows = []
        for position, kind in enumerate(kinds):
            kills = options.kills // len(kinds) + (position < options.kills % len(kinds))
            rows.append(run(kind, Path(name) / f"{position}", server, kills, rng))
    print(json.dumps([vars(row) for row in rows], indent=2) if options.json else table(rows))
    return 0 if all(row.is_right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
