"""Health, metrics for Prometheus, and login and logout for browsers."""

from __future__ import annotations

from fastapi import APIRouter, Form, Request
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from evomerge.service.bodies import Health
from evomerge.service.dependencies import DriversDependency, RootDependency
from evomerge.service.guard import Authenticator, address_of, cookie_of, local_target, too_many_failures
from evomerge.service.problems import RESPONSES
from evomerge.service.summary import summaries_of

router = APIRouter(responses=RESPONSES)


@router.get("/api/v1/health", tags=["system"])
@router.get("/healthz", include_in_schema=False)
async def health() -> Health:
    """Whether the server is up. The only part of the API that needs no token; also at /healthz for probes.

    It is asynchronous, so it needs no worker thread and responds even if all of them are busy.
    """
    return Health(status="ok")


@router.get("/api/v1/metrics", tags=["system"], response_class=PlainTextResponse)
def metrics(root: RootDependency, drivers: DriversDependency) -> str:
    """Metrics of all searches in the text format of Prometheus."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"evomerge_{name}", text, ("search", *labels), registry=registry)

    state = gauge("search_state", "1 for the state that a search is in.", "state")
    driven = gauge("search_driven", "Whether a driver is running.")
    spent = gauge("search_spent_seconds", "Seconds in which a driver was running.")
    candidates = gauge("search_candidates", "Candidates by status.", "status")
    best = gauge("search_best", "The best mean of the first objective on the search split so far.", "objective")
    for summary in summaries_of(root, drivers):
        state.labels(summary.name, summary.state).set(1)
        driven.labels(summary.name).set(summary.driver)
        spent.labels(summary.name).set(summary.spent_s)
        for status, count in summary.counts.model_dump().items():
            candidates.labels(summary.name, status).set(count)
        for objective in summary.objectives[:1]:
            mean = None if summary.best is None else summary.best.objectives[objective.name].mean
            if mean is not None:
                best.labels(summary.name, objective.name).set(mean)
    return generate_latest(registry).decode()


@router.post("/login", include_in_schema=False)
def login(request: Request, token: str = Form(max_length=1000), next: str = Form("/", max_length=2000)) -> Response:
    """Log a browser in with the token from the form."""
    authenticator: Authenticator = request.app.state.authenticator
    address = address_of(request.scope)
    wait = authenticator.lockout_s(address)
    if not authenticator.accepts(token.strip(), address):
        return too_many_failures(wait) if wait else RedirectResponse("/login?failed=1", 303)
    response = RedirectResponse(local_target(next), 303)
    authenticator.log_in(response, request.url.scheme)
    return response


@router.post("/logout", include_in_schema=False)
def logout(request: Request) -> Response:
    """Log a browser out."""
    authenticator: Authenticator = request.app.state.authenticator
    response = RedirectResponse("/login", 303)
    authenticator.log_out(response, cookie_of(request.headers, authenticator.cookie_name))
    return response
