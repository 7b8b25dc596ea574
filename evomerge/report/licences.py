"""The licence of a merged model: the most restrictive of its sources', as far as it is known."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from evomerge.errors import InputError
from evomerge.files import open_file

# From permissive to restrictive, by the identifiers that model cards use. Unlisted licences count as most restrictive,
# because a person has to read them.
_ORDER = (
    "unlicense", "cc0-1.0", "0bsd", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "apache-2.0", "cc-by-4.0", "mpl-2.0",
    "lgpl-2.1", "lgpl-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "openrail", "bigscience-openrail-m",
    "creativeml-openrail-m", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "cc-by-nd-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
)  # fmt: skip
UNKNOWN = "unknown"

CARD = "README.md"
"""The name of the card in a model's folder."""

_MAX_BYTES = 65_536
_LINE = re.compile(r"""license:\s+(?P<quote>["']?)(?P<name>[\w.+-]{1,100})(?P=quote)\s*(#.*)?""", re.ASCII)


def licence_of(folder: Path) -> str:
    """The licence in a model folder's card; "unknown" if there is none.

    Only the line with the key is read, because the card is not trusted, and parsing all of its YAML can take for ever.
    """
    try:
        with open_file(folder / CARD, str(folder)) as stream:
            lines = stream.read(_MAX_BYTES).decode("utf-8", "replace").splitlines()
    except (InputError, OSError):
        return UNKNOWN
    if not lines or lines[0].rstrip() != "---":
        return UNKNOWN
    for line in itertools.takewhile(lambda line: line.rstrip() != "---", lines[1:]):
        if match := _LINE.fullmatch(line):
            return match["name"].lower()
    return UNKNOWN


def most_restrictive(licences: Iterable[str]) -> str:
    """The most restrictive licence; "other" if any of them is not listed here, because a person must then decide."""
    names = list(licences)
    if any(licence not in _ORDER for licence in names):
        return "other"
    return max(names, key=_ORDER.index)
