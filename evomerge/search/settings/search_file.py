"""The search file, in which a user describes a search: parsed and checked before any model or data is opened."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from evaluators import evaluator_settings
from evaluators.base import MODEL, EvaluatorSettings
from evaluators.lengths import ANSWER_TOKENS, CountedSettings
from evomerge.errors import InputError
from evomerge.faults import explain, read_part
from evomerge.files import absolute_reference, read_text
from evomerge.objects import check_url
from evomerge.observers import ObserverList
from evomerge.optimizers import CmaSettings, OptimizerSettings
from evomerge.recipes.base import DType
from evomerge.search.settings.fitting import FitSplit, likelihood_settings
from evomerge.search.settings.folder import check_store_url
from evomerge.search.settings.sections import (
    Baselines,
    Budget,
    CalibrationTexts,
    Cluster,
    Confirm,
    Constraint,
    Feature,
    FitItems,
    Hours,
    KeptAnswers,
    Measure,
    Mode,
    Name,
    Objective,
    Proxy,
    Racing,
    Screen,
    Section,
    Select,
)
from evomerge.search.work.deadlines import MAX_S, MIN_S
from evomerge.vocabulary import Vocabulary
from evomerge.yaml import load_yaml
from search_spaces.base import SpaceSettings

_MAX_BYTES = 16_000_000  # of a search file
MAX_EARLIER = 6  # searches to start from: only a few candidates are taken from all of them together
MAX_FEATURES = 4  # with ten bins each, these make ten thousand niches
AnyMeasure = TypeVar("AnyMeasure", bound=Measure)


class SearchFile(Section):
    """A whole search file. Paths in it are relative to the file's own folder (``root``)."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    sources: dict[Name, str] = Field(min_length=2, max_length=256)
    base: str | None = None
    tokenizer: str | None = None
    vocabulary: Vocabulary = Vocabulary()
    dtype: DType | None = None
    space: SerializeAsAny[SpaceSettings]
    objectives: dict[Name, Objective] = Field(min_length=1)
    constraints: dict[Name, Constraint] = Field(default_factory=dict)
    compositions: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1)]] = Field(default_factory=dict)
    features: dict[Name, Feature] = Field(default_factory=dict, max_length=MAX_FEATURES)
    calibration: CalibrationTexts | None = None
    select: Select | None = None
    start_from: tuple[Path, ...] = Field(default=(), max_length=MAX_EARLIER)
    racing: Racing | None = None
    screen: Screen | None = None
    proxy: Proxy | None = None
    fit: FitItems | None = None
    optimizer: OptimizerSettings = Field(default_factory=lambda: CmaSettings(name="cma"))
    mode: Mode = "generational"
    budget: Budget
    baselines: Baselines = Baselines()
    confirm: Confirm = Confirm()
    pool: Literal["in_process", "ray"] = "in_process"
    cluster: Cluster = Cluster()
    device: str | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    together: int = Field(default=1, gt=0, le=1024)
    attempts: int = Field(default=2, gt=0, le=1000)
    attempt_hours: Hours = MAX_S / 3600
    task_folders: tuple[Path, ...] = ()
    data_folder: Path = Path()
    allow_task_code: bool = False
    search_on_test_items: bool = False
    answers: KeptAnswers = "all"
    store: str | None = None
    observers: ObserverList = ()
    artifacts: str | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _space_of_its_kind(cls, value: object) -> object:
        return read_part(value, "evomerge.search_spaces", "kind", "space", SpaceSettings, "parameter_space")

    @field_validator("start_from", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("attempt_hours")
    @classmethod
    def _long_enough(cls, hours: float) -> float:
        if hours * 3600 < MIN_S:
            raise ValueError(f"must be {MIN_S / 3600:.3g} or more: no attempt of less than a minute is ever ended")
        return hours

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for field in ("base", "tokenizer"):
            name = getattr(self, field)
            if name is not None and name not in self.sources:
                raise ValueError(f"{field}: there is no source {name!r}; the sources are {', '.join(self.sources)}")
        if both := sorted(set(self.objectives) & set(self.constraints)):
            raise ValueError(f"constraints: {both[0]} is the name of an objective already")
        if both := sorted(self.features.keys() & {*self.objectives, *self.constraints, "screen"}):
            raise ValueError(f"features: {both[0]} is the name of another measure already")
        for name, parts in self.compositions.items():
            if missing := [one for one in (name, *parts) if one not in self.objectives]:
                raise ValueError(f"compositions.{name}: there is no objective {missing[0]!r}")
            if name in parts or len(set(parts)) < len(parts):
                raise ValueError(f"compositions.{name}: needs other objectives as its parts, each once")
        if self.screen is not None and self.screen.objective not in (None, *self.objectives):
            raise ValueError(f"screen.objective: there is no objective {self.screen.objective!r}")
        if missing := sorted(self.vocabulary.used_sources() - set(self.sources)):
            raise ValueError(
                f"vocabulary: there is no source {missing[0]!r}; the sources are {', '.join(self.sources)}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_for_this_search(self) -> Self:
        """Choose the optimizer's start and the settings that depend on the budget, unless the file gives them."""
        tied = getattr(self.space, "granularity", None) == "adaptive"
        if tied and not self.optimizer.ties:
            name = self.optimizer.name
            raise ValueError(f"space.granularity: adaptive is for cma, which ties numbers, and not for {name}")
        optimizer = self.optimizer.within(self.budget.candidates, tied=tied)
        if self.start_from:
            optimizer = optimizer.warm()
        elif self.select is not None:  # the centre of a box of many weights is a merge that is much too strong
            optimizer = optimizer.at_gains()
        elif getattr(optimizer, "x0", None) == "gains":
            raise ValueError("optimizer.x0: gains are those of a choice of sources, and there is no `select`")
        return self.model_copy(update={"optimizer": optimizer})

    @model_validator(mode="after")
    def _proxy_has_generations(self) -> Self:
        if self.proxy is not None and self.mode != "generational":
            raise ValueError("proxy: proposes candidates with each generation, and an asynchronous search has none")
        return self

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> Self:
        if self.budget.cost is None or self.cluster.worker_hour is not None:
            return self
        if self.cluster.gpu_hour is None:
            raise ValueError(
                "budget.cost: needs a price: cluster.gpu_hour, or cluster.worker_hour where workers have no GPU"
            )
        on_processor = self.device == "cpu" and self.cluster.gpus_per_worker is None
        if self.cluster.gpus_per_worker == 0 or on_processor:
            raise ValueError("budget.cost: workers have no GPU, so cluster.gpu_hour costs nothing; give worker_hour")
        return self

    @property
    def tokenizer_source(self) -> str:
        """The source of tokenizer and configuration: the one that is named, otherwise the base, or the first source."""
        return self.tokenizer or self.base or next(iter(self.sources))

    @property
    def merged_vocabulary(self) -> Vocabulary:
        """The vocabulary of recipes: rows that a source lacks come from the base, unless another source is named."""
        if not self.vocabulary.aligns or self.vocabulary.base is not None or self.vocabulary.kind == "transplant":
            return self.vocabulary
        return self.vocabulary.model_copy(update={"base": self.base})

    @property
    def measures(self) -> dict[str, Measure]:
        """Everything that names an evaluator, by its place in the file; objectives come first."""
        by_place: dict[str, Measure] = {f"objectives.{name}": objective for name, objective in self.objectives.items()}
        by_place |= {f"constraints.{name}": constraint for name, constraint in self.constraints.items()}
        by_place |= {f"features.{name}": feature for name, feature in self.features.items()}
        others: dict[str, Measure | None] = {"screen": self.screen, "proxy": self.proxy}
        return by_place | {place: measure for place, measure in others.items() if measure is not None}

    @cached_property
    def fit_split(self) -> FitSplit | None:
        """The items that numbers are fitted to, read once, when they are first needed."""
        return self.recorded_fit(None)

    def recorded_fit(self, digest: str | None) -> FitSplit | None:
        """The items of a search that has recorded their digest: read only if evidence from them is missing."""
        return None if self.fit is None else FitSplit(self.fit, self.seed, digest)

    def evaluators(self) -> dict[str, EvaluatorSettings]:
        """The evaluator settings of each measure, by the measure's place; equal settings mean one evaluator."""
        by_place = {}
        for place, measure in self.measures.items():
            settings = evaluator_settings(measure.evaluator, f"{place}.evaluator")
            keys = measure.evaluator_keys
            shared = {
                "task_folders": self.task_folders, "data_folder": self.data_folder,
                "allow_task_code": self.allow_task_code,
            }  # fmt: skip
            keys |= {key: value for key, value in shared.items() if key in settings.model_fields}
            try:
                by_place[place] = settings.model_validate(keys)
            except ValidationError as error:
                raise explain(error, place, settings, keys, ".") from None
        counting = [by_place[place] for place, measure in self.measures.items() if measure.metric == ANSWER_TOKENS]
        return {
            place: settings.model_copy(update={"count_tokens": True})
            if settings in counting and isinstance(settings, CountedSettings)
            else settings
            for place, settings in by_place.items()
        }


def load_search_file(path: Path, overrides: Sequence[str] = ()) -> SearchFile:
    """Read a search file, apply ``key.path=value`` overrides (values are YAML), and make its paths absolute.

    Raises:
        InputError: a file that cannot be read, an unknown key or wrong value, named as ``FILE: key.path``.
    """
    if not path.exists():
        raise InputError(str(path), "there is no such file")
    content = load_yaml(read_text(path, str(path), _MAX_BYTES), str(path))
    if not isinstance(content, dict):
        raise InputError(str(path), "is not a search file: its top level must be keys such as `sources:` and `space:`")
    for override in overrides:
        apply_override(content, override)
    return parse_search_file(content, place=path.name, root=path.resolve().parent)


def read_settings(content: Mapping[str, Any], place: str) -> SearchFile:
    """A search file from its content, with paths as they are: relative, or those of a file that was parsed before.

    Raises:
        InputError: an unknown key or wrong value, named as ``place: key.path``.
    """
    try:
        return SearchFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, place, SearchFile, content) from None
    except InputError as error:  # of a part, whose own class has checked it
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from None


def parse_search_file(content: Mapping[str, Any], *, place: str, root: Path) -> SearchFile:
    """Check the content of a search file; relative paths in it are taken from ``root``."""
    _check_values(content, place, "")
    parsed = read_settings(content, place)
    if parsed.store is not None:
        check_store_url(parsed.store, f"{place}: store")
    if parsed.artifacts is not None:
        check_url(parsed.artifacts, f"{place}: artifacts")
    sources = {name: absolute_reference(reference, root) for name, reference in parsed.sources.items()}
    folders = tuple(Path(os.path.realpath(root / folder)) for folder in parsed.task_folders)
    update = {
        "sources": sources,
        "space": parsed.space.at(root.resolve()),
        "start_from": tuple(Path(os.path.realpath(root / os.path.expanduser(path))) for path in parsed.start_from),
        "task_folders": folders,
        "data_folder": Path(os.path.realpath(root / parsed.data_folder)),
        "objectives": {
            n: _at(root.resolve(), f"objectives.{n}", objective) for n, objective in parsed.objectives.items()
        },
        "constraints": {
            n: _at(root.resolve(), f"constraints.{n}", constraint) for n, constraint in parsed.constraints.items()
        },
        "features": {n: _at(root.resolve(), f"features.{n}", feature) for n, feature in parsed.features.items()},
        "screen": None if parsed.screen is None else _at(root.resolve(), "screen", parsed.screen),
        "proxy": None if parsed.proxy is None else _at(root.resolve(), "proxy", parsed.proxy),
        "fit": None if parsed.fit is None else _at(root.resolve(), "fit", parsed.fit),
    }
    if parsed.calibration is not None:
        update["calibration"] = parsed.calibration.at(root)
    resolved = parsed.model_copy(update=update)
    resolved.evaluators()
    if resolved.fit is not None:
        likelihood_settings(resolved.fit)
    return resolved


_MAX = 1e10
"""The largest absolute value of any number in a search file, including settings of plugins; none is infinite."""


def _check_values(value: Any, place: str, key: str) -> None:
    """Refuse values that no setting can have: null characters, infinite and very large numbers. Raises InputError."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_values(inner, place, f"{key}.{name}" if key else f": {name}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _check_values(inner, place, f"{key}.{position}")
    elif isinstance(value, str) and "\0" in value:
        raise InputError(f"{place}{key}", "holds a null character, which no name or text can hold")
    elif isinstance(value, int | float) and not abs(value) <= _MAX:
        shown = f"{value:.3g}" if isinstance(value, float) else f"a whole number of {len(str(value))} digits"
        raise InputError(f"{place}{key}", f"is {shown}; no number here is infinite or beyond {_MAX:.0e}")


def _at(root: Path, place: str, measure: AnyMeasure) -> AnyMeasure:
    """The measure with absolute paths in its evaluator's keys."""
    fields = evaluator_settings(measure.evaluator, f"{place}.evaluator").model_fields
    paths = {key for key in measure.evaluator_keys if key in fields and Path in _options(fields[key].annotation)}
    models = {
        key
        for key, given in measure.evaluator_keys.items()
        if key in fields and MODEL in fields[key].metadata and given is not None
    }
    absolute = {key: os.path.join(root, os.path.expanduser(str(measure.evaluator_keys[key]))) for key in paths}
    absolute |= {key: absolute_reference(str(measure.evaluator_keys[key]), root) for key in models}
    return type(measure).model_validate(measure.model_dump() | absolute) if absolute else measure


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    return get_args(annotation) or (annotation,)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one value of a search file's content: ``budget.candidates=40``, ``objectives.maths.items=200``."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override}", "is not of the form key.path=value")
    *path, last = key.strip().split(".")
    target: Any = content
    for part in path:
        target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise InputError(f"--set {override}", f"{part!r} is not a section of the search file")
    target[last] = load_yaml(text, f"--set {override}")
