"""The page: templates over the API's data, one module a page, each with a ``router``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_PLOTLY_KEPT = "public, max-age=86400"  # five megabytes; the address holds the version
_KEPT = "no-cache"  # asked for again, and sent only if changed: no page gets a script of another version


def install(app: FastAPI) -> None:
    """Add the pages and their files, and show errors as pages where a person asks. Call it once, after the API and
    ``problems.install``.
    """
    from evomerge.service.pages import candidate, exports, faults, login, new, search
    from evomerge.service.pages.rendering import STATIC, compile_templates

    compile_templates()
    for module in (search, candidate, exports, new, login):
        app.include_router(module.router)

    @app.get("/static/plotly.min.js", include_in_schema=False)
    def plotly() -> FileResponse:
        """Plotly's script, as the installed package has it."""
        script = str(files("plotly") / "package_data" / "plotly.min.js")
        return FileResponse(script, media_type="text/javascript", headers={"cache-control": _PLOTLY_KEPT})

    app.mount("/static", _Kept(directory=STATIC), name="static")
    faults.install(app)


class _Kept(StaticFiles):
    """Files that a browser keeps, and asks whether they have changed."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers["cache-control"] = _KEPT
        return response
