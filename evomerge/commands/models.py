"""The commands that write or score one model of a search: export, score.

Input errors are detected first, with light imports only.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from evaluators.base import Split
from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target
from evomerge.commands.waiting import opening
from evomerge.errors import InputError
from evomerge.merging.building.delivery import check_free
from evomerge.objects import Storage, is_url
from evomerge.printable import without_nan
from evomerge.report.conclusions import roles_of
from evomerge.report.consoles import make_console
from evomerge.report.entries import Constraint, kind_of, origin_of
from evomerge.report.naming import exported
from evomerge.report.screen import cell
from evomerge.report.search_status import SearchStatus
from evomerge.report.serving import say
from evomerge.report.status import status_of
from evomerge.search.settings.early import check_early
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.resuming import resumed_file
from evomerge.search.settings.search_file import load_search_file
from evomerge.store import CandidateRow, Store

if TYPE_CHECKING:
    from evomerge.commands.exporting import Written
    from evomerge.report.team import Team


def export(
    folder: Path, out: str | Path, candidate: str, *, verify: bool, form: str | None = None, said: str | None = None
) -> None:
    """Write a candidate of a search as a model folder, and verify that it scores as recorded.

    ``out`` is a folder, or a URL: then the model is written and verified in a temporary folder, and uploaded. ``form``
    is one of the forms of its kind of recipe. If the written model differs from the scored one, its own scores are
    shown next to the recorded ones. ``said`` is printed instead of ``out`` if the folder is temporary.
    """
    with open_store(folder) as store:
        rows = {str(out): store.candidate(exported(store, candidate))}
        _export(folder, store, rows, verify=verify, form=form, said=said)


def export_team(folder: Path, out: str | Path, *, verify: bool) -> None:
    """Write each member of the latest team, as ``export`` does, into a folder in ``out`` that is named by its id.

    Raises:
        InputError: there is no team with scored members.
    """
    from evomerge.report.team import team_of

    with open_store(folder) as store:
        team = team_of(store)
        if team is None:
            hint = f"Choose one: evomerge team {shlex.quote(str(folder))} -k 3"
            raise InputError("--team", "the search has no team that is scored on held-out items", hint)
        above = str(out).rstrip("/")
        rows = {f"{above}/{member.id}": store.candidate(member.number) for member in team.members}
        _export(folder, store, rows, verify=verify, team=team)


def _export(
    folder: Path,
    store: Store,
    rows: Mapping[str, CandidateRow],
    *,
    verify: bool,
    form: str | None = None,
    said: str | None = None,
    team: Team | None = None,
) -> None:
    """Write candidates by target, with the place to print in ``said``; ``team`` is the team that they belong to."""
    console = make_console()
    for out, row in rows.items():
        if row.status not in ("done", "eliminated", "cached"):
            raise InputError(row.id, f"is {row.status}: it has no scores", "`evomerge top` lists those with.")
        if is_url(out):
            check_free(Storage(out, "OUT"))
        else:
            check_target(Path(out))
    file = resumed_file(folder, store, ())
    if verify:
        check_early(file)
    with opening():
        from evomerge.commands.exporting import Exporter
        from evomerge.search.opening.session import as_recorded, check_sources
        from evomerge.search.preparing.prepare import open_sources, prepare

        # Without verification, no items are needed.
        prepared = as_recorded(store, prepare(file)) if verify else None
        sources = open_sources(file) if prepared is None else prepared.sources
        check_sources(store, sources)
    exporter = Exporter(folder, store, file, sources, prepared, status_of(store), console, team)
    for number, (out, row) in enumerate(rows.items()):
        try:
            written = exporter.write(row, out, form)
        except (InputError, KeyboardInterrupt):
            _say_left(folder, list(rows.items())[number + 1 :], verify=verify)
            raise
        unseen = "" if verify else ", not scored again"
        _say(console, written, f"exported {_called(row, exporter.status, file.sources)} to {said or out}{unseen}")
        if said is None and form is None:
            say(console, out)


def _say_left(folder: Path, left: Sequence[tuple[str, CandidateRow]], *, verify: bool) -> None:
    """Print how to export the members of a team that come after one that could not be exported."""
    for out, row in left:
        command = ["evomerge", "export", str(folder), out, "--candidate", row.id, *([] if verify else ["--no-verify"])]
        print(f"not exported yet: {shlex.join(command)}", file=sys.stderr)


def _say(console: Console, written: Written, done: str) -> None:
    """Print the result of an export."""
    if written.unlike:
        console.print(written.unlike, style="yellow", soft_wrap=True)
    for line in written.checked:
        console.print(line)
    console.print(done, style="bold")
    if written.unconfirmed:
        console.print(f"not confirmed: {written.unconfirmed}", style="yellow", soft_wrap=True)


def _called(row: CandidateRow, status: SearchStatus, sources: Collection[str]) -> str:
    """A candidate with its roles: c0042 (best)."""
    kind = [kind_of(origin_of(row, sources), row.label)] if row.label else []
    descriptions = [*kind, *roles_of(status, row.id, "held_out")]
    return f"{row.id} ({', '.join(descriptions)})" if descriptions else row.id


def score(model: str, path: Path, overrides: Sequence[str], split: Split, *, as_json: bool) -> None:
    """Score a model or adapter on the objectives and constraints of a search file, without its screen."""
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
    except BaseException as error:  # odd model settings, a panic in a tokenizer, or a task's own code
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
