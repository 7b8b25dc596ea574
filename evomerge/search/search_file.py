"""The search file: what a person writes to say what to search, parsed and checked before anything is opened."""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from evaluators import evaluator_settings
from evaluators.base import MODEL, EvaluatorSettings
from evomerge.errors import InputError
from evomerge.objects import check_url
from evomerge.observers import ObserverList
from evomerge.optimizers import CmaSettings, OptimizerSettings
from evomerge.plugins import unknown_name
from evomerge.recipe import DType
from evomerge.search.deadlines import LEAST_S, MOST_S
from evomerge.search.folder import check_store_url
from evomerge.search.sections import (
    NAME_PATTERN,
    Budget,
    Cluster,
    Confirm,
    Constraint,
    KeptAnswers,
    Measure,
    Mode,
    Name,
    Objective,
    Racing,
    Screen,
    Section,
)
from evomerge.vocabulary import Vocabulary
from evomerge.yaml import load_yaml
from search_spaces import space_settings
from search_spaces.base import SpaceSettings

AnyMeasure = TypeVar("AnyMeasure", bound=Measure)


class SearchFile(Section):
    """A whole search file. Paths in it are relative to the file's own folder (``root``)."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    sources: dict[Name, str] = Field(min_length=2)
    base: str | None = None
    tokenizer: str | None = None
    vocabulary: Vocabulary = Vocabulary()
    dtype: DType | None = None
    space: SerializeAsAny[SpaceSettings]
    objectives: dict[Name, Objective] = Field(min_length=1)
    constraints: dict[Name, Constraint] = Field(default_factory=dict)
    racing: Racing | None = None
    screen: Screen | None = None
    optimizer: OptimizerSettings = Field(default_factory=lambda: CmaSettings(name="cma"))
    mode: Mode = "generational"
    budget: Budget
    confirm: Confirm = Confirm()
    pool: Literal["in_process", "ray"] = "in_process"
    cluster: Cluster = Cluster()
    device: str | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    together: PositiveInt = 1
    attempts: PositiveInt = 2
    attempt_hours: float = Field(default=MOST_S / 3600, allow_inf_nan=False)
    task_folders: tuple[Path, ...] = ()
    allow_task_code: bool = False
    search_on_test_items: bool = False
    answers: KeptAnswers = "all"
    store: str | None = None
    observers: ObserverList = ()
    artifacts: str | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _space_of_its_kind(cls, value: object) -> object:
        """``kind`` names the space; its own settings class parses the rest."""
        if isinstance(value, SpaceSettings) or not isinstance(value, Mapping):
            return value
        kind = str(value.get("kind", "parameter_space"))
        return space_settings(kind, "space.kind").model_validate(dict(value) | {"kind": kind})

    @field_validator("attempt_hours")
    @classmethod
    def _not_hurried(cls, hours: float) -> float:
        if hours * 3600 < LEAST_S:
            raise ValueError(f"must be {LEAST_S / 3600:.3g} or more: no attempt of less than a minute is ever ended")
        return hours

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for field in ("base", "tokenizer"):
            name = getattr(self, field)
            if name is not None and name not in self.sources:
                raise ValueError(f"{field}: there is no source {name!r}; the sources are {', '.join(self.sources)}")
        if both := sorted(set(self.objectives) & set(self.constraints)):
            raise ValueError(f"constraints: {both[0]} is the name of an objective already")
        if self.screen is not None and self.screen.objective not in (None, *self.objectives):
            raise ValueError(f"screen.objective: there is no objective {self.screen.objective!r}")
        if missing := sorted(self.vocabulary.used_sources() - set(self.sources)):
            raise ValueError(
                f"vocabulary: there is no source {missing[0]!r}; the sources are {', '.join(self.sources)}"
            )
        return self

    @property
    def tokenizer_source(self) -> str:
        """The source that gives tokenizer and configuration: as named, else the base, else the first source."""
        return self.tokenizer or self.base or next(iter(self.sources))

    @property
    def merged_vocabulary(self) -> Vocabulary:
        """What recipes say of their tokens: missing rows are those of the base, unless another source is named."""
        if not self.vocabulary.aligns or self.vocabulary.base is not None:
            return self.vocabulary
        return self.vocabulary.model_copy(update={"base": self.base})

    @property
    def measures(self) -> dict[str, Measure]:
        """Everything that names an evaluator, by its place in the file; objectives come first."""
        found: dict[str, Measure] = {f"objectives.{name}": objective for name, objective in self.objectives.items()}
        found |= {f"constraints.{name}": constraint for name, constraint in self.constraints.items()}
        return found if self.screen is None else found | {"screen": self.screen}

    def evaluators(self) -> dict[str, EvaluatorSettings]:
        """The evaluator settings of each measure, by the measure's place; equal settings mean one evaluator."""
        found = {}
        for place, measure in self.measures.items():
            settings = evaluator_settings(measure.evaluator, f"{place}.evaluator")
            keys = measure.evaluator_keys
            shared = {"task_folders": self.task_folders, "allow_task_code": self.allow_task_code}
            keys |= {key: value for key, value in shared.items() if key in settings.model_fields}
            try:
                found[place] = settings.model_validate(keys)
            except ValidationError as error:
                raise explain(error, place, settings) from None
        return found


