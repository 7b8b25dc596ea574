"""The command plugins: list what can be named in a search file."""

from __future__ import annotations

from evomerge.plugins import NOUNS, OWN, plugins
from evomerge.printable import printable


def list_plugins() -> None:
    """Print all parts by name, with the package if they come from another one. Does not import any of them."""
    for group, noun in NOUNS.items():
        parts = plugins(group)
        print(f"{noun}s: {', '.join(name for name in parts if name in OWN[group])}")
        for name, point in parts.items():
            if name not in OWN[group]:
                package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
                print(f"  {printable(name)}, of {printable(package)}")
