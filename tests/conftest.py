"""Settings that every test shares: no network, few threads, quiet libraries."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("evomerge.testing")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # miniature matrices gain nothing from threads, and lose much
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Files of minutes, first: two processes share out whole files, and one of these at the end would run alone.
LONG = ("test_kill", "test_chaos", "test_service_drivers", "test_cluster_files", "test_ray_pool", "test_service_walk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)
