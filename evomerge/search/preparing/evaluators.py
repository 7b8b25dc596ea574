"""The evaluators of a search file, opened once for all measures that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evaluators.base import Evaluator, EvaluatorSettings, Item
from evaluators.benchmarks import count
from evaluators.lengths import counted
from evomerge.errors import InputError
from evomerge.plugins import unknown_name
from evomerge.search.settings.search_file import SearchFile


class Resolved(NamedTuple):
    """The position of a measure's evaluator, the better direction of its metric, and its number of items."""

    evaluator: int
    higher_is_better: bool
    items: int


@dataclass(frozen=True)
class Evaluators:
    """The evaluators of a search file, each once, in the order that jobs refer to them.

    Attributes:
        wanted: the settings of each measure's evaluator, by the measure's place in the file.
        settings: the different ones among them.
        opened: the evaluator of each of those.
    """

    wanted: Mapping[str, EvaluatorSettings]
    settings: tuple[EvaluatorSettings, ...]
    opened: tuple[Evaluator, ...]

    @classmethod
    def open(cls, file: SearchFile, *, tries: bool = False) -> Evaluators:
        """Open everything that a search file names.

        Args:
            tries: whether to try what they do without a model.

        Raises:
            InputError: naming the first measure whose evaluator cannot be opened.
        """
        wanted = file.evaluators()
        settings = distinct(wanted)
        return cls(wanted, settings, tuple(_build(_first_place(wanted, s), s, tries) for s in settings))

    @property
    def named(self) -> dict[str, Evaluator]:
        """Each evaluator by the first place in the search file that names it."""
        return {
            _first_place(self.wanted, s): evaluator for s, evaluator in zip(self.settings, self.opened, strict=True)
        }

    def resolve(self, file: SearchFile, place: str) -> Resolved:
        """Resolve a measure.

        Raises:
            InputError: its evaluator has no such metric, or not enough items.
        """
        measure, position = file.measures[place], self.settings.index(self.wanted[place])
        evaluator = self.opened[position]
        if measure.metric not in evaluator.metrics:
            raise unknown_name(measure.metric, evaluator.metrics, f"{place}.metric", "metric")
        items = len(evaluator.items("search"))
        if measure.items is not None and measure.items > items:
            problem = f"asks for {measure.items} of {items} items in the search split"
            raise InputError(f"{place}.items", problem, "Lower it, or add items.")
        return Resolved(position, evaluator.metrics[measure.metric], measure.items or items)

    def refuse_test_items(self) -> None:
        """Refuse to search on test items of a public benchmark without consent: its scores there become worthless.

        Raises:
            InputError: naming the first measure that uses some.
        """
        for place, wanted in self.wanted.items():
            refuse_test_items(place, self.opened[self.settings.index(wanted)].items("search"))


def refuse_test_items(place: str, items: Sequence[Item]) -> None:
    """Refuse items that are test items of a public benchmark. Raises InputError: naming ``place``."""
    for benchmark, known in count(item.benchmark for item in items).items():
        raise InputError(
            place,
            f"{known} of the {len(items)} items to search on are test items of {benchmark}",
            "Search on other items, or set `search_on_test_items: true` and no longer report that benchmark.",
        )


def distinct(wanted: Mapping[str, EvaluatorSettings]) -> tuple[EvaluatorSettings, ...]:
    """The different settings, in the order in which jobs refer to their evaluators."""
    unique: list[EvaluatorSettings] = []
    for settings in wanted.values():
        if settings not in unique:
            unique.append(settings)
    return tuple(unique)


def _first_place(wanted: Mapping[str, EvaluatorSettings], settings: EvaluatorSettings) -> str:
    return next(place for place, other in wanted.items() if other == settings)


def _build(place: str, settings: EvaluatorSettings, tries: bool) -> Evaluator:
    """Build an evaluator; errors name the first measure that uses it."""
    try:
        evaluator: object = settings.build_and_try() if tries else settings.build()
        if not isinstance(evaluator, Evaluator):  # from a package, which may be older than this contract
            problem = f"{type(evaluator).__name__} is not an evaluator"
            hint = "Derive it from evaluators.base.Evaluator, or from ImperativeEvaluator: docs/extend.md says how."
            raise InputError("evaluator", problem, hint)
        return counted(settings, evaluator)
    except InputError as error:
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from error
    except (SystemExit, GeneratorExit) as error:  # from code that a task names
        problem = f"its code ends the program ({type(error).__name__}: {error})"
        raise InputError(place, problem, "It may only raise exceptions derived from Exception.") from error