def load_search_file(path: Path, overrides: Sequence[str] = ()) -> SearchFile:
    """Read a search file, apply ``key.path=value`` overrides (values are YAML), and make its paths absolute.

    Raises:
        InputError: a file that cannot be read, an unknown key or wrong value, named as ``FILE: key.path``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read as a search file ({error})") from None
    content = load_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(str(path), "is not a search file: its top level must be keys such as `sources:` and `space:`")
    for override in overrides:
        apply_override(content, override)
    return parse_search_file(content, place=path.name, root=path.resolve().parent)


def parse_search_file(content: Mapping[str, Any], *, place: str, root: Path) -> SearchFile:
    """Check the content of a search file; relative paths in it are taken from ``root``."""
    try:
        parsed = SearchFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, place, SearchFile) from None
    if parsed.store is not None:
        check_store_url(parsed.store, f"{place}: store")
    if parsed.artifacts is not None:
        check_url(parsed.artifacts, f"{place}: artifacts")
    sources = {name: _absolute(reference, root) for name, reference in parsed.sources.items()}
    folders = tuple((root / folder).resolve() for folder in parsed.task_folders)
    update = {
        "sources": sources,
        "space": parsed.space.at(root.resolve()),
        "task_folders": folders,
        "objectives": {n: _at(root.resolve(), f"objectives.{n}", each) for n, each in parsed.objectives.items()},
        "constraints": {n: _at(root.resolve(), f"constraints.{n}", each) for n, each in parsed.constraints.items()},
        "screen": None if parsed.screen is None else _at(root.resolve(), "screen", parsed.screen),
    }
    resolved = parsed.model_copy(update=update)
    resolved.evaluators()
    return resolved


def _at(root: Path, place: str, measure: AnyMeasure) -> AnyMeasure:
    """The measure with the paths in its evaluator's keys absolute."""
    fields = evaluator_settings(measure.evaluator, f"{place}.evaluator").model_fields
    paths = {key for key in measure.evaluator_keys if key in fields and Path in _options(fields[key].annotation)}
    models = {key for key in measure.evaluator_keys if key in fields and MODEL in fields[key].metadata}
    absolute = {key: str(root / Path(str(measure.evaluator_keys[key])).expanduser()) for key in paths}
    absolute |= {key: _absolute(str(measure.evaluator_keys[key]), root) for key in models}
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


def explain(error: ValidationError, place: str, model: type[BaseModel]) -> InputError:
    """The first fault of a validation error in the words of the file: its key path, what is wrong, and the mend."""
    fault = error.errors(include_url=False)[0]
    loc = [str(part) for part in fault["loc"] if not str(part).startswith("function-") and part != "[key]"]
    path, known = _walk(model, loc)
    kind, context = fault["type"], fault.get("ctx", {})
    where = f"{place}: {'.'.join(path)}" if path else place
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return InputError(where, "is not a key that is known here", hint if known else "")
    if kind == "missing":
        return InputError(where, "is missing")
    if kind == "union_tag_not_found":
        return InputError(f"{where}.{_tag_key(context)}", "is missing")
    if kind == "union_tag_invalid":
        names = [name.strip().strip("'") for name in context["expected_tags"].split(",")]
        noun = path[-2].removesuffix("s") if path[-1].isdecimal() else path[-1]  # observers.0: one of the observers
        return unknown_name(context["tag"], names, f"{where}.{_tag_key(context)}", noun)
    given = fault.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return InputError(where, _wrong(kind, str(fault["msg"]), context) + shown)


def _tag_key(context: Mapping[str, Any]) -> str:
    """The key whose value decides which settings a section takes."""
    return str(context["discriminator"]).strip("'")


_KINDS = {
    "int_": "must be a whole number", "float_": "must be a number", "bool_": "must be true or false",
    "string_type": "must be text", "tuple_": "must be a list", "list_": "must be a list",
    "dict_": "must be a section with keys", "model_": "must be a section with keys",
}  # fmt: skip
"""What a value must be, by how the type of pydantic's error begins."""


def _wrong(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """What is wrong with a value, as a clause: in the words of people where pydantic's own are those of Python."""
    if kind == "too_short":
        return f"needs at least {context['min_length']}, has {context['actual_length']}"
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters"
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        return "may hold letters, digits, - and _ (up to 64), beginning with a letter or a digit"
    for begin, words in _KINDS.items():
        if kind.startswith(begin):
            return words
    message = message.removeprefix("Value error, ").replace("Input should be ", "must be ", 1)
    return message[0].lower() + message[1:]


def _walk(model: type[BaseModel], loc: Sequence[str]) -> tuple[list[str], list[str]]:
    """Where a fault lies: its key path in the file, and the keys that are known in the section of its last key.

    Pydantic's own path also names which of several settings a section was taken for: optimizer.nsga2.population.
    """
    path: list[str] = []
    sections, known = [model], [model]
    for part in loc:
        if len(sections) > 1 and (tagged := [each for each in sections if part in _tags(each)]):
            sections = tagged
            continue
        path.append(part)
        known = sections
        fields = [each.model_fields[part] for each in sections if part in each.model_fields]
        if fields:
            sections = [found for field in fields for found in _sections(field.annotation)]
    return path, list(dict.fromkeys(name for each in known for name in each.model_fields))


def _tags(section: type[BaseModel]) -> set[object]:
    """The values of the keys by which a section is told from others."""
    kinds = [field.annotation for field in section.model_fields.values()]
    return {value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows, in lists and other containers too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for each in get_args(annotation) for found in _sections(each)]


def _absolute(reference: str, root: Path) -> str:
    """A folder that exists becomes an absolute path; anything else stays as it is (a hub id, or an error later)."""
    folder = (root / Path(os.path.expanduser(reference))).resolve()
    if "+" in reference and not folder.is_dir():  # a model and its adapters
        return "+".join(_absolute(part, root) for part in reference.split("+"))
    return str(folder) if folder.is_dir() or reference.startswith((".", "/", "~")) else reference
