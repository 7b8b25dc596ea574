"""The page that asks for the token, for whoever comes without one or with a wrong one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from evomerge.service.pages.rendering import page

router = APIRouter(include_in_schema=False)


@router.get("/login")
def login(
    request: Request, next: str = "/", failed: Annotated[bool, "a wrong token was given"] = False
) -> HTMLResponse:
    fault = (
        "That token is not the one of this server. The link that it printed last has the right one." if failed else ""
    )
    return page(request, "login.html", here="", navigation=False, next=next, fault=fault)
