"""The login page, which asks for the token."""

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
        "That is not the token of this server. The link that it last printed contains the right one." if failed else ""
    )
    return page(request, "login.html", here="", navigation=False, next=next, fault=fault)
