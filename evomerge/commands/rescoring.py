"""Scoring one model as plain transformers loads it: what was exported, or any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from evaluators.base import Split
from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.live import (
    LiveModel,
    NotFiniteError,
    check_live,
    for_scoring,
    live_model,
    load_tokenizer,
    load_weights,
)
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.report.entries import candidate_id
from evomerge.search.prepare import Prepared
from evomerge.search.search_file import SearchFile
from evomerge.search.setup import objective_values
from evomerge.search.statistics import Values, mean_and_error, sign_test
from evomerge.search.worker import choose_device, torch_dtype
from evomerge.store import CandidateRow, Estimate, Store


def scored(live: LiveModel, prepared: Prepared, split: Split) -> dict[str, Estimate]:
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


def reproduce(
    written: Path, store: Store, row: CandidateRow, prepared: Prepared, *, rounds: bool, say: Callable[[str], None]
) -> list[str]:
    """Load an exported folder with plain transformers and score it again; a line for each evaluator.

    Each item must score as recorded, but for what rounds: scales that were folded into the weights and adapters that
    were not (``rounds``), and items that a race scored in several batches, for padding is another in each. Then no more
    than one in twenty may score otherwise, and not all the same way.

    Args:
        rounds: what was written rounds otherwise than what was scored.
        say: told what is being done.

    Raises:
        InputError: it does not score what was recorded.
    """
    say("verifying: loading it")
    live = plain_model(open_source("export", str(written), place=str(written)), prepared.file)
    lines, raced = [], _raced(store, row) if prepared.setup.racing is not None else {}
    for split in ("search", "held_out"):
        recorded = {scores.evaluator: scores for scores in store.scores(row.number, split)}
        for evaluator in prepared.evaluators:
            if evaluator.version not in recorded:
                continue
            before = recorded[evaluator.version]
            say(f"verifying: {evaluator.name}, {len(before.items)} {split} items")
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
    """A model as plain transformers loads it, in the dtype, on the device and with the threads of a search's worker.

    Adapters are folded into it, as they are when a search makes its source of them.

    Raises:
        InputError: transformers cannot load it, or it holds or computes NaN or Inf.
    """
    torch.set_num_threads(file.cluster.cpus_per_worker)
    device, dtype = choose_device(file.device), torch_dtype(file.dtype)
    if source.adapters:
        live = live_model(source, device, dtype)
        load_weights(live, ((name, source.read(name)) for name in source.tensors))
    else:
        disable_progress_bar()  # it would run through our own
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:  # whatever strange settings do inside transformers
            raise InputError(source.place, f"transformers cannot load it: {first_line(error)}") from error
        live = LiveModel(for_scoring(model.to(device)), load_tokenizer(source))
    try:
        check_live(live)
    except NotFiniteError as error:
        raise InputError(source.place, f"cannot be scored: {error}") from error
    except Exception as error:  # of a model whose settings have it compute something else
        raise InputError(source.place, f"cannot be scored: {first_line(error)}") from error
    return live
