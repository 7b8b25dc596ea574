"""The commands that show a search, and those that send a command to its driver."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from evomerge.commands.waiting import opening
from evomerge.errors import InputError
from evomerge.mergekit import dump_recipe
from evomerge.printable import without_nan
from evomerge.recipes.base import read_recipe
from evomerge.recipes.routed import RoutedRecipe
from evomerge.report.allocation import allocation_lines
from evomerge.report.candidate import score_lines
from evomerge.report.comparing import compared
from evomerge.report.conclusions import conclusions, roles_of
from evomerge.report.consoles import make_console
from evomerge.report.curse import Curse, SplitScores, curse_of, curse_text
from evomerge.report.curse_picture import curse_svg
from evomerge.report.experts import uses_of
from evomerge.report.items import ItemAnswers, are_records, item_lines, items_of
from evomerge.report.lists import SPLITS, comparison_table, origin_text, top_table
from evomerge.report.live import LiveScreen
from evomerge.report.naming import chosen
from evomerge.report.parameters import parameter_text, parameters_of
from evomerge.report.path import path_svg, path_text
from evomerge.report.screen import cell, cells, choice_text, panel, resume_lines
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import depths_of, read_status, status_of
from evomerge.search.estimation.preference import Preference, ranked
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.resuming import resumed_file
from evomerge.store import CandidateRow, SearchRecord, Store, Verb, current_holder
from evomerge.store.rows import candidate_id

_FEW, _MANY = 20, 50  # points in a plot of the winner's curse: below this too few, and the suggested number


def status(folder: Path, *, as_json: bool, watch: bool) -> None:
    """Print the status of a search; with ``watch``, keep updating it until the search ends."""
    if as_json:
        print(read_status(folder).model_dump_json(indent=2))
        return
    console = make_console()
    with open_store(folder) as store:
        if watch:
            with LiveScreen(console, lambda: status_of(store)) as screen:
                while current_holder(store) is not None:
                    screen.draw()
                    time.sleep(1.0)
        known = status_of(store)
    console.print(panel(known))
    for line in resume_lines(known, str(folder)):
        console.print(line, soft_wrap=True)


def top(folder: Path, k: int | None, *, as_json: bool) -> None:
    """Print the k best candidates, best compromises first for a front, or all candidates in the order asked."""
    with open_store(folder) as store:
        search = store.search()
        record = search.record
        names = [p.name for p in record.parameters]
        rows = store.candidates() if k is None else ranked(store, Preference.of_search(search), k)
        known = status_of(store)
    if as_json:
        print(json.dumps(without_nan([_as_json(row, names, known, record) for row in rows]), indent=2))
        return
    console = make_console()
    console.print(top_table(rows, known, record, best=k is not None))
    if not rows:
        console.print("No candidate was scored on every item and meets all constraints; --all lists every candidate.")
    if k is None and any("~" in text for row in rows for text in cells(known.entry(row, record), known)):
        console.print("~ marks an estimate, from the number of items in brackets.", style="dim")
    asked = known.candidates.asked
    if k is not None and 0 < len(rows) < asked:
        which = f"the {k} best" if len(rows) == k else "those that were scored on every item and keep all constraints"
        more = f"evomerge top {shlex.quote(str(folder))} --all"
        note = f"{len(rows)} of {asked} candidates: {which}, of equal recipes the first. All: {more}"
        console.print(note, style="dim", soft_wrap=True)
    for line in conclusions(known):
        console.print(line)
    for line in choice_text(known):
        console.print(line, style="dim")


def show(folder: Path, candidate: str, *, as_json: bool, as_recipe: bool, picture: Path | None) -> None:
    """Print a candidate's recipe, scores, attempts and the end of its log, or only its recipe, or draw its path."""
    with open_store(folder) as store:
        row = store.candidate(chosen(store, candidate))
        search = store.search()
        known = status_of(store)
        depths, uses = depths_of(store), uses_of(store, row)
    recipe = read_recipe(row.recipe, search.record.sources)
    if picture is not None:
        title = f"{search.name} {row.id} {row.label}".strip()
        _save(picture, path_svg(recipe, depths, title))
        print(f"drawn into {picture}", file=sys.stderr)
        return
    if as_recipe:
        print(dump_recipe(recipe), end="")
        return
    names = [p.name for p in search.record.parameters]
    if as_json:
        more = {"recipe": json.loads(row.recipe), "attempts": row.attempts, "worker": row.worker}
        more |= {"timings": row.timings, "failure": row.failure}
        print(json.dumps(without_nan(_as_json(row, names, known, search.record) | more), indent=2))
        return
    console = make_console()
    shown = known.entry(row, search.record)
    console.print(
        f"{shown.id}  {origin_text(shown.origin, shown.label)}  {row.status}, asked in step {row.step}",
        style="bold",
    )
    if chosen_for := [*roles_of(known, row.id, "held_out")]:
        console.print(f"  {', '.join(chosen_for)} on held-out items")
    for line in score_lines(row, search.record, known):
        console.print(f"  {line}")
    if row.timings:
        console.print("  " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row.timings.items()))
    console.print(f"  attempts {row.attempts}, worker {row.worker or 'none'}, recipe {row.recipe_hash}")
    if row.same_as is not None:
        console.print(f"  answered by {candidate_id(row.same_as)}, which has the same recipe")
    for name, value in parameters_of(row.genome, search.record.parameters):
        console.print(f"    {name} = {parameter_text(value)}")
    for line in path_text(recipe, depths, console.width - 2):
        console.print(f"  {line}")
    for line in recipe.lines():
        console.print(f"  {line}")
    if isinstance(recipe, RoutedRecipe):
        for line in allocation_lines(recipe, uses):
            console.print(f"    {line}", highlight=False)
    console.print("  the recipe in full: --recipe", style="dim")
    if row.failure:
        console.print(f"failed: {row.failure['reason']}: {row.failure['message']}", style="red")
        log = folder / (row.failure.get("log") or "no log")
        if log.is_file():
            console.print(log.read_text(encoding="utf-8")[-2000:])
    versions = ", ".join(f"{name} {version}" for name, version in search.environment.items())
    console.print(f"made with {versions}", style="dim")
    with open_store(folder) as store:
        items = [measured for measured in _items(store, (row.number,)) if measured.items]
    for measured in items:
        console.print(f"\n{measured.title}, the first of {len(measured.items)} (all: --items)", style="bold")
        console.print(*item_lines(measured.items[0], [row.id], records=measured.records), sep="\n")


