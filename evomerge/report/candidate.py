"""One candidate as shown to people: its scores on either split, and the outcome of its race."""

from __future__ import annotations

from collections.abc import Iterator

from evomerge.report.entries import ConfirmedEntry, Entry, gap_text, percent
from evomerge.report.screen import cell, choice_text, p_text
from evomerge.report.search_status import SearchStatus
from evomerge.store import CandidateRow, SearchRecord


def is_screened_out(row: CandidateRow, status: SearchStatus) -> bool:
    """Whether the screen rejected a candidate, so that it was never scored on the objectives."""
    return row.status == "eliminated" and not any(name in row.objectives for name in status.directions)


def status_text(row: CandidateRow, status: SearchStatus) -> str:
    """A candidate's status, and what eliminated it if it was eliminated."""
    if row.status != "eliminated":
        return row.status
    return f"eliminated by {'screen' if is_screened_out(row, status) else 'race'}"


def score_lines(row: CandidateRow, record: SearchRecord, status: SearchStatus) -> Iterator[str]:
    """Lines about the outcome of a candidate and its scores on either split."""
    name = row.id
    if fate := _fate(row, status):
        yield fate
    yield from _values(status.entry(row, record), status, "search")
    if row.elite:
        yield "the best of its niche" if len(status.directions) == 1 else "on the front of its niche"
    if row.change is not None:
        yield f"change: {percent(row.change)} of the base, norm(W - W0) / norm(W0) over all weights"
    if (confirmed := status.confirmed_entry(name)) is not None:
        yield from _values(confirmed, status, "held-out")
    if name in {confirmed.id for confirmed in status.confirmed}:
        yield from choice_text(status)


def _fate(row: CandidateRow, status: SearchStatus) -> str:
    """Why a candidate was not scored on every item; empty if it was."""
    if is_screened_out(row, status) and status.screen is not None:
        value = row.objectives["screen"]
        return (
            f"eliminated by the screen: among the poorest of its generation in {status.screen.metric} "
            f"({cell(value)} on {value.n} items), so it was not scored on the objectives"
        )
    few = [name for name, wanted in status.wanted.items() if name in row.objectives and row.objectives[name].n < wanted]
    scored = ", ".join(f"{row.objectives[name].n} of {status.wanted[name]} items of {name}" for name in few)
    if row.status == "eliminated":
        who = "others of its generation or of its niche" if status.features else "too many others of its generation"
        return f"eliminated by its race after {scored}: {who} are surely better"
    return f"its race ended after {scored}; nothing more hung on it" if few else ""


def _values(shown: Entry, status: SearchStatus, split: str) -> Iterator[str]:
    for name in status.measures:
        value = shown.value(name)
        if value is None:
            continue
        title, mark = name, ""
        if (limit := status.constraints.get(name)) is not None:
            title, mark = f"{name} {limit.text}", ", kept" if limit.is_kept(value) else ", missed"
        if name in status.features:
            mark = f", {status.features[name].text(value.mean)}"
        estimated = split == "search" and value.n < status.wanted_of(name)
        text = f"~{cell(value)} estimated from" if estimated else f"{cell(value)} on"
        yield f"{title}: {text} {value.n} {split} items{mark}"
        for gap in shown.gaps(name) if isinstance(shown, ConfirmedEntry) else ():
            yield f"  {gap_text(gap)} over {gap.to}" + (f", p {p_text(gap.p)}" if gap.p is not None else "")
