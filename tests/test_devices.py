"""A model laid over several devices: each tensor is made where it belongs, and all results are those of one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_checkpoints import save_model, tiny_config
from helpers_devices import FIRST, SECOND, THIRD, without_values
from helpers_miniature import evomerge, search_file
from helpers_tiers import nightly_but
from test_adapters import LINEAR, train
from test_architectures import MODELS
from test_low_rank_rows import arithmetic, opened, recipe_of, rows_of, shares_of
from test_paths import LAYERS, PATH, deeper, path_recipe

from evomerge.checkpoints import placement
from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.finite import _suspects
from evomerge.checkpoints.headers import map_file
from evomerge.checkpoints.live import LiveModel, configured, live_model
from evomerge.checkpoints.low_rank_rows import LowRankRows
from evomerge.checkpoints.placement import place_buffers
from evomerge.checkpoints.plain import plain_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.inference.generation import Decoding, answer_groups
from evomerge.inference.prefill import log_likelihoods
from evomerge.inference.reading import Prompt
from evomerge.inference.requests import Likelihood
from evomerge.merging.adapters.low_rank import base_recipe, family_of
from evomerge.merging.arithmetic.device import Residency
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.method import default_parameters, own_methods
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.hardware import model_shape, needs
from evomerge.report.plan import layer_bytes
from evomerge.search.settings.folder import open_store
from evomerge.search.workers import building

THREE = (FIRST, SECOND, THIRD)
METHODS = {name: method for name, method in own_methods().items() if not method.needs}
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 10, 11, 12], [5, 6, 13]]
DECODING = Decoding(max_new_tokens=4, batch_size=3)
SHORT = Decoding(max_new_tokens=2, batch_size=3)


def model_folder(kind: str, folder: Path) -> dict[str, Source]:
    """Two models of an architecture, of three layers."""
    name, settings = MODELS[kind]
    config = getattr(transformers, name)(**deeper(settings))
    for seed, source in enumerate(("a", "b")):
        save_model(config, folder / source, seed=seed)
    return {name: open_source(name, str(folder / name), place=name) for name in ("a", "b")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("models")
    config = tiny_config(num_hidden_layers=LAYERS, max_position_embeddings=64)
    return {
        name: open_source(name, str(save_model(config, root / name, seed=seed)), place=name)
        for seed, name in enumerate(("base", "a", "b"))
    }


def merge(method: str, sources: dict[str, Source]) -> StackRecipe:
    spec = METHODS[method]
    mixed = ("a", "b")[: spec.max_sources]
    blend = Blend(
        method=method,
        sources=mixed,
        base="base" if spec.needs_base else None,
        parameters=default_parameters(spec, mixed),
    )
    references = {name: source.reference for name, source in sources.items()}
    return StackRecipe.uniform(blend, sources=references, tokenizer="base", layers=LAYERS, seed=4)


def written(
    recipe: StackRecipe,
    sources: dict[str, Source],
    devices: Sequence[torch.device],
    residency: Residency = "mapped",
    layer_buffers: int = 2 * LAYERS,
) -> LiveModel:
    live = live_model(sources[recipe.tokenizer], devices, layer_buffers=layer_buffers)
    Materialiser(sources, residency=residency).write(recipe, live)
    return live


def everything_that_answers(live: LiveModel, how: Decoding = DECODING) -> tuple[list[str], list[Any]]:
    """Answers in a table with a common prefix, rows that end and rows that join; and likelihoods."""
    likelihoods = [
        Likelihood(Prompt("", "", ids, scored, None, "")) for ids, scored in ((PROMPTS[2], 2), (PROMPTS[0], 3))
    ]
    return answer_groups(live, [PROMPTS], how, lambda rows: None)[0], log_likelihoods(live, likelihoods)


@pytest.mark.parametrize("residency", ["device", "mapped"])
@pytest.mark.parametrize("method", nightly_but(["linear", "dare_ties"], METHODS))
def test_three_devices_make_what_one_makes(method: str, residency: Residency, sources: dict[str, Source]) -> None:
    one = written(merge(method, sources), sources, [FIRST], residency)
    three = written(merge(method, sources), sources, THREE, residency)
    assert one.tensors.keys() == three.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, three.tensors[name]), name
    assert everything_that_answers(one) == everything_that_answers(three)


def test_a_path_on_three_devices_is_that_on_one(sources: dict[str, Source]) -> None:
    recipe = path_recipe(PATH)
    one, three = (written(recipe, sources, devices) for devices in ([FIRST], THREE))
    assert everything_that_answers(one) == everything_that_answers(three)


# Where tensors lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", nightly_but(["llama"], MODELS))
def test_no_operation_meets_tensors_of_two_devices(kind: str, tmp_path: Path) -> None:
    sources = model_folder(kind, tmp_path)
    for source in sources.values():  # mapped as long as tensors have values
        source.read(next(iter(source.tensors)))
    with without_values():
        live = written(path_recipe([("a", layer) for layer in range(LAYERS)]), sources, (FIRST, SECOND))
        assert {tensor.device for tensor in live.tensors.values()} == {FIRST, SECOND}
        assert {tensor.device for tensor in live.outside.values()} == {FIRST}
        everything_that_answers(live, SHORT)
        if not sources["a"].reordering_problem:
            Materialiser(sources).write(path_recipe(PATH), live)
            everything_that_answers(live, SHORT)


def test_without_moving_what_layers_are_given_operations_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "compute_where_weights_are", lambda *_: None)
    sources = model_folder("llama", tmp_path)
    with without_values():
        live = live_model(sources["a"], (FIRST, SECOND))
        with pytest.raises(RuntimeError, match=r"two devices, cpu:\d and cpu:\d"):
            everything_that_answers(live)


def test_layers_with_one_number_lie_on_one_device(sources: dict[str, Source]) -> None:
    assert place_buffers(10, [5, 5, 5], 7, 3) == [1, 2, 2, 1, 2, 2, 1]
    live = written(path_recipe(PATH), sources_named(sources), THREE)
    assert live.stack is not None
    own = live.stack.devices[:LAYERS]
    assert live.stack.devices == own * 2
    # Every hop computes where layers of its number lie, whichever source it is of.
    assert [live.stack.devices[step.layer_buffer] for step in live.stack.path] == [own[layer] for _, layer in PATH]


@pytest.mark.parametrize(("buffers", "devices"), [(LAYERS, 2), (LAYERS, 3), (2 * LAYERS, 2), (2 * LAYERS + 1, 3)])
def test_the_plan_says_what_lies_where(buffers: int, devices: int, sources: dict[str, Source]) -> None:
    live, source = live_model(sources["base"], THREE[:devices], layer_buffers=buffers), sources["base"]
    assert live.stack is not None
    of_layers = layer_bytes(source, buffers)
    outside = sum(tensor.nbytes for tensor in live.outside.values())
    weights = outside + sum(of_layers)
    shape = model_shape(source.config, weights, weights, buffers, 2, layer_bytes(source, source.layers))
    held = dict.fromkeys(THREE[:devices], 0)
    held[FIRST] += outside
    for device, tensors in zip(live.stack.devices, live.stack.layer_buffers, strict=True):
        held[device] += sum(tensor.nbytes for tensor in tensors.values())
    assert [need.weights for need in needs(shape, [], "transformers", devices)] == list(held.values())


def sources_named(sources: dict[str, Source]) -> dict[str, Source]:
    return {name: sources[name] for name in ("a", "b")}


def test_sources_are_kept_for_the_device_of_their_layer(sources: dict[str, Source]) -> None:
    live = live_model(sources["base"], THREE)
    materialiser = Materialiser(sources, residency="device")
    materialiser.write(merge("linear", sources), live)
    assert live.stack is not None
    runners = materialiser._runner
    assert runners is not None
    for device, runner in runners.by_device.items():
        layers = {sources[name].roles[tensor].layer for name, tensor in runner._kept}
        on_it = {layer for layer in range(LAYERS) if live.stack.devices[layer] == device}
        assert layers == (on_it | {None} if device == FIRST else on_it)


# What else runs on them ----------------------------------------------------------------------------------------------


def test_rows_of_adapters_lie_beside_their_weights(tmp_path: Path) -> None:
    base = save_model(tiny_config(num_hidden_layers=LAYERS), tmp_path / "base")
    folders = {name: train(base, tmp_path / name, seed=seed, target_modules=LINEAR) for seed, name in enumerate("ab")}
    sources = opened(base, **folders)
    recipes = [recipe_of(sources, [arithmetic({"a": a, "b": b})] * LAYERS) for a, b in ((0.5, 1.0), (1.5, -1.0))]
    found = []
    for devices in ((FIRST,), THREE):
        live = live_model(sources["base"], devices, torch.float32)
        Materialiser(sources).write(base_recipe(recipes[0], sources, family_of(sources)), live)
        rows = rows_of(sources, live)
        with rows.mixed([shares_of(rows, sources, recipe) for recipe in recipes]), torch.inference_mode():
            rows.choose([0, 1])
            found.append(live.model(torch.tensor(PROMPTS[:1] * 2)).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][1])


def test_rows_of_adapters_meet_no_other_device(tmp_path: Path) -> None:
    base = save_model(tiny_config(num_hidden_layers=LAYERS), tmp_path / "base")
    sources = opened(base, a=train(base, tmp_path / "a", seed=1, target_modules=LINEAR))
    changes = [change for of_weight in sources["a"].changes.values() for change in of_weight]
    ranks = sum(change.down.shape[0] for change in changes if isinstance(change, LowRank))
    kept = [map_file(change.down.file) for change in changes if isinstance(change, LowRank)]  # while there are values
    with without_values():
        live = live_model(sources["base"], (FIRST, SECOND), torch.float32)
        rows = LowRankRows(live, [sources["a"]], family_of(sources).weights)
        assert {pair.down.device for pair in rows._pairs} == {FIRST, SECOND}
        with rows.mixed([torch.ones(ranks), torch.ones(ranks)]):
            rows.choose([0, 1])
            live.model(torch.zeros(2, 4, dtype=torch.int64, device=FIRST))
    assert kept


def test_another_configuration_runs_the_same_weights_on_their_devices(sources: dict[str, Source]) -> None:
    live = written(merge("linear", sources), sources, THREE)
    assert everything_that_answers(configured(live, sources["a"])) == everything_that_answers(live)


def test_an_export_is_read_again_over_the_devices(sources: dict[str, Source], tmp_path: Path) -> None:
    recipe = merge("linear", sources)
    write_model(recipe, sources, tmp_path / "out", texts={})
    source = open_source("out", str(tmp_path / "out"), place="out")
    one, three = (plain_model(source, devices, None) for devices in ((FIRST,), THREE))
    assert everything_that_answers(one) == everything_that_answers(three)


def test_what_is_not_finite_is_seen_on_every_device() -> None:
    tensors = {str(number): torch.full((3,), float(number)) for number in range(4)}
    tensors["2"][1] = torch.nan
    assert _suspects(tensors) == ["2"]


@pytest.mark.nightly
@pytest.mark.parametrize("space", [{"method": "task_arithmetic"}, {"kind": "data_flow_space", "repeats": 2}])
def test_a_search_over_three_devices_is_that_over_one(
    space: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its export is verified over the devices as well."""
    scores = []
    for devices in ((FIRST,), THREE):
        monkeypatch.setattr(building, "choose_devices", lambda file, devices=devices: devices)
        folder = tmp_path / str(len(devices))
        folder.mkdir()
        assert evomerge("search", search_file(folder, space=space), "--dir", folder / "search") == 0
        with open_store(folder / "search") as store:
            rows = list(store.candidates())
            items = [
                [{metric: values.tolist() for metric, values in scored.metrics.items()} for scored in of_row]
                for of_row in (store.scores(row.number, "search") for row in rows)
            ]
            scores.append([(row.recipe_hash, of_items) for row, of_items in zip(rows, items, strict=True)])
        last = max(row.number for row in rows if row.status == "done")
        assert evomerge("export", folder / "search", folder / "out", "--candidate", f"c{last:04d}") == 0
    assert scores[0] == scores[1]
    assert any(of_items for _, of_items in scores[0])
