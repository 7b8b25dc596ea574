"""YAML as people expect it: duplicate keys are errors, 1e-3 is a number, 1:30 is not, nothing runs code or expands
without bound.

A few hundred bytes of aliases can stand for billions of values, and a few thousand brackets keep a parser busy for
minutes. So the events of a text are counted before it is parsed, and its values are counted with aliases expanded.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from evomerge.errors import InputError

MAX_VALUES = 200_000
"""The maximum number of values, before and after expanding aliases."""

_MAX_DEEP = 100
_MAX_SCALAR = 1_000_000  # characters
_MAX_DIGITS = 40
_LONG = 100_000  # characters from which a text that the fast parser rejects is not given to the slow one
_MERGE = "tag:yaml.org,2002:merge"
_STR, _INT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXTS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}
"""The types that YAML may assume for an unquoted key, by the suffix of its tag."""

_HALF = "holds half of a surrogate pair, which cannot be written to a file"
_LOADERS: tuple[Any, ...] = (*([yaml.CSafeLoader] if yaml.__with_libyaml__ else []), yaml.SafeLoader)
"""For counting: the first is fast; the second may accept texts that the first rejects."""


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Before << is merged, because keys from a merge may be overridden.
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
    if tag is None or tag.rpartition(":")[2] not in ("binary", "set", "omap", "pairs")  # which settings never are
}


class _Dumper(yaml.SafeDumper):
    pass


# PyYAML follows YAML 1.1, where 1e-3 without a point is a string. The dumper must know this to quote such strings.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
# In YAML 1.1, 1:30 is the base-60 number 90. This resolver comes first, to make it text; the dumper still quotes it.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(_STR, re.compile(r"[-+]?[0-9][0-9_]*(:[0-9_]+)+(\.[0-9_]*)?$")), *resolvers]
    if first in "-+0123456789"
    else resolvers
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str, place: str, *, most_values: int = MAX_VALUES) -> Any:
    """The content of one YAML document; None if it is empty.

    Raises:
        InputError: invalid YAML, a duplicate key in a mapping, a key or number that YAML reads differently from people,
            a tag for anything but plain data, or more of anything than settings need; names ``place`` and the line.
    """
    check_yaml(text, place, most_values=most_values)
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader: it builds only plain data
    except (yaml.YAMLError, ValueError) as error:  # dates such as 2024-99-99 raise ValueError
        raise _no_yaml(error, place) from None
    except RecursionError:
        raise InputError(place, "is nested too deeply") from None


_DOCUMENT = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)
"""The separator of documents: within a document, no line can look like this."""


def load_documents(text: str, place: str) -> list[Any]:
    """The contents of the YAML documents in a text, separated by lines of three dashes; empty ones are omitted.

    Raises:
        InputError: as for ``load_yaml``, with the number of the document.
    """
    parts = _DOCUMENT.split(text)
    if len(parts) == 1:
        return [load_yaml(text, place)]
    found = [load_yaml(part, f"{place}, document {number}") for number, part in enumerate(parts, 1)]
    return [content for content in found if content is not None]


def check_yaml(text: str, place: str, *, most_values: int = MAX_VALUES) -> None:
    """Reject a YAML text that would expand without bound; no values are built, and tags are ignored.

    Raises:
        InputError: it is nested too deeply, has too many values, or contains a text that is too long.
    """
    for loader in _LOADERS:
        try:
            _count_events(yaml.parse(text, loader), place, most_values)
            _count_values(yaml.compose(text, loader), place, most_values)
            return
        except yaml.YAMLError as error:
            if len(text) > _LONG:
                raise _no_yaml(error, place) from None
            continue  # invalid YAML is reported with its line when it is loaded
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
    """Count the values of a document with aliases expanded: an alias is the same node object as its anchor."""
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
