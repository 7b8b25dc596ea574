"""The commands that run a search: validate, search, resume, confirm.

Input errors are detected first, with light imports only: the file, its keys, the target folder.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from evomerge.commands.copying import Copying
from evomerge.commands.failing import failure_code, recorded
from evomerge.commands.streams import output_is_optional
from evomerge.commands.waiting import opening
from evomerge.errors import InputError
from evomerge.objects import Storage, is_url
from evomerge.search.opening.artifacts import fetch
from evomerge.search.opening.claim import Claim
from evomerge.search.settings.early import changed_since, check_early, check_start
from evomerge.search.settings.folder import open_store, refuse_existing
from evomerge.search.settings.rebudget import bounds_of, change_budget
from evomerge.search.settings.resuming import resumed_file
from evomerge.search.settings.search_file import SearchFile, load_search_file
from evomerge.search.settings.sections import Select
from evomerge.store import Store, acquire, current_holder


def validate(path: Path, overrides: Sequence[str], *, show_prompt: bool = False, as_json: bool = False) -> None:
    """Open and check everything that a search file names, print the plan, and optionally a prompt of each measure."""
    file = load_search_file(path, overrides)
    check_early(file)
    check_start(file)
    with opening():
        from evomerge.commands.driving import open_all
        from evomerge.report.consoles import make_console
        from evomerge.report.plan import expected, plan, plan_rows

        prepared = open_all(file)
    if as_json:
        rows = [{"key": key, "text": text} for key, text in plan_rows(prepared)]
        content = {"name": file.name, "rows": rows, "outlook": expected(prepared).model_dump()}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    console = make_console()
    console.print(plan(prepared))
    if show_prompt:
        from evomerge.report.prompts import prompt_lines
        from evomerge.search.preparing.asking import shown_prompts

        silent = dict.fromkeys(prepared.named_evaluators)
        for shown in shown_prompts(prepared.named_evaluators, prepared.reader()):
            silent.pop(shown.place, None)
            console.print("", *prompt_lines(shown), sep="\n")
        for place in silent:
            console.print("", f"{place}: its prompts, if any, are known only as it runs", sep="\n")
    console.print("valid", style="green")


def select(path: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    """Select among the sources of a search file and print them; returns the exit code. Temporary files are removed."""
    file = load_search_file(path, overrides)
    if file.select is None:
        file = file.model_copy(update={"select": Select()})
    file = file.model_copy(update={"store": None, "observers": (), "artifacts": None})
    check_early(file)
    with opening():
        from evomerge.commands.driving import INTERRUPTED, drive_selection, open_all
        from evomerge.report.consoles import make_console
        from evomerge.report.selection import selection_of, selection_tables

        prepared = open_all(file)
    with tempfile.TemporaryDirectory(prefix="evomerge-select-") as above:
        folder = Path(above) / file.name
        if not drive_selection(folder, prepared, Console(stderr=True)):
            return INTERRUPTED
        with open_store(folder) as store:
            selection = selection_of(store)
    assert selection is not None  # it was just recorded
    if as_json:
        print(selection.model_dump_json(indent=2))
    else:
        make_console().print(*selection_tables(selection), sep="\n")
    return 0


def search(path: Path, folder: Path | None, overrides: Sequence[str]) -> int:
    """Start a search; returns the exit code."""
    file = load_search_file(path, overrides)
    folder = folder or Path("searches") / file.name
    refuse_existing(folder)
    check_early(file)
    check_start(file)
    with opening():
        from evomerge.commands.driving import drive_new, open_all
        from evomerge.report.consoles import make_console
        from evomerge.report.plan import plan

        prepared = open_all(file, folder)
    console = make_console()
    with output_is_optional():
        console.print(plan(prepared))
        return drive_new(folder, prepared, console)


def resume(place: str | Path, overrides: Sequence[str], into: Path | None = None) -> int:
    """Resume a search; returns the exit code. If a driver is running, change its budget or end its pause instead.

    Args:
        place: the search's folder, or the URL of its copy in object storage, which is downloaded first.
        into: with a URL, the folder to create.
    """
    from evomerge.report.consoles import make_console

    console = make_console()
    folder = _local(str(place), into, console)
    with Copying(folder, console) as copying, open_store(folder) as store:
        if current_holder(store) is not None and (overrides or store.search().state == "paused"):
            _tell_driver(folder, store, overrides, console)
            return 0
        with acquire(store):  # first, so that a second driver is refused before it does any work
            file = resumed_file(folder, store, overrides)
            if _is_at_its_end(store, file):
                from evomerge.report.screen import panel
                from evomerge.report.status import status_of

                console.print(panel(status_of(store)))
                bound = next(iter(file.budget.model_dump(exclude_none=True)), "candidates")
                more = f"evomerge resume {shlex.quote(str(folder))} --set budget.{bound}=N"
                console.print(
                    f"nothing to do: it is finished and confirmed; to continue with more: {more}", soft_wrap=True
                )
                return failure_code(store)
            check_early(file)
            with recorded(store):
                with opening():
                    from evomerge.commands.driving import drive_resumed, reopen

                    prepared = reopen(folder, store, file)
                with output_is_optional():
                    code = drive_resumed(folder, prepared, store, copying, console)
    return copying.exit_code(code)


def _is_at_its_end(store: Store, file: SearchFile) -> bool:
    """Whether resuming a search with ``file`` would do nothing."""
    search = store.search()
    is_as_recorded = file.model_dump(mode="json") == search.settings
    return search.state == "finished" and is_as_recorded and _has_nothing_to_confirm(store, file)


def _has_nothing_to_confirm(store: Store, file: SearchFile) -> bool:
    from evomerge.report.selection import uncontrolled_winner
    from evomerge.search.driving.confirm import is_confirmed
    from evomerge.search.estimation.preference import Preference

    if file.artifacts is not None:  # some files may not have been copied yet
        return False
    search = store.search()
    versions = {measure.version for measure in search.record.measures}
    if not is_confirmed(store, file.confirm, Preference.of_search(search), versions):
        return False
    if uncontrolled_winner(store) is not None:
        return False
    (last,) = store.events(kinds=("winner", "confirmed"), newest=1)
    return not changed_since(file, last.time)  # otherwise the confirmation checks the evaluators


def _tell_driver(folder: Path, store: Store, overrides: Sequence[str], console: Console) -> None:
    """Change the budget of a running driver, and end its pause if it is paused."""
    bounds = bounds_of(overrides, "While a driver is running, only its budget can be changed; stop it first.")
    if bounds:
        change_budget(folder, store, bounds)
        store.request_command("reread")
        console.print(f"changed the budget of the driver of {folder}")
    if store.search().state == "paused":
        store.request_command("resume")
        console.print(f"told the driver of {folder} to continue")


def _local(place: str, into: Path | None, console: Console) -> Path:
    """The folder of a search. If ``place`` is the URL of its copy, download it unless that was done before."""
    if not is_url(place):
        if into is not None:
            raise InputError("--dir", "is where to put a search that is named by a URL", "Leave it out.")
        return Path(place)
    storage = Storage(place, "DIR")
    folder = into or Path("searches") / storage.name
    if not Claim(storage, folder).is_ours():
        refuse_existing(folder)
        fetch(place, folder)
        console.print(f"fetched into {folder}", style="dim")
    return folder


def confirm(folder: Path) -> int:
    """Score the front and the best on the held-out split; returns the exit code."""
    from evomerge.report.consoles import make_console
    from evomerge.report.screen import panel
    from evomerge.report.status import status_of

    console = make_console()
    with Copying(folder, console) as copying, open_store(folder) as store, acquire(store):
        file = resumed_file(folder, store, ())
        if not any(row.status == "done" for row in store.candidates(step=0)):
            hint = f"Go on with the search: evomerge resume {shlex.quote(str(folder))}"
            raise InputError(str(folder), "nothing is scored yet that could be confirmed", hint)
        if _has_nothing_to_confirm(store, file):
            console.print(panel(status_of(store)))
            console.print("nothing to confirm: all that would be scored has held-out scores", soft_wrap=True)
            return 0
        check_early(file)
        with recorded(store):
            with opening():
                from evomerge.commands.driving import drive_confirmation, reopen

                prepared = reopen(folder, store, file)
            with output_is_optional():
                code = drive_confirmation(folder, prepared, store, copying, console)
    return copying.exit_code(code)


def team(folder: Path, members: int, *, as_json: bool) -> int:
    """Choose a team, score it on the held-out split, and print what it covers; returns the exit code."""
    from evomerge.report.consoles import make_console
    from evomerge.report.team import choose_team, team_of, team_tables

    console = make_console()
    screen = Console(stderr=True) if as_json else console  # a program may be reading stdout
    with Copying(folder, screen) as copying, open_store(folder) as store, acquire(store):
        file = resumed_file(folder, store, ())
        choice = choose_team(store, members)  # fails before anything is opened
        check_early(file)
        with opening():
            from evomerge.commands.driving import INTERRUPTED, drive_team, reopen

            prepared = reopen(folder, store, file)
        with output_is_optional():
            if not drive_team(folder, prepared, store, copying, screen, choice):
                return INTERRUPTED
        chosen = team_of(store)
    if chosen is None:
        raise InputError(str(folder), "a member of the team could not be scored", "`evomerge show` says why.")
    if as_json:
        print(chosen.model_dump_json(indent=2))
        return copying.exit_code(0)
    for table in team_tables(chosen):
        console.print(table)
    console.print(
        f"of {chosen.items:,} held-out items {chosen.coverage:.1%} are solved by at least one member, "
        f"{chosen.majority:.1%} by more than half"
    )
    return copying.exit_code(0)
