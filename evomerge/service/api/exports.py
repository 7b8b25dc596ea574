"""Exports of a search: starting them, their progress, and their files."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import FileResponse

from evomerge.service import bodies
from evomerge.service.dependencies import ExportsDependency, StoreDependency
from evomerge.service.problems import RESPONSES

router = APIRouter(prefix="/api/v1/searches/{name}/exports", tags=["exports"], responses=RESPONSES)

ExportName = Annotated[str, Path(max_length=64)]


@router.get("")
def all_exports(name: str, exports: ExportsDependency) -> bodies.Exports:
    """The exports that were started here."""
    return bodies.Exports(exports=exports.all(name))


@router.post("", status_code=202)
def start(name: str, wanted: bodies.NewExport, store: StoreDependency, exports: ExportsDependency) -> bodies.Export:
    """Start an export of a candidate as a plain model folder, in the search's own folder."""
    return exports.start(name, store, wanted)


@router.get("/{export}")
def one(name: str, export: ExportName, exports: ExportsDependency) -> bodies.Export:
    """The state and progress of an export."""
    return exports.one(name, export)


@router.get("/{export}/files/{path:path}", response_class=FileResponse)
def file(name: str, export: ExportName, path: str, exports: ExportsDependency) -> FileResponse:
    """Download a file of a finished export."""
    exported = exports.file(name, export, path)
    return FileResponse(exported, media_type="application/octet-stream", filename=exported.name)
