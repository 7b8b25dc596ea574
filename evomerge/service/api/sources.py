"""Models that a search may merge: listing those in the allowed folders, and inspecting them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from evomerge.errors import InputError
from evomerge.files import read_json
from evomerge.printable import printable
from evomerge.service.allowed import is_hub_id, located
from evomerge.service.bodies import FoundModel, GivenSources, Sources
from evomerge.service.dependencies import CheckerDependency, SettingsDependency
from evomerge.service.disconnects import while_connected
from evomerge.service.problems import RESPONSES

router = APIRouter(prefix="/api/v1/sources", tags=["sources"], responses=RESPONSES)

_DEPTH = 3  # levels of folders that are searched: enough for org/model, or the snapshots of a hub cache
_MAX = 1000


@router.get("")
def sources(settings: SettingsDependency) -> Sources:
    """The model folders and adapters in the allowed folders."""
    by_path: dict[Path, FoundModel] = {}
    for folder in settings.sources:
        for path, source in _models(folder, _DEPTH):
            by_path.setdefault(path, source)
            if len(by_path) >= _MAX:
                break
    models = {path.resolve(): source for path, source in by_path.items() if source.adapter_of is None}
    listed = [
        source if source.adapter_of is None else _with_base(path, source, source.adapter_of, models)
        for path, source in by_path.items()
    ]
    return Sources(
        sources=sorted(listed, key=lambda source: (source.adapter_of is not None, source.reference or source.name))
    )


def _with_base(adapter: Path, source: FoundModel, base: str, models: Mapping[Path, FoundModel]) -> FoundModel:
    """An adapter with the reference by which it can be merged, if its base model is here or on the hub.

    The base is found by its path, relative to here or to the adapter's folder, or by the name of its folder if unique.
    """
    here = [models.get(Path(os.path.realpath(place / base))) for place in (Path.cwd(), adapter)]
    named = [model for model in models.values() if model.name == Path(base).name]
    model = next((model for model in here if model is not None), named[0] if len(named) == 1 else None)
    on = model.reference if model is not None else base if is_hub_id(base) else None
    return source.model_copy(update={"reference": None if on is None else f"{on}+{adapter}"})


_INSPECTION = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Inspection"}}}}


@router.post("/inspect", response_class=JSONResponse, responses={200: _INSPECTION})
async def inspect(
    given: GivenSources, request: Request, checker: CheckerDependency, settings: SettingsDependency
) -> JSONResponse:
    """Describe models and how close they are to each other, layer by layer. Takes as long as reading them."""
    sources, base = await run_in_threadpool(_located, given, settings.folders)
    return JSONResponse(await while_connected(request, checker.inspect(sources, base)))


def _located(given: GivenSources, folders: Sequence[Path]) -> tuple[dict[str, str], str | None]:
    """The models to inspect and the base, as references with allowed, absolute folders."""
    sources = {name: located(reference, f"sources.{name}", folders) for name, reference in given.sources.items()}
    base = None if given.base is None else sources.get(given.base) or located(given.base, "base", folders)
    return sources, base


def _models(folder: Path, depth: int) -> Iterator[tuple[Path, FoundModel]]:
    """Model folders and adapters in a folder; symlinks are not followed."""
    try:
        str(folder).encode()
        inner = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink())
        source, folders = _source_in(folder, inner), [path for path in inner if path.is_dir()]
    except (
        OSError,
        ValueError,
        InputError,
    ):  # unreadable, a name that is not text, or a foreign config.json
        return
    if source is not None:
        yield folder, source
    elif depth:
        for path in folders:
            yield from _models(path, depth - 1)


def _source_in(folder: Path, inner: Sequence[Path]) -> FoundModel | None:
    """The model or adapter in a folder with these files; None if there is none."""
    files = {path.name for path in inner if path.is_file()}
    size = sum(path.stat().st_size for path in inner if path.suffix == ".safetensors")
    if "model_index.json" in files:  # diffusers, whose components are in subfolders
        kind = _config_text(folder / "model_index.json", "_class_name")
        held = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        return FoundModel(name=folder.name, reference=str(folder), model_type=kind, bytes=held)
    if "config.json" in files:
        kind = _config_text(folder / "config.json", "model_type")
        return FoundModel(name=folder.name, reference=str(folder), model_type=kind, bytes=size)
    if "adapter_config.json" in files:
        config = folder / "adapter_config.json"
        kind, base = _config_text(config, "peft_type"), _config_text(config, "base_model_name_or_path")
        return FoundModel(name=folder.name, reference=None, model_type=kind, bytes=size, adapter_of=base)
    return None


def _config_text(config: Path, key: str) -> str:
    content = read_json(config, config.name)
    return printable(str(content.get(key) if isinstance(content, dict) else None), 200)
