"""The web pages: templates over the API's data, one module per page, each with a ``router``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_PLOTLY_KEPT = "public, max-age=86400"  # five megabytes; the URL contains the version
_KEPT = "no-cache"  # always revalidated, so that no page gets a script of another version


def install(app: FastAPI) -> None:
    """Add the pages and their static files, and show errors as pages in browsers. Call this once, after the API and
    ``problems.install``.
    """
    from evomerge.service.pages import candidate, exports, faults, login, new, search
    from evomerge.service.pages.rendering import STATIC, compile_templates

    compile_templates()
    for module in (search, candidate, exports, new, login):
        app.include_router(module.router)

    @app.get("/static/plotly.min.js", include_in_schema=False)
    def plotly() -> FileResponse:
        """Plotly's script from the installed package."""
        script = str(files("plotly") / "package_data" / "plotly.min.js")
        return FileResponse(script, media_type="text/javascript", headers={"cache-control": _PLOTLY_KEPT})

    app.mount("/static", _Kept(directory=STATIC), name="static")
    faults.install(app)


class _Kept(StaticFiles):
    """Static files that browsers cache and revalidate."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers["cache-control"] = _KEPT
        return response
