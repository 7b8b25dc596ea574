"""The commands that make or score one model of a search: export, score.

What a person can have got wrong is looked at first, with light imports alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaluators.base import Split
from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target
from evomerge.commands.waiting import opening, progress_bar
from evomerge.errors import InputError
from evomerge.objects import is_url
from evomerge.printable import without_nan
from evomerge.recipes.base import Recipe
from evomerge.report.basis import unconfirmed_text
from evomerge.report.curse import curse_of
from evomerge.report.entries import Constraint, kind_of, origin_of
from evomerge.report.naming import exported
from evomerge.report.picks import roles_of
from evomerge.report.screen import cell, make_console
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import status_of
from evomerge.search.settings.early import check_early
from evomerge.search.settings.folder import EVIDENCE_NAME, open_store
from evomerge.search.settings.resuming import resumed_file
from evomerge.search.settings.search_file import SearchFile, load_search_file
from evomerge.store import CandidateRow


def export(
    folder: Path, out: str | Path, candidate: str, *, verify: bool, form: str | None = None, said: str | None = None
) -> None:
    """Write a candidate of a search as a model folder, and see that it scores as recorded.

    ``out`` is a folder, or a URL: then the model is made and seen to score in a temporary folder, and uploaded.
    ``form`` is one of those that recipes of its kind know. Where the model is another one than was scored, its own
    scores are shown beside those recorded. ``said`` is what ``out`` is called on the screen, where it will not stay.
    """
    console = make_console()
    with open_store(folder) as store:
        row = store.candidate(exported(store, candidate))
        if row.status not in ("done", "eliminated", "cached"):
            raise InputError(row.id, f"is {row.status}: it has no scores", "`evomerge top` lists those with.")
        if not is_url(str(out)):
            check_target(Path(out))
        file = resumed_file(folder, store, ())
        if verify:
            check_early(file)
        with opening():
            from evomerge.commands.delivering import local_folder
            from evomerge.commands.verifying import compare, reproduce
            from evomerge.merging.building.builders import find_builder
            from evomerge.merging.measured.evidence import Evidence
            from evomerge.report.card import NAME, Provenance, papers, verification
            from evomerge.search.opening.session import as_recorded, check_sources, contents_of, recipe_of
            from evomerge.search.preparing.prepare import open_sources, prepare
            from evomerge.search.workers.building import build_context

            # Where nothing is verified, no item is looked at.
            prepared = as_recorded(store, prepare(file)) if verify else None
            sources = open_sources(file) if prepared is None else prepared.sources
            check_sources(store, sources)
        recipe = recipe_of(row, file.sources)
        _check_form(recipe, form)
        recipe = _unrounded(recipe, file, console)
        evidence = Evidence(folder.absolute() / EVIDENCE_NAME, contents_of(store.search().record.files))
        context = build_context(file, sources, evidence, texts_digest=recipe.calibration, fit_digest=recipe.fit)
        builder = find_builder(recipe.kind)(replace(context, form=form))
        unlike = recipe.unlike(form)
        status = status_of(store)
        unconfirmed = unconfirmed_text(store, row, status)
        provenance = Provenance(store.search(), status, row, curse_of(store), unconfirmed)
        checked: list[str] = []
        with local_folder(out, console) as model, progress_bar(console, "writing tensors") as bar:

            def check(written: Path) -> None:
                assert prepared is not None  # for this is called where it is to be verified
                bar.say("verifying: loading it")
                rounds = recipe.rounds_on_export or file.together > 1
                live = builder.reload(written)
                if unlike:
                    checked.extend(compare(live, store, row, prepared, say=bar.say))
                else:
                    checked.extend(reproduce(live, store, row, prepared, rounds=rounds, say=bar.say))
                with (written / NAME).open("a", encoding="utf-8") as text:
                    text.write(verification(checked, unlike))

            texts = papers(model.name, recipe, sources, provenance, stays=not is_url(str(out)), unlike=unlike)
            if not verify:
                texts[NAME] += verification(())
            builder.export(recipe, model, texts=texts, check=check if verify else None, progress=bar)
    done = f"exported {_called(row, status, file.sources)} to {said or out}{'' if verify else ', not scored again'}"
    _say(console, unlike, checked, done, unconfirmed)


def _unrounded(recipe: Recipe, file: SearchFile, console: Console) -> Recipe:
    """The recipe as its model was scored: in float32 where several were scored together."""
    if file.together == 1 or recipe.dtype == "float32":
        return recipe
    # Adapters were added to what the base computes, and not to its weights: in 16 bits, much of what they change would
    # be rounded away, and the folder be another model than was scored.
    console.print("written in float32: candidates that are scored together are never rounded")
    return recipe.model_copy(update={"dtype": "float32"})


def _say(console: Console, unlike: str, checked: Sequence[str], done: str, unconfirmed: str) -> None:
    """How an export went."""
    if unlike:
        console.print(unlike, style="yellow", soft_wrap=True)
    for line in checked:
        console.print(line)
    console.print(done, style="bold")
    if unconfirmed:
        console.print(f"not confirmed: {unconfirmed}", style="yellow", soft_wrap=True)


def _check_form(recipe: Recipe, form: str | None) -> None:
    """Refuse a form that models of this kind have not (InputError)."""
    if form is None or form in recipe.forms:
        return
    known = f"There are: {', '.join(recipe.forms)}." if recipe.forms else "Leave it out."
    raise InputError("--as", f"a {recipe.kind} model has no form {form!r}", known)


def _called(row: CandidateRow, status: SearchStatus, sources: Collection[str]) -> str:
    """A candidate with what it is: c0042 (best)."""
    kind = [kind_of(origin_of(row, sources), row.label)] if row.label else []
    descriptions = [*kind, *roles_of(status, row.id, "held_out")]
    return f"{row.id} ({', '.join(descriptions)})" if descriptions else row.id


def score(model: str, path: Path, overrides: Sequence[str], split: Split, *, as_json: bool) -> None:
    """Score a model, also with adapters, on the objectives and constraints of a search file; its screen is left out."""
    file = load_search_file(path, overrides)
    check_reference(model, "MODEL")
    check_early(file)
    with opening(quiet=as_json):
        from evomerge.checkpoints.checks import check_finite
        from evomerge.checkpoints.config import first_line
        from evomerge.checkpoints.plain import plain_model
        from evomerge.checkpoints.source import open_source
        from evomerge.commands.rescoring import scored
        from evomerge.inference.reading import Reader
        from evomerge.merging.measured.change import change_of
        from evomerge.search.preparing.asking import item_warnings
        from evomerge.search.preparing.prepare import prepare
        from evomerge.search.workers.building import computing

        prepared = prepare(file, tries=True)
        source = open_source("model", model, place="MODEL")
        check_finite(source)
        live = plain_model(source, *computing(file))
        if file.base is not None:
            live.change = change_of(live, source, prepared.sources[file.base])
    setup = prepared.setup
    for warning in item_warnings(prepared.named_evaluators, Reader.of(live)):
        print(f"warning: {warning}", file=sys.stderr)
    try:
        values = scored(live, prepared, split)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of a model with odd settings, a tokenizer's panic, or code that a task names
        raise InputError("MODEL", f"{model} cannot be scored ({first_line(error)})") from error
    if as_json:
        scores = {
            "objectives": {o.name: values[o.name].model_dump() for o in setup.objectives},
            "constraints": {c.name: values[c.name].model_dump() for c in setup.constraints},
            "features": {f.name: values[f.name].model_dump() for f in setup.features},
        }
        print(
            json.dumps(
                without_nan({"model": model, "split": split, **scores, "feasible": setup.violation(values) == 0.0}),
                indent=2,
            )
        )
        return
    table = Table(box=None, pad_edge=False)
    for title in ("objective", "score", "items"):
        table.add_column(title)
    for objective in setup.objectives:
        value = values[objective.name]
        table.add_row(objective.name, cell(value), f"{value.n} {split}")
    for constraint in setup.constraints:
        value = values[constraint.name]
        limit = Constraint(threshold=constraint.threshold, at_least=constraint.maximise)
        kept = "kept" if limit.is_kept(value) else "missed"
        table.add_row(f"{constraint.name} {limit.text}", f"{cell(value)}, {kept}", f"{value.n} {split}")
    for feature in setup.features:
        value = values[feature.name]
        table.add_row(feature.name, cell(value), f"{value.n} {split}")
    make_console().print(table)
