"""The results store: everything that a search asked for, dispatched, measured and told its optimizer."""

from evomerge.store.fence import LeaseLostError
from evomerge.store.lease import Lease, acquire, current_holder
from evomerge.store.listing import ListedSearch, searches
from evomerge.store.record import SearchRecord
from evomerge.store.rows import (
    Answers,
    CandidateRow,
    Estimate,
    EventRow,
    ItemTexts,
    NewCandidate,
    Niches,
    OptimizerStep,
    RaceEnd,
    Scores,
    SearchRow,
    Verb,
)
from evomerge.store.store import Store

__all__ = [
    "Answers",
    "CandidateRow",
    "Estimate",
    "EventRow",
    "ItemTexts",
    "Lease",
    "LeaseLostError",
    "ListedSearch",
    "NewCandidate",
    "Niches",
    "OptimizerStep",
    "RaceEnd",
    "Scores",
    "SearchRecord",
    "SearchRow",
    "Store",
    "Verb",
    "acquire",
    "current_holder",
    "searches",
]
