"""What routes depend on: the server's settings, its long-lived objects, and the store of the requested search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from evomerge.service.checking import Checker
from evomerge.service.drivers import Drivers
from evomerge.service.exports import Exporter
from evomerge.service.ray_jobs import RayJobs
from evomerge.service.root import Root
from evomerge.service.streams import Streams
from evomerge.store import Store


@dataclass(frozen=True)
class ServiceSettings:
    """The settings of a server.

    Attributes:
        root: the searches.
        token: what clients must present. None disables authentication, which needs a loopback address or a flag.
        hosts: the accepted Host headers (against DNS rebinding).
        sources: the folders in which search files sent over HTTP may name paths.
        jobs: starts drivers on a Ray cluster; by default they are started on this machine.
    """

    root: Root
    token: str | None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    sources: tuple[Path, ...] = field(default=())
    jobs: RayJobs | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that may hold models and data: the sources, and the root with its exports."""
        return (*self.sources, self.root.folder)


# These are asynchronous because a synchronous dependency would occupy one of the few worker threads for a moment.


async def settings_of(request: Request) -> ServiceSettings:
    settings: ServiceSettings = request.app.state.settings
    return settings


async def root_of(request: Request) -> Root:
    return (await settings_of(request)).root


async def drivers_of(request: Request) -> Drivers:
    drivers: Drivers = request.app.state.drivers
    return drivers


async def exports_of(request: Request) -> Exporter:
    exports: Exporter = request.app.state.exports
    return exports


async def streams_of(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


async def checker_of(request: Request) -> Checker:
    checker: Checker = request.app.state.checker
    return checker


RootDependency = Annotated[Root, Depends(root_of)]


def store_of(name: str, root: RootDependency, request: Request) -> Iterator[Store]:
    """The store of the search named in the path, opened once per request. GET requests see a snapshot of it."""
    with root.snapshot(name) if request.method == "GET" else root.store(name) as store:
        yield store


SettingsDependency = Annotated[ServiceSettings, Depends(settings_of)]
StoreDependency = Annotated[Store, Depends(store_of, scope="function")]  # closed before the response is sent
DriversDependency = Annotated[Drivers, Depends(drivers_of)]
ExportsDependency = Annotated[Exporter, Depends(exports_of)]
StreamsDependency = Annotated[Streams, Depends(streams_of)]
CheckerDependency = Annotated[Checker, Depends(checker_of)]
