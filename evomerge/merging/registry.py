"""The merge methods by name: this project's own, and those that other packages bring.

A package adds a method by an entry point of the group ``evomerge.merge_methods`` that names a ``Method``.
"""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.errors import InputError
from evomerge.merging import selective, span, sparse
from evomerge.merging.plans import Method
from evomerge.method_specs import GROUP
from evomerge.plugins import plugins, unknown_name

METHODS: Mapping[str, Method] = {
    method.spec.name: method for method in (*span.METHODS, *sparse.METHODS, *selective.METHODS)
}
"""The methods that the project brings."""


def find_method(name: str, place: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none, or a package's entry point names something else than a ``Method``.
    """
    if name in METHODS:
        return METHODS[name]
    added = plugins(GROUP)
    if name not in added:
        raise unknown_name(name, [*METHODS, *added], place, "merge method")
    found = added[name].load()
    if not isinstance(found, Method):
        raise InputError(place, f"{added[name].value} is no merge method", f"Let it name a {Method.__qualname__}.")
    return found