@dataclass(frozen=True)
class _Items:
    """The items of a measure on one split that candidates were scored on."""

    title: str
    objective: str
    split: str
    items: list[ItemAnswers]
    records: bool


def _items(store: Store, numbers: Sequence[int]) -> Iterator[_Items]:
    search = store.search()
    for split, name in SPLITS.items():
        for measure in search.record.measures:
            items, records = items_of(store, numbers, split, measure), are_records(search, measure.name)
            yield _Items(f"{measure.name}, {name}", measure.name, split, items, records)


def show_items(folder: Path, candidates: Sequence[str], *, as_json: bool) -> None:
    """Print all items of one candidate, or those on which two candidates differ, with their answers."""
    with open_store(folder) as store:
        numbers = [chosen(store, name) for name in candidates]
        scored = [measured for measured in _items(store, numbers) if measured.items]
    if not scored:
        raise InputError(
            ", ".join(candidates),
            "were not scored on the same items" if len(numbers) > 1 else "has no scores",
            "`evomerge top` lists those with.",
        )
    names = [candidate_id(number) for number in numbers]
    if as_json:
        rows = [
            {"objective": measured.objective, "split": measured.split} | asdict(item)
            for measured in scored
            for item in measured.items
        ]
        print(json.dumps(without_nan(rows), indent=2))
        return
    console = make_console()
    for measured in scored:
        wanted = [item for item in measured.items if len(numbers) == 1 or item.differs]
        of = f"{len(wanted)} items" if len(numbers) == 1 else f"{len(wanted)} of {len(measured.items)} items differ"
        console.print(f"\n{measured.title}: {of}", style="bold")
        for item in wanted:
            console.print(*item_lines(item, names, records=measured.records), "", sep="\n", soft_wrap=True)


def show_prompt(folder: Path, candidate: str) -> None:
    """Print what a candidate is asked: the first prompt of each measure as it is read, its tokens, and the answer."""
    with open_store(folder) as store:
        number = chosen(store, candidate)
        file = resumed_file(folder, store, ())
        items = {
            measured.objective: measured.items for measured in _items(store, (number,)) if measured.split == "search"
        }
    with opening():
        from evomerge.report.prompts import prompt_lines
        from evomerge.search.preparing.asking import shown_prompts
        from evomerge.search.preparing.prepare import prepare

        prepared = prepare(file)
        prompts = list(shown_prompts(prepared.named_evaluators, prepared.reader()))
    console = make_console()
    for shown in prompts:
        console.print(*prompt_lines(shown), sep="\n", soft_wrap=True)
        measure = shown.place.partition(".")[2]
        for item in (item for item in items.get(measure, []) if item.number == 0):
            console.print(*item_lines(replace(item, text=None), [candidate_id(number)]), sep="\n", soft_wrap=True)
        console.print("")


