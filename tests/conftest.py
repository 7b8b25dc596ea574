"""Settings that every test shares: no network, few threads, quiet libraries."""

from __future__ import annotations

import gc
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_tiers import mark_variants
from hypothesis import HealthCheck, settings

from evomerge.startup import collect_garbage_rarely

collect_garbage_rarely()  # as in our programs: evomerge, imported before peft, keeps scikit-learn out of transformers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # operations on miniature matrices are much slower with several threads
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# The number of examples: by default few and always the same; with --hypothesis-profile nightly, which `scripts/test
# --all` passes, many new ones. Neither has deadlines, because machines that run tests are shared.
settings.register_profile(
    "commit", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("commit")

PLUGINS = Path(__file__).parents[1] / "examples" / "plugins"

# Tests of pure functions and small objects, without model folders, processes, servers or searches over models. With
# `-m unit` the other files are not even imported.
UNIT = {
    "test_card", "test_combined", "test_confirm", "test_curse", "test_data_flow_space", "test_deadlines",
    "test_elementwise_methods", "test_evaluators_answers", "test_evaluators_change", "test_evaluators_cost",
    "test_evaluators_mgsm", "test_evaluators_multiple_choice", "test_events", "test_files", "test_finite", "test_front",
    "test_hardware", "test_hybrid_space", "test_inference", "test_item_response", "test_mergekit", "test_merging_drops",
    "test_merging_methods", "test_mixture_space", "test_numbers", "test_parameter_space", "test_path_drawing",
    "test_prompts_space", "test_racing", "test_recipe", "test_record", "test_routed_space", "test_routers",
    "test_sparse_methods", "test_statistics", "test_store",
}  # fmt: skip

# The files that take longest run first: processes share whole files, and one of these would run alone at the end.
LONG = (
    "test_service_walk", "test_ray_pool", "test_service_browser", "test_service_report", "test_commands",
    "test_faults_outside", "test_evaluators_function", "test_store_postgres", "test_optimizers", "test_kill",
    "test_search_features", "test_merging_methods", "test_sparse_methods", "test_object_storage", "test_steady",
    "test_plugins", "test_evaluators_lm_eval", "test_together_searched", "test_methods_searched", "test_chaos",
    "test_cluster_files", "test_gpu_kit", "test_launch", "test_service_drivers",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    other = collection_path.match("test_*.py") and collection_path.stem not in UNIT
    return True if other and config.option.markexpr == "unit" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_variants(items, whole=not any("::" in argument for argument in config.args))
    for item in items:
        if item.path.stem in UNIT and item.get_closest_marker("nightly") is None:
            item.add_marker("unit")
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    gc.freeze()  # imported modules stay; scanning them again and again would take longer than many a test


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread whatever OMP_NUM_THREADS is, for sums in a fixed order; tiny models are also slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plugins_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package of ``examples/plugins``, installed as pip would do it."""
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
