"""YAML as people mean it: a key twice is an error, 1e-3 is a number, nothing runs code."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from evomerge.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Before <<: is unfolded, since a key of what it brings may rightly be given again.
        first: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in first:
                problem = f"the key {key!r} stands here again; it is on line {first[key].line + 1} already"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            first[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


# PyYAML follows YAML 1.1, where 1e-3 without a point is a string. The dumper must know, to quote such strings.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_yaml(text: str, place: str) -> Any:
    """The content of one YAML document; None when it is empty.

    Raises:
        InputError: no YAML, a key twice in one mapping, or a tag that asks for more than plain data; names ``place``
            and the line.
    """
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader: it builds plain data alone
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{place}, line {mark.line + 1}" if mark else place
        raise InputError(where, error.problem or error.context or "cannot be read as YAML") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes of dates such as 2024-99-99
        raise InputError(place, f"cannot be read as YAML ({str(error).splitlines()[0]})") from None
    except RecursionError:
        raise InputError(place, "is nested too deeply") from None


def dump_yaml(content: Any) -> str:
    """The YAML text of plain data, keys in their own order; innermost lists and mappings on one line each."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
