"""The commands that look at a search, and those that send a word to its driver."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from evomerge.errors import InputError
from evomerge.mergekit import dump_recipe
from evomerge.recipe import Recipe
from evomerge.report.path import path_svg, path_text
from evomerge.report.screen import Screen, cell, make_console, panel
from evomerge.report.status import (
    candidate_id,
    candidate_number,
    chosen,
    compared,
    depths_of,
    entry,
    read_status,
    status_of,
)
from evomerge.search.folder import open_store
from evomerge.store import CandidateRow, Verb, current_holder


def status(folder: Path, *, as_json: bool, watch: bool) -> None:
    """Where a search stands; with ``watch``, again and again until it ends."""
    if as_json:
        print(read_status(folder).model_dump_json(indent=2))
        return
    console = make_console()
    with open_store(folder) as store:
        if watch:
            with Screen(console, lambda: status_of(store)) as screen:
                while current_holder(store) is not None:
                    screen.draw()
                    time.sleep(1.0)
        console.print(panel(status_of(store)))


def top(folder: Path, k: int | None, *, as_json: bool) -> None:
    """The k best by the first objective, or all in the order asked."""
    with open_store(folder) as store:
        objectives = store.search().fingerprints["objectives"]
        names = [p["name"] for p in store.search().fingerprints["parameters"]]
        first = objectives[0]
        rows = store.candidates() if k is None else store.best(first["name"], maximise=first["maximise"], k=k)
    if as_json:
        print(json.dumps([_as_json(row, names) for row in rows], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("candidate", "origin", "status", *(o["name"] for o in objectives), "front"):
        table.add_column(title)
    for row in rows:
        values = [cell(entry(row).objectives[o["name"]]) if row.objectives else "" for o in objectives]
        origin = f"{row.origin} {row.label}".strip()
        table.add_row(candidate_id(row.number), origin, row.status, *values, "front" if row.on_front else "")
    make_console().print(table)


def show(folder: Path, candidate: str, *, as_json: bool, as_recipe: bool, picture: Path | None) -> None:
    """One candidate: recipe, scores, attempts and the end of its log; or its recipe alone, or its path as a picture."""
    with open_store(folder) as store:
        row = store.candidate(chosen(store, candidate))
        search = store.search()
        held_out = status_of(store)
        depths = depths_of(store)
    recipe = Recipe.from_canonical(row.recipe, search.settings["sources"])
    if picture is not None:
        title = f"{search.name} {candidate_id(row.number)} {row.label}".strip()
        _save(picture, path_svg(recipe, depths, title))
        print(f"drawn into {picture}", file=sys.stderr)
        return
    if as_recipe:
        print(dump_recipe(recipe), end="")
        return
    names = [p["name"] for p in search.fingerprints["parameters"]]
    if as_json:
        more = {"recipe": json.loads(row.recipe), "attempts": row.attempts, "worker": row.worker}
        more |= {"timings": row.timings, "failure": row.failure}
        print(json.dumps(_as_json(row, names) | more, indent=2))
        return
    console = make_console()
    console.print(
        f"{candidate_id(row.number)}  {row.origin} {row.label}  {row.status}, asked in step {row.step}", style="bold"
    )
    for name, value in entry(row).objectives.items():
        console.print(f"  {name}: {cell(value)} on {value.n} search items")
    for name, value in held_out.confirmed_values(candidate_id(row.number)).items():
        console.print(f"  {name}: {cell(value)} on {value.n} held-out items")
    if row.timings:
        console.print("  " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row.timings.items()))
    console.print(f"  attempts {row.attempts}, worker {row.worker or 'none'}, recipe {row.recipe_hash}")
    if row.same_as is not None:
        console.print(f"  answered by {candidate_id(row.same_as)}, which has the same recipe")
    if row.genome is not None:
        for parameter, number in zip(search.fingerprints["parameters"], row.genome.tolist(), strict=True):
            console.print(f"    {parameter['name']} = {_gene(parameter, number)}")
    for line in path_text(recipe, depths, console.width - 2):
        console.print(f"  {line}")
    console.print(yaml.safe_dump(json.loads(row.recipe), sort_keys=False, default_flow_style=None))
    if row.failure:
        console.print(f"failed: {row.failure['reason']}: {row.failure['message']}", style="red")
        log = folder / (row.failure.get("log") or "no log")
        if log.is_file():
            console.print(log.read_text(encoding="utf-8")[-2000:])
    versions = ", ".join(f"{name} {version}" for name, version in search.environment.items())
    console.print(f"made with {versions}", style="dim")


def _gene(parameter: Mapping[str, Any], number: float) -> str:
    """A number of a genome as people read it: a choice by its name."""
    if parameter["kind"] == "choice":
        return str(parameter["choices"][int(number)])
    return f"{number:.0f}" if parameter["kind"] == "int" else f"{number:.4f}"


def _save(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise InputError(str(file), f"cannot be written ({error.strerror})") from None


def compare(folder: Path, a: str, b: str, *, as_json: bool) -> None:
    """Two candidates item by item, on every split that both were scored on."""
    with open_store(folder) as store:
        found = compared(store, candidate_number(a, store), candidate_number(b, store))
    if not found:
        raise InputError(f"{a}, {b}", "were not scored on the same items", "`evomerge confirm` scores the best ones.")
    if as_json:
        print(json.dumps([row.model_dump() for row in found], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    titles = ("objective", "split", "items", a, b, f"{a} better by", "interval", f"{a} won", f"{b} won", "p")
    for title in titles:
        table.add_column(title, justify="right" if title not in ("objective", "split") else "left", no_wrap=True)
    for row in found:
        interval = f"[{row.low:+.3f}, {row.high:+.3f}]"
        table.add_row(
            row.objective, row.split, str(row.n), f"{row.a:.3f}", f"{row.b:.3f}", f"{row.difference:+.3f}", interval,
            str(row.better_a), str(row.better_b), f"{row.p:.2g}",
        )  # fmt: skip
    make_console().print(table)


def send(folder: Path, verb: Verb) -> None:
    """Give the driver of a search a word."""
    with open_store(folder) as store:
        holder = current_holder(store)
        if holder is None:
            raise InputError(str(folder), "has no driver at work", f"Go on with it: evomerge resume {folder}")
        store.request_command(verb)
    print(f"told {holder} to {verb}", file=sys.stderr)


def _as_json(row: CandidateRow, names: list[str]) -> dict[str, Any]:
    """A candidate as ``top --json`` gives it: the same in two runs of one search, whatever befell them."""
    genome = None if row.genome is None else dict(zip(names, row.genome.tolist(), strict=True))
    return {
        "id": candidate_id(row.number),
        "label": row.label,
        "origin": row.origin,
        "step": row.step,
        "genome": genome,
        "recipe_hash": row.recipe_hash,
        "status": row.status,
        "scores": row.objectives,
        "on_front": row.on_front,
    }
