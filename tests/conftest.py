"""Settings that every test shares: no network, few threads, quiet libraries."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("evomerge.testing")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # miniature matrices gain nothing from threads, and lose much
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How many examples: few and always the same ones by default, many new ones with --hypothesis-profile nightly, which
# scripts/test --all passes. Times are no part of either, because machines that run tests are shared.
settings.register_profile(
    "commit", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("commit")

PLUGINS = Path(__file__).parents[1] / "examples" / "plugins"

# Files of minutes, first: two processes share out whole files, and one of these at the end would run alone.
LONG = ("test_kill", "test_chaos", "test_service_drivers", "test_cluster_files", "test_ray_pool", "test_service_walk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module")
def plugins_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package of ``examples/plugins`` as pip would lay it out."""
    project = tomllib.loads((PLUGINS / "pyproject.toml").read_text())["project"]
    place = tmp_path_factory.mktemp("site-packages")
    about = place / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
        for group, points in project["entry-points"].items()
    )
    (about / "entry_points.txt").write_text("\n".join(line for group in groups for line in group) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        yield
