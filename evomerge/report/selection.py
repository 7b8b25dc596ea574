"""The selection among many sources for people: a table of all sources, and conclusions from their averages."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.search.estimation.preference import KNEE
from evomerge.store import Estimate, Store
from evomerge.store.events import Chosen, Compared, Selected, Winner, WinnerControlled

_FATES = {
    "base": "the base",
    "kept": "searched",
    "rest": "in the average of the rest",
    "dropped": "left out",
    "worse": "worse than the base or others",
}


class SelectionRow(BaseModel):
    """A source for people: its mean and error by objective, and the outcome in words.

    ``gain`` is what it solves in addition to those before it, ``change`` the norm of its change, relative to the base.
    """

    name: str
    place: int | None
    means: dict[str, str]
    items: int
    gain: str
    change: str
    fate: str


class Selection(BaseModel):
    """The selection among sources, with explanatory sentences."""

    objectives: list[str]
    rows: list[SelectionRow]
    sentences: list[str]


def selection_of(store: Store) -> Selection | None:
    """The selection at the beginning of a search; None if there was none."""
    events = store.events(kinds=(Selected.kind,), newest=1)
    if not events:
        return None
    controls = store.events(kinds=(WinnerControlled.kind,), newest=1)
    return as_shown(events[-1].read(Selected), controls[-1].read(WinnerControlled) if controls else None)


def as_shown(selected: Selected, control: WinnerControlled | None = None) -> Selection:
    """A recorded selection, and the control of the search's winner, for people."""
    objectives = list(dict.fromkeys(name for source in selected.sources for name in source.estimates))
    rows = [
        SelectionRow(
            name=source.name,
            place=source.place,
            means={name: _mean(estimate) for name, estimate in source.estimates.items()},
            items=source.items,
            gain="" if source.gain is None else f"{source.gain:+.3f} ± {source.error or 0.0:.3f}",
            change=_change(source.norm, source.scale),
            fate=_FATES[source.fate],
        )
        for source in selected.sources
    ]
    said = [] if control is None else [control_sentence(control)]
    return Selection(objectives=objectives, rows=rows, sentences=[*_sentences(selected), *said])


def _sentences(selected: Selected) -> Iterator[str]:
    share = selected.scored / selected.full
    yield (
        f"{selected.scored:,} items were scored: {share:.1%} of what scoring every source in full would take, "
        "averages and control included."
    )
    if (others := selected.others) is not None:
        yield (
            "Control of the choice: in an average beside the first source, the others that are searched are worth "
            f"{_worth(others)} random directions of the same lengths in their places: {_signed(others)} in the mean of "
            "the objectives."
        )
    if (rest := selected.rest) is not None:
        yield f"The average of the rest, beside those that are searched, changes their average by {_signed(rest)}."


def uncontrolled_winner(store: Store) -> int | None:
    """The winner, or the knee, of a search that selected its sources, while its control is not scored."""
    winners = store.events(kinds=(Winner.kind, Chosen.kind), newest=1)
    if not winners or not store.events(kinds=(Selected.kind,), newest=1):
        return None
    (last,) = winners
    number = last.read(Winner).candidate if last.kind == Winner.kind else last.read(Chosen).chosen.get(KNEE)
    controls = store.events(kinds=(WinnerControlled.kind,))
    return None if any(event.read(WinnerControlled).candidate == number for event in controls) else number


def control_sentence(control: WinnerControlled) -> str:
    """The result of the control at the winner's own weights."""
    if control.better is None:
        return f"Control of the winner: none, c{control.candidate:04d} is no mix of several of the sources."
    *some, last = control.replaced
    others = f"{', '.join(some)} and {last} are" if some else f"{last} is"
    return (
        f"Control of the winner: at the weights of c{control.candidate:04d} and beside {control.kept}, {others} worth "
        f"{_worth(control.better)} random directions of the same lengths: {_signed(control.better)} in the mean of the "
        "objectives, on the held-out split."
    )


def _worth(compared: Compared) -> str:
    return "more than" if compared.low > 0 else "less than" if compared.high < 0 else "not surely more than"


def _mean(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.stderr or 0.0:.2f}"


def _change(norm: float | None, scale: float) -> str:
    return "" if norm is None else f"{norm:.3f}" + (f", times {scale:.2f}" if scale < 1.0 else "")


def _signed(compared: Compared) -> str:
    return f"{compared.mean:+.3f} [{compared.low:+.3f}, {compared.high:+.3f}]"


def selection_tables(selection: Selection) -> Iterator[RenderableType]:
    """The selection for a terminal."""
    table = Table("", "source", box=None, pad_edge=False)
    for name in selection.objectives:
        table.add_column(name, no_wrap=False)
    for name in ("items", "gain", "change", ""):
        table.add_column(name, justify="right" if name == "items" else "left")
    for row in selection.rows:
        means = (row.means.get(name, "") for name in selection.objectives)
        place = "" if row.place is None else str(row.place)
        table.add_row(place, row.name, *means, str(row.items), row.gain, row.change, row.fate)
    yield table
    for sentence in selection.sentences:
        yield Text(sentence)
