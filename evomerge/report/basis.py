"""The basis of the scores of an unconfirmed candidate."""

from __future__ import annotations

from evomerge.report.entries import Entry, value_text
from evomerge.report.search_status import SearchStatus
from evomerge.store import CandidateRow, Store


def unconfirmed_text(store: Store, row: CandidateRow, status: SearchStatus) -> str:
    """A sentence about the number of items behind each score of a candidate; empty if it has held-out scores."""
    return "" if store.scores(row.number, "held_out") else basis_text(status.entry(row, store.search().record), status)


def basis_text(shown: Entry, status: SearchStatus) -> str:
    """The same for a candidate without held-out scores, from its entry on the search split."""
    values = {name: value for name in status.measures if (value := shown.value(name)) is not None}
    scores = [_score(name, value_text(value), value.n, status.wanted_of(name)) for name, value in values.items()]
    estimated = any(value.n < status.wanted_of(name) for name, value in values.items())
    return (
        f"{shown.id} was never scored on held-out items. On items of the search, by which it was chosen, "
        f"{'; '.join(scores)}.{_rest(status) if estimated else ''}"
    )


def _score(name: str, text: str, items: int, wanted: int) -> str:
    how_many = f"all {items:,} items" if items >= wanted else f"{items:,} of {wanted:,} items"
    return f"its {name} {text} rests on {how_many}"


def _rest(status: SearchStatus) -> str:
    """How scores of the other items are estimated."""
    by = "the best baseline's scores"
    if status.racing is not None and status.racing.estimate == "item_response":
        by = "item response"
    return f" What it would score on the others is estimated by {by}."
