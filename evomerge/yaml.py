"""YAML as people mean it: a key twice is an error, 1e-3 is a number, 1:30 is none, nothing runs code or explodes.

A few hundred bytes of aliases can stand for billions of values, and a few thousand brackets keep a parser for minutes.
So the events of a text are counted before anything is made of them, and its values with every alias written out.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from evomerge.errors import InputError

MAX_VALUES = 200_000
"""Of a text, and of what it says once its aliases are written out."""

_MAX_DEEP = 100
_MAX_SCALAR = 1_000_000  # characters
_MAX_DIGITS = 40
_LONG = 100_000  # characters that the slower of the two parsers need not look at when the other finds fault with them
_MERGE = "tag:yaml.org,2002:merge"
_STR, _INT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXTS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}
"""What YAML may take a key without quotes for, by the end of its tag."""

_HALF = "holds half of a surrogate pair, which no file can be written with"
_LOADERS: tuple[Any, ...] = (*([yaml.CSafeLoader] if yaml.__with_libyaml__ else []), yaml.SafeLoader)
"""For the counting: the first is quick; where it finds fault with a text, the other may go on."""


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Before <<: is unfolded, since a key of what it brings may rightly be given again.
        first: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _fault(key_node, "a key must be a plain value")
            if not isinstance(key, str):
                what = _TEXTS.get(key_node.tag.rpartition(":")[2], "no text")
                raise _fault(key_node, f"YAML reads the key {key_node.value} as {what}; put it in quotes")
            if key in first:
                problem = f"the key {key!r} appears here again; it is on line {first[key].line + 1} already"
                raise _fault(key_node, problem)
            first[key] = key_node.start_mark
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if _SURROGATE.search(str(node.value)):
            raise _fault(node, _HALF)
        return super().construct_scalar(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = str(node.value)
        if len(digits) > _MAX_DIGITS:
            raise _fault(node, f"a whole number of {len(digits):,} digits")
        if re.fullmatch(r"[-+]?0[0-9_]+", digits):
            raise _fault(node, f"{digits} may be meant in tens or in eights; leave the zero out, or put it in quotes")
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor(_INT, _StrictLoader.construct_yaml_int)
_StrictLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in _StrictLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in ("binary", "set", "omap", "pairs")  # which no setting is
}


class _Dumper(yaml.SafeDumper):
    pass


# PyYAML follows YAML 1.1, where 1e-3 without a point is a string. The dumper must know, to quote such strings.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
# There 1:30 is 90, in sixties. First in line, so that it is a text; the dumper goes on to quote it.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(_STR, re.compile(r"[-+]?[0-9][0-9_]*(:[0-9_]+)+(\.[0-9_]*)?$")), *resolvers]
    if first in "-+0123456789"
    else resolvers
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str, place: str, *, most_values: int = MAX_VALUES) -> Any:
    """The content of one YAML document; None when it is empty.

    Raises:
        InputError: no YAML, a key twice in one mapping, a key or number that YAML reads otherwise than people, a tag
            that asks for more than plain data, or more of anything than a text of settings has; names ``place`` and
            the line.
    """
    check_yaml(text, place, most_values=most_values)
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader: it builds plain data alone
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes of dates such as 2024-99-99
        raise _no_yaml(error, place) from None
    except RecursionError:
        raise InputError(place, "is nested too deeply") from None


_DOCUMENT = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)
"""What divides documents: inside one, no line can be so."""


def load_documents(text: str, place: str) -> list[Any]:
    """The contents of the YAML documents of a text, which lines of three dashes divide; empty ones are left out.

    Raises:
        InputError: as ``load_yaml``, by the number of the document.
    """
    parts = _DOCUMENT.split(text)
    if len(parts) == 1:
        return [load_yaml(text, place)]
    found = [load_yaml(part, f"{place}, document {number}") for number, part in enumerate(parts, 1)]
    return [content for content in found if content is not None]


def check_yaml(text: str, place: str, *, most_values: int = MAX_VALUES) -> None:
    """Refuse a YAML text that would explode; no value is made of it, and no tag is looked at.

    Raises:
        InputError: it is nested too deeply, says too much, or holds a text that is too long.
    """
    for loader in _LOADERS:
        try:
            _count_events(yaml.parse(text, loader), place, most_values)
            _count_values(yaml.compose(text, loader), place, most_values)
            return
        except yaml.YAMLError as error:
            if len(text) > _LONG:
                raise _no_yaml(error, place) from None
            continue  # what is no YAML is said with its line by whoever reads it
        except UnicodeEncodeError:
            raise InputError(place, _HALF) from None


def _no_yaml(error: Exception, place: str) -> InputError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return InputError(place, f"cannot be read as YAML ({str(error).splitlines()[0]})")
    mark = error.problem_mark or error.context_mark
    where = f"{place}, line {mark.line + 1}" if mark else place
    return InputError(where, error.problem or error.context or "cannot be read as YAML")


def dump_yaml(content: Any) -> str:
    """The YAML text of plain data, keys in their own order; innermost lists and mappings on one line each."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _fault(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _count_events(events: Iterable[yaml.Event], place: str, most: int) -> None:
    deep = values = 0
    for event in events:
        values += isinstance(event, yaml.NodeEvent)
        if values > most:
            raise InputError(place, f"holds more than {most:,} values")
        if isinstance(event, yaml.CollectionStartEvent):
            deep += 1
            if deep > _MAX_DEEP:
                raise InputError(place, "is nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            deep -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            where = f"{place}, line {event.start_mark.line + 1}" if event.start_mark is not None else place
            raise InputError(where, f"is a text of {len(event.value):,} characters")


def _count_values(node: yaml.Node | None, place: str, most: int) -> None:
    """Count the values of a document with its aliases written out: an alias is the very node that it stands for."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            raise InputError(place, "holds an alias of itself")
        if id(node) not in sizes:
            parts: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, above | {id(node)}) for part in parts)
            if sizes[id(node)] > most:
                raise InputError(place, f"holds more than {most:,} values once its aliases are written out")
        return sizes[id(node)]

    if node is not None:
        size(node, frozenset())
