"""The command that serves searches to browsers and programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def serve(
    place: str,
    *,
    host: str,
    port: int,
    folder: Path,
    sources: Sequence[Path],
    names: Sequence[str],
    needs_token: bool,
    insecure: bool,
) -> None:
    """Serve the searches of a folder or a database; prints the link to open."""
    from evomerge.service.server import serve

    def say(link: str) -> None:
        print(link, flush=True)

    serve(
        place, host=host, port=port, folder=folder, sources=sources, names=names, needs_token=needs_token,
        insecure=insecure, say=say,
    )  # fmt: skip
