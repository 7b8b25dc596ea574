"""Models that a search may merge: those in the allowed folders, and what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from evomerge.service.allowed import located
from evomerge.service.app import CheckerDependency, SettingsDependency
from evomerge.service.bodies import Found, GivenSources, Sources
from evomerge.service.leaving import while_connected
from evomerge.service.problems import RESPONSES

router = APIRouter(prefix="/api/v1/sources", tags=["sources"], responses=RESPONSES)

_DEPTH = 3  # folders below an allowed one that are looked into: org/model, or a hub cache's snapshots
_MOST = 1000


@router.get("")
def sources(settings: SettingsDependency) -> Sources:
    """The model folders that lie in the allowed folders."""
    found: dict[str, Found] = {}
    for folder in settings.sources:
        for each in _models(folder, _DEPTH):
            found.setdefault(each.reference, each)
            if len(found) >= _MOST:
                break
    return Sources(sources=sorted(found.values(), key=lambda each: each.reference))


_INSPECTION = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Inspection"}}}}


@router.post("/inspect", response_class=JSONResponse, responses={200: _INSPECTION})
async def inspect(
    given: GivenSources, request: Request, checker: CheckerDependency, settings: SettingsDependency
) -> JSONResponse:
    """What models are, and how close they are to each other, layer by layer. Takes as long as reading them."""
    sources, base = await run_in_threadpool(_located, given, settings.folders)
    return JSONResponse(await while_connected(request, checker.inspect(sources, base)))


def _located(given: GivenSources, folders: Sequence[Path]) -> tuple[dict[str, str], str | None]:
    """The models to inspect, and the base among them, by folders that are allowed and absolute."""
    sources = {name: located(reference, f"sources.{name}", folders) for name, reference in given.sources.items()}
    base = None if given.base is None else sources.get(given.base) or located(given.base, "base", folders)
    return sources, base


def _models(folder: Path, depth: int) -> Iterator[Found]:
    """Model folders in a folder, links not followed."""
    try:
        inner = sorted(each for each in folder.iterdir() if not each.name.startswith(".") and not each.is_symlink())
        config = folder / "config.json"
        if config.is_file():
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
            size = sum(each.stat().st_size for each in inner if each.suffix == ".safetensors")
            yield Found(name=folder.name, reference=str(folder), model_type=str(kind), bytes=size)
            return
    except (OSError, ValueError, AttributeError):  # not ours to read, or another program's config.json
        return
    if depth:
        for each in inner:
            if each.is_dir():
                yield from _models(each, depth - 1)
