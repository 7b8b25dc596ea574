"""The items that numbers of a search's models are fitted to: a third split, which no candidate is scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from evaluators.base import Evaluator, Item, Split
from evaluators.item_files import digest
from evaluators.likelihood import LikelihoodEvaluator, LikelihoodSettings
from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.search.settings.sections import FitItems

PLACE = "fit"

_VERSION = "fit 2"
"""The version of the procedure that makes steps and a loss of items (``search/workers/fitting.py``)."""

_SPLITS: Mapping[Split, str] = {"search": "search", "held_out": "held-out"}


def likelihood_settings(section: FitItems) -> LikelihoodSettings:
    """The settings of the evaluator that makes prompts and answers of items.

    Raises:
        InputError: the section names another evaluator, or has a key or value that the evaluator does not know.
    """
    if section.evaluator != "likelihood":
        problem = f"asks {section.evaluator}, and only the likelihood of answers has a gradient"
        raise InputError(f"{PLACE}.evaluator", problem, "Take `evaluator: likelihood`, or leave it out.")
    keys = section.evaluator_keys
    for key in ("held_out_file", "held_out"):
        if key in keys:
            problem = "makes no sense here: the fit uses all items, and nothing is confirmed on them"
            raise InputError(f"{PLACE}.{key}", problem, "Leave it out; `items` says how many of the file count.")
    try:
        return LikelihoodSettings.model_validate(keys)
    except ValidationError as error:
        raise explain(error, PLACE, LikelihoodSettings, keys, ".") from None


@dataclass(frozen=True)
class FitSplit:
    """The items of a fit, read when they are first needed.

    With a known digest, they are read only if evidence from them is missing.

    Attributes:
        section: ``fit`` of the search file.
        seed: decides which items each step draws.
        known_digest: the digest that a search has recorded, which the items must have.
    """

    section: FitItems
    seed: int
    known_digest: str | None = None

    @cached_property
    def evaluator(self) -> LikelihoodEvaluator:
        """All items of the file, as its search split; those that are used come first.

        Raises:
            InputError: they cannot be read, are too few, or are not those of the known digest.
        """
        evaluator = likelihood_settings(self.section).build_whole()
        if (wanted := self.section.items) is not None and wanted > (found := len(evaluator.items("search"))):
            raise InputError(f"{PLACE}.items", f"asks for {wanted} of {found} items", "Lower it, or add items.")
        items = evaluator.items("search")[:wanted]
        without = [item for item in items if not item.group]
        if without and len(without) < len(items):
            raise InputError(
                without[0].place, "has no `group`, and other items have one", "Give one to all, or to none."
            )
        if self.known_digest not in (None, self._digest_of(evaluator)):
            problem = f"these are not the items with the digest {self.known_digest}, which the search began with"
            raise InputError(PLACE, problem, "Put them back.")
        return evaluator

    @property
    def items(self) -> Sequence[Item]:
        """The items that are used."""
        return self.evaluator.items("search")[: self.section.items]

    @property
    def count(self) -> int:
        """How many items are used."""
        return self.section.items or len(self.items)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """For each item the index of its group among the sorted names of all groups; empty if there are no groups."""
        items = self.evaluator.items("search")[: self.count]
        names = sorted({item.group for item in items})
        return () if names == [""] else tuple(names.index(item.group) for item in items)

    @property
    def digest(self) -> str:
        """16 hex digits of everything that determines a fit. Raises InputError: as ``evaluator``."""
        return self.known_digest or self._digest_of(self.evaluator)

    def _digest_of(self, evaluator: LikelihoodEvaluator) -> str:
        numbers = [self.section.items, self.section.drawn, self.section.steps, self.section.rate, self.seed]
        groups = [item.group for item in evaluator.items("search")]
        return digest([_VERSION, evaluator.version, *numbers, *(groups if any(groups) else ())])

    def refuse_shared(self, evaluators: Mapping[str, Evaluator]) -> None:
        """Refuse items that candidates are also scored or confirmed on: after a fit, their scores would mean nothing.

        Items are the same if they ask the same question, whatever the answer.

        Args:
            evaluators: of the search, by the first place in the search file that names each.

        Raises:
            InputError: naming the first shared item and its place.
        """
        ours = {_asks(item): item for item in reversed(self.items)}
        for place, evaluator in evaluators.items():
            for split, name in _SPLITS.items():
                shared = [ours[asks] for item in evaluator.items(split) if (asks := _asks(item)) in ours]
                if shared:
                    more = f", with {len(shared) - 1} more" if len(shared) > 1 else ""
                    problem = f"{shared[0].place} is an item of the {name} split of {place} too{more}"
                    raise InputError(PLACE, problem, "Fit to items that are in neither split of any evaluator.")


def _asks(item: Item) -> str:
    """What identifies an item: its question; for a text without a prompt, the text; otherwise its id."""
    return item.question.strip() or item.answer.strip() or item.id
