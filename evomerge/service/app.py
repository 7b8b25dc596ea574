"""The FastAPI app with all routers. Servers and tests create it with ``create_app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from evomerge import __version__
from evomerge.service import dashboard, pages, problems
from evomerge.service.api import candidates, events, exports, figures, searches, sources, system
from evomerge.service.bodies import SearchEvent
from evomerge.service.checking import Checker
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.drivers import Drivers
from evomerge.service.exports import Exporter
from evomerge.service.guard import Authenticator, Guard
from evomerge.service.streams import Streams


class _Service(FastAPI):
    """The app with the guard as its outermost layer, so that responses to internal errors pass through it too."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the schemas that routes only refer to."""
        if self.openapi_schema is None:
            from evomerge.report.inspected import Inspection  # imports torch, which nothing else here needs

            schemas = super().openapi()["components"]["schemas"]
            for model in (problems.Problem, SearchEvent, Inspection):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
                schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
        return super().openapi()

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.state.settings, self.state.authenticator)


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.checker.close()


def create_app(settings: ServiceSettings) -> FastAPI:
    app = _Service(
        title="Evomerge",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        lifespan=_running,
    )
    app.state.settings = settings
    app.state.authenticator = Authenticator(settings.token)
    app.state.drivers = Drivers(settings.root, settings.jobs)
    app.state.exports = Exporter(settings.root)
    app.state.streams = Streams(settings.root)
    app.state.checker = Checker(settings.root)
    for part in (system, searches, candidates, figures, events, exports, sources):
        app.include_router(part.router)
    problems.install(app)
    pages.install(app)
    dashboard.install(app, settings.root)
    return app