def _save(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise InputError(str(file), f"cannot be written ({error.strerror})", "Name another with --picture.") from None


def compare(folder: Path, a: str, b: str, *, as_json: bool) -> None:
    """Compare two candidates item by item on every split that both were scored on."""
    with open_store(folder) as store:
        numbers = chosen(store, a), chosen(store, b)
        comparisons = compared(store, *numbers)
    one, other = (candidate_id(number) for number in numbers)
    if not comparisons:
        raise InputError(f"{a}, {b}", "were not scored on the same items", "`evomerge confirm` scores the best ones.")
    if as_json:
        print(json.dumps(without_nan([row.model_dump() for row in comparisons]), indent=2))
        return
    console = make_console()
    called = [f"{name} is {who}" for name, who in ((a, one), (b, other)) if name != who]
    if called:
        console.print(", ".join(called), style="dim")
    console.print(comparison_table(comparisons, a, b))
    for row in comparisons:
        if row.n < row.wanted:
            console.print(
                f"{row.objective}, {row.split} split: both were scored on {row.n} of {row.wanted} items, and only "
                "these are compared. A race asks first for items on which the baselines differ, so means over all "
                "items differ.",
                style="dim",
            )
    confidence = f"{comparisons[0].confidence:.0%}"
    note = f"Each interval is of one comparison ({confidence}) and not corrected: of many pairs some differ "
    console.print(f"{note}by luck. On the search split a candidate chosen by its score looks too good.", style="dim")


def curse(folder: Path, *, as_json: bool, picture: Path | None) -> None:
    """Show how far the best search scores drop on held-out items: as a table, as JSON, or as a picture."""
    with open_store(folder) as store:
        winners_curse = curse_of(store)
    if not winners_curse.candidates:
        raise InputError(str(folder), "has no candidate with held-out scores", f"Score them: evomerge confirm {folder}")
    if picture is not None:
        _save(picture, curse_svg(winners_curse))
        print(f"drawn into {picture}", file=sys.stderr)
        return
    if as_json:
        print(winners_curse.model_dump_json(indent=2))
        return
    console = make_console()
    for number, one in enumerate(winners_curse.all):
        if number:
            console.print("")
        console.print(_curse_table(one))
        for line in curse_text(one):
            console.print(line)
    count = len(winners_curse.candidates)
    if count < _FEW:
        more = f"evomerge resume {shlex.quote(str(folder))} --set confirm.drawn={_MANY}"
        console.print(f"{count} candidates draw a poor picture. More of the best: {more}", style="dim")


def _curse_table(winners_curse: Curse) -> Table:
    """A table of all candidates with both scores."""
    table = Table(title=winners_curse.objective, title_justify="left", box=None, pad_edge=False)
    for title in ("candidate", "", "search", "held out", "falls by"):
        table.add_column(title, justify="left" if title in ("candidate", "") else "right")
    for point in winners_curse.points:
        fall = (point.search.mean - point.held_out.mean) * (1 if winners_curse.maximise else -1) + 0.0
        style = "bold green" if point.winner else "dim" if point.baseline else ""
        table.add_row(point.id, _role(point), cell(point.search), cell(point.held_out), f"{fall:+.3f}", style=style)
    return table


def _role(point: SplitScores) -> str:
    """The role of a candidate in the plot."""
    if point.winner:
        return f"{point.label}, winner".removeprefix(", ")
    return point.label or ("shortlist" if point.confirmed else "drawn only")


def send_command(folder: Path, verb: Verb) -> None:
    """Send a command to the driver of a search."""
    with open_store(folder) as store:
        holder = current_holder(store)
        if holder is None:
            raise InputError(str(folder), "has no running driver", f"Continue it: evomerge resume {folder}")
        store.request_command(verb)
    print(f"told {holder} to {verb}", file=sys.stderr)


def _as_json(row: CandidateRow, names: list[str], known: SearchStatus, record: SearchRecord) -> dict[str, Any]:
    """A candidate as ``top --json`` prints it: equal in two runs of the same search, even after interruptions.

    If there is a scalarisation, ``scalar`` is its value on the search split.
    """
    shown = known.entry(row, record)
    genome = None if row.genome is None else dict(zip(names, row.genome.tolist(), strict=True))
    return {
        "id": row.id,
        "label": row.label,
        "origin": shown.origin,
        "step": row.step,
        "genome": genome,
        "recipe_hash": row.recipe_hash,
        "status": row.status,
        "scores": {name: estimate.model_dump() for name, estimate in row.objectives.items()},
        "scalar": None if shown.scalar is None else shown.scalar.model_dump(),
        "eligible": row.eligible,
        "on_front": row.on_front,
        "niche": row.niche,
        "elite": row.elite,
        "change": row.change,
    }
