"""A search about pictures from its file to its export and its pages: examples/vision.yaml with few items."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_miniature import ROOT, evomerge
from helpers_service import BEARER, TOKEN
from PIL import Image
from starlette.testclient import TestClient

from evomerge.service.app import create_app
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.root import Root
from evomerge.store import Store


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("searches")
    content = yaml.safe_load((ROOT / "examples" / "vision.yaml").read_text("utf-8"))
    content["sources"] = {name: str(ROOT / "examples" / place) for name, place in content["sources"].items()}
    content["objectives"]["mini_picture_ja"] |= {"search": "validation[:12]", "held_out": "test[:30]", "items": 12}
    content |= {"pool": "in_process", "budget": {"candidates": 10}, "confirm": {"top": 1}}
    del content["cluster"]
    (root / "vision.yaml").write_text(yaml.safe_dump(content))
    assert evomerge("search", root / "vision.yaml", "--dir", root / "vision") == 0
    return root / "vision"


@pytest.fixture(scope="module")
def client(search: Path) -> Iterator[TestClient]:
    settings = ServiceSettings(Root.of(str(search.parent), search.parent), TOKEN)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", headers=BEARER) as client:
        yield client


def test_baselines_are_the_vlm_alone_and_the_language_model_swapped_in(search: Path) -> None:
    with Store.open(search / "search.db") as store:
        named = {row.label: row.objectives["mini_picture_ja"].mean for row in store.candidates() if row.label}
    assert {"vision", "japanese", "uniform average", "task_arithmetic defaults"} <= named.keys()
    assert named["vision"] == 0
    assert named["japanese"] > 0.1


def test_pictures_are_kept_small_beside_the_items(search: Path) -> None:
    with Store.open(search / "search.db") as store:
        (evaluator,) = store.search().record.evaluators
        shown = {split: store.item_pictures(evaluator.version, split) for split in ("search", "held_out")}
        assert [len(pictures) for pictures in shown.values()] == [12, 30]
        assert all(len(pictures) == 1 for split in shown.values() for pictures in split)
        image = store.thumbnail(shown["search"][0][0])
    assert image is not None
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.size == (60, 60)


def test_the_page_and_the_api_show_pictures_and_no_other_files(client: TestClient) -> None:
    compared = client.get("/api/v1/searches/vision/compare", params={"a": 1, "b": 2}).json()
    (picture,) = compared["items"][0]["pictures"]
    found = client.get(f"/api/v1/searches/vision/pictures/{picture}")
    assert found.headers["content-type"] == "image/png"
    assert found.headers["x-content-type-options"] == "nosniff"
    page = client.get("/searches/vision/compare", params={"a": 1, "b": 2})
    assert f"/api/v1/searches/vision/pictures/{picture}" in page.text
    candidate = client.get("/searches/vision/candidates/2", params={"against": 1})
    assert re.search(r'<img class="shown" src="/api/v1/searches/vision/pictures/[0-9a-f]{64}"', candidate.text)
    for other in ("f" * 64, "search.db", "..%2Fsearch.db", "%2Fetc%2Fpasswd", picture.upper(), picture[:-1]):
        assert client.get(f"/api/v1/searches/vision/pictures/{other}").status_code in (404, 422), other
    assert client.get(f"/api/v1/searches/vision/pictures/{picture}", headers={"authorization": ""}).status_code == 401


def test_the_report_holds_its_pictures(search: Path, tmp_path: Path) -> None:
    assert evomerge("report", search, "--out", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text("utf-8")
    assert text.count('<img src="data:image/png;base64,') == 8
    assert "answers about pictures" in text


def test_the_export_scores_as_recorded_with_pictures(search: Path, tmp_path: Path) -> None:
    """`export` loads the folder with plain transformers and asks about every held-out picture again."""
    assert evomerge("export", search, tmp_path / "merged") == 0
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert "mini_picture_ja" in card
    assert (tmp_path / "merged" / "processor_config.json").exists()
