"""What a search cost is on its page, in the list, in its report and in JSON; and its budget of money can be raised."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_service import BEARER, NAME, client_of, make_app, make_search

from evomerge.prices import Prices
from evomerge.report.status import status_of
from evomerge.service.report import report_html
from evomerge.store import Store, acquire

EUROS = Prices(gpu_hour=0.0, worker_hour=1000.0, currency="EUR")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A search with a price; three workers were held for it."""
    folder = make_search(tmp_path, candidates=12)
    with Store.open(folder / "search.db") as store, acquire(store):
        settings = store.search().settings
        cluster = {"worker_hour": EUROS.worker_hour, "currency": EUROS.currency}
        store.update_settings(settings | {"cluster": cluster, "budget": settings["budget"] | {"cost": 500.0}})
    return tmp_path


def test_page_list_report_and_json_say_what_a_search_cost(root: Path) -> None:
    with Store.open(root / NAME / "search.db") as store:
        spent = EUROS.cost(store.search().worker_time)
        status = status_of(store)
        report = report_html(store, root / NAME)
    assert status.cost is not None
    assert spent > 1
    assert status.cost.spent == pytest.approx(spent)
    words = f"{spent:,.2f} of 500.00 EUR"
    assert words in report
    with client_of(make_app(root), **BEARER) as client:
        found = client.get(f"/api/v1/searches/{NAME}/summary").json()
        assert found["cost"]["spent"] == pytest.approx(spent)
        assert (found["cost"]["budget"], found["cost"]["to_come"], found["budget"]["cost"]) == (500.0, None, 500.0)
        for page in ("/", f"/searches/{NAME}"):
            assert f"cost {words}" in client.get(page).text
        assert 'name="cost"' in client.get(f"/searches/{NAME}").text
