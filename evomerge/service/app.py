"""The app: all routers together. ``create_app`` is what a server runs and what tests talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp

from evomerge import __version__
from evomerge.service import problems
from evomerge.service.bodies import Happening
from evomerge.service.checking import Checker
from evomerge.service.drivers import Drivers
from evomerge.service.exports import Exports
from evomerge.service.guard import Door, Guard
from evomerge.service.ray_jobs import RayJobs
from evomerge.service.root import Root
from evomerge.service.streams import Streams
from evomerge.store import Store


@dataclass(frozen=True)
class ServiceSettings:
    """How a server is set up.

    Attributes:
        root: the searches.
        token: what clients must show; None lets everybody in, which only a loopback address or a flag allows.
        hosts: names by which a browser may call this server (against DNS rebinding).
        sources: folders that search files which come over HTTP may name paths in.
        jobs: where drivers are started; on this machine when left out.
    """

    root: Root
    token: str | None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    sources: tuple[Path, ...] = field(default=())
    jobs: RayJobs | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where models and data may lie: the sources, and the root with its exports."""
        return (*self.sources, self.root.folder)


# These are asynchronous, for a dependency that is not takes a thread for a moment, and there are few.


async def settings_of(request: Request) -> ServiceSettings:
    found: ServiceSettings = request.app.state.settings
    return found


async def root_of(request: Request) -> Root:
    return (await settings_of(request)).root


async def drivers_of(request: Request) -> Drivers:
    found: Drivers = request.app.state.drivers
    return found


async def exports_of(request: Request) -> Exports:
    found: Exports = request.app.state.exports
    return found


async def streams_of(request: Request) -> Streams:
    found: Streams = request.app.state.streams
    return found


async def checker_of(request: Request) -> Checker:
    found: Checker = request.app.state.checker
    return found


RootDependency = Annotated[Root, Depends(root_of)]


def store_of(name: str, root: RootDependency) -> Iterator[Store]:
    """The store of the search that a path names: opened once for a request, and handed on."""
    with root.store(name) as found:
        yield found


SettingsDependency = Annotated[ServiceSettings, Depends(settings_of)]
StoreDependency = Annotated[Store, Depends(store_of)]
DriversDependency = Annotated[Drivers, Depends(drivers_of)]
ExportsDependency = Annotated[Exports, Depends(exports_of)]
StreamsDependency = Annotated[Streams, Depends(streams_of)]
CheckerDependency = Annotated[Checker, Depends(checker_of)]


class _Service(FastAPI):
    """The app with the guard around all of it, the answer to an error of ours included."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with what routes only refer to."""
        if self.openapi_schema is None:
            from evomerge.report.inspection import Inspection  # which brings torch, and nothing else here needs it

            schemas = super().openapi()["components"]["schemas"]
            for model in (problems.Problem, Happening, Inspection):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
                schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
        return super().openapi()

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.state.settings, self.state.door)


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.checker.close()


def create_app(settings: ServiceSettings) -> FastAPI:
    from evomerge.service import dashboard, pages
    from evomerge.service.api import candidates, events, exports, figures, searches, sources, system

    app = _Service(
        title="Evomerge",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        lifespan=_running,
    )
    app.state.settings = settings
    app.state.door = Door(settings.token)
    app.state.drivers = Drivers(settings.root, settings.jobs)
    app.state.exports = Exports(settings.root)
    app.state.streams = Streams(settings.root)
    app.state.checker = Checker(settings.root)
    for part in (system, searches, candidates, figures, events, exports, sources):
        app.include_router(part.router)
    problems.install(app)
    pages.install(app)
    dashboard.install(app, settings.root)
    return app
