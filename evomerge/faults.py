"""Translates pydantic's validation errors into user-facing errors: the key, what is wrong, and a hint."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from evomerge.errors import InputError
from evomerge.plugins import find_class, unknown_name

Model = TypeVar("Model", bound=BaseModel)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""The pattern of names that become parts of keys, files and columns."""


def explain(error: ValidationError, place: str, model: type[BaseModel], content: Any, joint: str = ": ") -> InputError:
    """The first fault of a validation error: its key path in the file, what is wrong, and a hint.

    Args:
        place: what precedes the key path, separated by ``joint``.
        model: the class that validated the content.
        content: what was validated. Pydantic's own paths also name the variant of a union, which the content lacks.
    """
    faults = error.errors(include_url=False)
    fault, path = faults[0], _path(faults[0], content)
    if isinstance(fault["input"], Mapping):  # if a section is one of several types, what is wrong inside it
        below = [inner for inner in faults if _path(inner, content)[: len(path)] == path]
        fault = max(below, key=lambda inner: len(_path(inner, content)) > len(path))
        path = _path(fault, content)
    if fault["type"] == "missing" and (misspelt := _misspelt(path, faults, content)) is not None:
        fault, path = misspelt, _path(misspelt, content)
    known = _known_keys(model, path[:-1], content)
    kind, context = fault["type"], fault.get("ctx", {})
    where = f"{place}{joint}{'.'.join(path)}" if path else place
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return InputError(where, "is not a known key", hint if known else "")
    if kind == "missing":
        return InputError(where, "is missing")
    if kind == "union_tag_not_found":
        return InputError(f"{where}.{_tag_key(context)}", "is missing")
    if kind == "union_tag_invalid":
        names = [name.strip().strip("'") for name in context["expected_tags"].split(",")]
        noun = path[-2].removesuffix("s") if path[-1].isdecimal() else path[-1]  # observers.0: one of the observers
        return unknown_name(context["tag"], names, f"{where}.{_tag_key(context)}", noun)
    # A value of several types has a fault for each type; faults of sections that it might have been are excluded.
    alike = [other for other in faults if _path(other, content) == path]
    wrong = list(dict.fromkeys(_wrong(other["type"], str(other["msg"]), other.get("ctx", {})) for other in alike))
    problem = " or ".join([wrong[0], *(text.removeprefix("must be ") for text in wrong[1:])])
    if kind == "string_type" and (what := _read_as(fault.get("input"))) is not None:
        return InputError(where, f"must be text, but YAML reads it as {what}", "Put it in quotes.")
    given = fault.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return InputError(where, problem + shown)


def read_part(value: object, group: str, key: str, place: str, base: type[Model], default: str | None = None) -> object:
    """Parse a section of a search file with the settings class of the part that its ``key`` names.

    Args:
        value: the section; a value that is not a section, or already parsed, is returned unchanged.
        group, base: as for ``find_class``.
        default: the part if the section names none; None if it must.

    Raises:
        InputError: there is no such part, or it does not accept these settings.
    """
    if isinstance(value, base) or not isinstance(value, Mapping):
        return value
    if key not in value and default is None:
        raise InputError(f"{place}.{key}", "is missing")
    name = str(value.get(key, default))
    settings, content = find_class(group, name, f"{place}.{key}", base), dict(value) | {key: name}
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise explain(error, place, settings, content, ".") from None


def _misspelt(missing: Sequence[str], faults: Sequence[ErrorDetails], content: Any) -> ErrorDetails | None:
    """The fault of an unknown key if a key with similar spelling is missing."""
    for fault in faults:
        path = _path(fault, content)
        beside = fault["type"] == "extra_forbidden" and path[:-1] == missing[:-1]
        if beside and difflib.get_close_matches(path[-1], [missing[-1]], n=1):
            return fault
    return None


def _path(fault: ErrorDetails, content: Any) -> list[str]:
    """Where a fault is, by the keys in the content; other elements of pydantic's path are names of its own."""
    path: list[str] = []
    here: Any = content
    for part in fault["loc"]:
        is_key = isinstance(here, Mapping) and part in here
        if is_key or (isinstance(part, int) and isinstance(here, list | tuple) and part < len(here)):
            here = here[part]
        elif fault["type"] != "missing" or part != fault["loc"][-1]:
            continue
        path.append(str(part))
    return path


def _read_as(value: Any) -> str | None:
    """The type that YAML has assumed for a text without quotes."""
    if isinstance(value, bool):
        return f"{str(value).lower()}, as it does yes, no, on and off"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, datetime.date):
        return "a date"
    if isinstance(value, Mapping) and all(of is None for of in value.values()):  # {question}: a template, unquoted
        return "a section"
    return "nothing" if value is None else None


def _tag_key(context: Mapping[str, Any]) -> str:
    """The key whose value decides which settings a section accepts."""
    return str(context["discriminator"]).strip("'")


_KINDS = {
    "int_": "must be a whole number", "float_": "must be a number", "bool_": "must be true or false",
    "string_type": "must be text", "tuple_": "must be a list", "list_": "must be a list",
    "dict_": "must be a section with keys", "model_": "must be a section with keys",
    "finite_number": "must be a number that is not infinite",
}  # fmt: skip
"""What a value must be, by the prefix of the type of pydantic's error."""


def _wrong(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """What is wrong with a value, as a clause: reworded where pydantic's message uses Python terms."""
    if kind == "too_short":
        return f"needs at least {context['min_length']}, has {context['actual_length']}"
    if kind == "too_long":
        return f"has more than {context['max_length']}"
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters"
    if kind == "string_too_short":
        return "must not be empty" if context["min_length"] == 1 else f"needs {context['min_length']} characters"
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        return "may hold letters, digits, - and _ (up to 64), beginning with a letter or a digit"
    for begin, words in _KINDS.items():
        if kind.startswith(begin):
            return words
    message = message.removeprefix("Value error, ").replace("Input should be ", "must be ", 1)
    return message[0].lower() + message[1:]


def _known_keys(model: type[BaseModel], path: Sequence[str], content: Any) -> list[str]:
    """The known keys of the section at a key path; empty if its keys are free."""
    sections, here = [model], content
    for part in path:
        here = here.get(part) if isinstance(here, Mapping) else None
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if fields:
            sections = [section for field in fields for section in _sections(field.annotation)]
        if isinstance(here, Mapping):  # for several kinds of section, the one that it names
            tags = {value for value in here.values() if isinstance(value, str)}
            sections = [section for section in sections if tags & _tags(section)] or sections
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _tags(section: type[BaseModel]) -> set[str]:
    """The values of the keys that distinguish a section from others."""
    kinds = [field.annotation for field in section.model_fields.values()]
    return {value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows, also in lists and other containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
