"""The commands that make or score one model of a search: export, score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from evaluators.base import Split
from evomerge.checkpoints.checks import check_finite
from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_live, load_tokenizer
from evomerge.checkpoints.source import Source, open_source
from evomerge.commands.merge import local_folder, progress_bar
from evomerge.errors import InputError
from evomerge.merging.export import write_model
from evomerge.report.card import Provenance, papers
from evomerge.report.curse import curse_of
from evomerge.report.entries import Constraint, Value, candidate_id
from evomerge.report.screen import cell, make_console
from evomerge.report.status import chosen, status_of
from evomerge.search.folder import open_store
from evomerge.search.prepare import Prepared, prepare
from evomerge.search.search_file import SearchFile, load_search_file
from evomerge.search.session import check_unchanged, recipe_of, resumed_file
from evomerge.search.setup import objective_values
from evomerge.search.statistics import Values, mean_and_error, sign_test
from evomerge.search.worker import choose_device
from evomerge.store import CandidateRow, Estimate, Store


def export(folder: Path, out: str | Path, candidate: str, *, verify: bool) -> None:
    """Write a candidate of a search as a model folder, and see that it scores as recorded.

    ``out`` is a folder, or a URL: then the model is made and seen to score in a temporary folder, and uploaded.
    """
    console = make_console()
    with open_store(folder) as store:
        number = chosen(store, candidate)
        row = store.candidate(number)
        if row.status not in ("done", "eliminated", "cached"):
            raise InputError(
                candidate_id(number), f"is {row.status}: it has no scores", "`evomerge top` lists those with."
            )
        prepared = prepare(resumed_file(folder, store, ()))
        check_unchanged(store, prepared)
        recipe = recipe_of(row, prepared.file.sources)
        provenance = Provenance(store.search(), status_of(store), row, curse_of(store))
        checked: list[str] = []

        def check(written: Path) -> None:
            rounds = recipe.is_scaled or prepared.file.together > 1
            checked.extend(reproduce(written, store, row, prepared, rounds=rounds))

        with local_folder(out, console) as model, progress_bar(console) as update:
            texts = papers(model.name, recipe, prepared.sources, provenance)
            write_model(recipe, prepared.sources, model, texts=texts, check=check if verify else None, progress=update)
    for line in checked:
        console.print(line)
    console.print(f"exported {candidate_id(number)} to {out}", style="bold")


def score(model: str, path: Path, overrides: Sequence[str], split: str, *, as_json: bool) -> None:
    """Score a model folder on the objectives and constraints of a search file; its screen is left out."""
    if split not in ("search", "held_out"):
        raise InputError("--split", f"{split!r} is neither search nor held_out")
    which: Split = "search" if split == "search" else "held_out"
    prepared = prepare(load_search_file(path, overrides))
    source = open_source("model", model, place="MODEL")
    check_finite(source)
    live = plain_model(source, prepared.file)
    setup = prepared.setup
    values = _scored(live, prepared, which)
    if as_json:
        told = {
            "objectives": {o.name: values[o.name] for o in setup.objectives},
            "constraints": {c.name: values[c.name] for c in setup.constraints},
        }
        print(
            json.dumps({"model": model, "split": split, **told, "feasible": setup.violation(values) == 0.0}, indent=2)
        )
        return
    table = Table(box=None, pad_edge=False)
    for title in ("objective", "score", "items"):
        table.add_column(title)
    for objective in setup.objectives:
        value = Value(**values[objective.name])
        table.add_row(objective.name, cell(value), f"{value.n} {split}")
    for each in setup.constraints:
        value, limit = Value(**values[each.name]), Constraint(threshold=each.threshold, at_least=each.maximise)
        kept = "kept" if limit.is_kept(value) else "missed"
        table.add_row(f"{each.name} {limit.text}", f"{cell(value)}, {kept}", f"{value.n} {split}")
    make_console().print(table)


def _scored(live: LiveModel, prepared: Prepared, split: Split) -> dict[str, Estimate]:
    """What a model is worth in each objective and constraint, on as many items of a split as a search scores."""
    setup = prepared.setup
    evaluators = enumerate(zip(setup.evaluators, prepared.evaluators, strict=True))
    wanted = setup.counts()
    scores = [
        evaluator.score(live, split, range(wanted[e] if split == "search" else info.held_out_items))
        if e in wanted  # the screen's is not
        else {}
        for e, (info, evaluator) in evaluators
    ]
    return {m.name: mean_and_error(objective_values(m, scores, split)) for m in setup.measures}


def reproduce(written: Path, store: Store, row: CandidateRow, prepared: Prepared, *, rounds: bool) -> list[str]:
    """Load an exported folder with plain transformers and score it again; a line for each evaluator.

    Each item must score as recorded, but for what rounds: scales that were folded into the weights and adapters that
    were not (``rounds``), and items that a race scored in several batches, for padding is another in each. Then no more
    than one in twenty may score otherwise, and not all the same way.

    Raises:
        InputError: it does not score what was recorded.
    """
    live = plain_model(open_source("export", str(written), place=str(written)), prepared.file)
    lines, raced = [], _raced(store, row) if prepared.setup.racing is not None else {}
    for split in ("search", "held_out"):
        recorded = {scores.evaluator: scores for scores in store.scores(row.number, split)}
        for evaluator in prepared.evaluators:
            if evaluator.version not in recorded:
                continue
            before = recorded[evaluator.version]
            now = evaluator.score(live, split, before.items.tolist())
            place, name = f"{evaluator.name} ({split})", candidate_id(row.number)
            parts = split == "search" and len(raced.get(evaluator.version, set()) | {len(before.items)}) > 1
            exact, most = not (rounds or parts), 0
            for metric, values in before.metrics.items():
                if metric not in evaluator.measured:
                    most = max(most, _differing(now[metric], values, name, f"{place}: {metric}", exact))
            told = f"{len(before.items)} {split} items score exactly as recorded"
            if most:
                why = "of what was folded in" if rounds else "in other batches than those of its race"
                told = f"{most} of {len(before.items)} {split} items score otherwise, by rounding {why}"
            lines.append(f"verified: {evaluator.name}, {told}")
    return lines


def _raced(store: Store, row: CandidateRow) -> dict[str, set[int]]:
    """For each evaluator's version the numbers of items at which scoring this recipe was broken off."""
    same = {other.number for other in store.candidates() if other.recipe_hash == row.recipe_hash}
    found: dict[str, set[int]] = {}
    for event in store.events(kinds=("rung",)):
        if event.candidate in same:
            for version, count in event.payload["items"].items():
                found.setdefault(version, set()).add(count)
    return found


def _differing(now: Values, before: Values, candidate: str, place: str, exact: bool) -> int:
    """How many items score otherwise than was recorded, where that is allowed at all."""
    differ = now != before if exact else ~np.isclose(now, before, rtol=1e-3, atol=1e-3)
    count = int(differ.sum())
    better = int((now[differ] > before[differ]).sum())
    if count and (exact or count > len(before) / 20 or sign_test(better, count - better) < 0.001):
        raise InputError(
            candidate,
            f"the exported model scores {count} of {len(before)} items of {place} otherwise than was recorded",
            "Another device or number of threads rounds otherwise; export where the search ran, or with --no-verify.",
        )
    return count


def plain_model(source: Source, file: SearchFile) -> LiveModel:
    """A model as plain transformers loads it, on the device and with the threads that a worker of the search has."""
    torch.set_num_threads(file.cluster.cpus_per_worker)
    disable_progress_bar()  # it would run through our own
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model.eval().requires_grad_(False).to(choose_device(file.device))
    live = LiveModel(model, load_tokenizer(source))
    try:
        check_live(live)
    except NotFiniteError as error:
        raise InputError(source.place, f"cannot be scored: {error}") from error
    return live
