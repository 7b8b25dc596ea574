"""How far a merge is from its base: the plain formula over the weights that were written, whatever path they lie on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_checkpoints import edit_tensors, save_model, tiny_config
from helpers_miniature import MINIATURES, evomerge, json_of, search_file, short_search_file
from torch import Tensor

from evaluators.change import ChangeSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.parts import fold_in
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.arithmetic import scans
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured import change as change_file
from evomerge.merging.measured.change import change_of
from evomerge.merging.measured.facts import Weights
from evomerge.method import default_parameters, find_method
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.workers.worker import Worker
from evomerge.store import Store

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A base and two tunes of it."""
    root = tmp_path_factory.mktemp("models")
    config = tiny_config(hidden_size=16, intermediate_size=15, num_hidden_layers=LAYERS)
    for seed, name in enumerate(("base", "a", "b")):
        save_model(config, root / name)
        random = torch.Generator().manual_seed(seed)

        def move(tensors: dict[str, Tensor], random: torch.Generator = random, by: float = 0.01 * seed) -> None:
            for tensor in tensors.values():
                tensor.add_(by * torch.randn(tensor.shape, generator=random))

        edit_tensors(root / name, move)
    return {name: open_source(name, str(root / name), place=name) for name in ("base", "a", "b")}


def blend(method: str, weight: float = 0.6) -> Blend:
    values: dict[str, Any] = default_parameters(find_method(method, "test"), ("a", "b"))
    values["weight"] = {"a": weight, "b": 0.3}
    base = "base" if find_method(method, "test").needs_base else None
    return Blend(method=method, sources=("a", "b"), base=base, parameters=values)


def uniform(mix: Blend) -> StackRecipe:
    return StackRecipe.uniform(mix, sources=dict.fromkeys(("base", "a", "b"), ""), tokenizer="base", layers=LAYERS)


def path_of(layers: list[tuple[str, int]], scales: list[float]) -> StackRecipe:
    alone = {
        name: Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}}) for name in ("base", "a")
    }
    return StackRecipe.compose(
        sources=dict.fromkeys(("base", "a", "b"), ""),
        tokenizer="base",
        embedding=alone["a"],
        hops=[(layer, *[alone[name]] * 3) for name, layer in layers],
        norm=alone["base"],
        head=alone["a"],
        scales=scales,
        scaling="update",
    )


def by_formula(model: dict[str, Tensor], base: Source) -> float:
    """Over the tensors that both have, in float64."""
    common = [name for name in model if name in base.tensors]
    deltas = [(model[name].double() - base.read(name).double()).flatten() for name in common]
    weights = [base.read(name).double().flatten() for name in common]
    return float(torch.cat(deltas).norm() / torch.cat(weights).norm())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_that_of_the_plain_formula(sources: dict[str, Source], method: str, dtype: torch.dtype) -> None:
    live, maker = live_model(sources["base"], CPU, dtype), Materialiser(sources, base="base")
    for weight in (0.6, 1.4):
        recipe = uniform(blend(method, weight))
        maker.write(recipe, live)
        assert maker.change == pytest.approx(by_formula(live.tensors, sources["base"]), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 1023, 1025, (1 << 21) + 3])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_sums_of_any_length_and_dtype(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    random = torch.Generator().manual_seed(count)
    base, made = (torch.randn(count, generator=random).to(dtype) for dtype in dtypes)
    weights = Weights(lambda ref: base, WorkerThreads(2))
    delta = (made.float() - base.float()).double()
    found = weights.scan_tensors((base, made), np.zeros(1), scans.change)[0]
    assert found == pytest.approx(float(delta @ delta), rel=1e-12)
    assert change_file.squared_distance(base, made, 1000) == pytest.approx(found, rel=1e-12)
    size = weights.scan_tensors((base,), np.zeros(1), scans.squares)[0]
    assert size == pytest.approx(float(base.double() @ base.double()), rel=1e-12)


def test_without_a_base_nobody_measures(sources: dict[str, Source]) -> None:
    maker = Materialiser(sources)
    maker.write(uniform(blend("linear")), live_model(sources["base"], CPU))
    assert maker.change is None


def test_neither_threads_nor_what_came_before_count(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, found = uniform(blend("ties")), set()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        fresh = Materialiser(sources, base="base")
        fresh.write(recipe, live_model(sources["base"], CPU))
        used, live = Materialiser(sources, base="base"), live_model(sources["base"], CPU)
        for other in (uniform(blend("linear")), path_of([("a", 1)] * LAYERS, [1.0] * LAYERS), recipe):
            used.write(other, live)
        found |= {fresh.change, used.change}
    assert len(found) == 1


def test_what_is_as_before_is_not_read_again(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    square = change_file.ChangeMeter._square

    def counted(self: Any, written: Any) -> float:
        read.append(written.name)
        return square(self, written)

    monkeypatch.setattr(change_file.ChangeMeter, "_square", counted)
    maker, live = Materialiser(sources, base="base"), live_model(sources["base"], CPU)
    mixes = [blend("task_arithmetic", 0.6), blend("task_arithmetic", 0.9)]

    def recipe(middle: Blend) -> StackRecipe:
        hops = [(i, *[mixes[0] if i != 1 else middle] * 3) for i in range(LAYERS)]
        given = uniform(mixes[0])
        return StackRecipe.compose(
            sources=given.sources, tokenizer="base", embedding=mixes[0], hops=hops, norm=mixes[0], head=mixes[0]
        )

    maker.write(recipe(mixes[0]), live)
    assert len(read) == len(sources["base"].tensors)
    read.clear()
    maker.write(recipe(mixes[1]), live)
    assert read
    assert all(".layers.1." in name for name in read)
    assert maker.change == pytest.approx(by_formula(live.tensors, sources["base"]), rel=1e-9)


def test_hops_are_measured_from_the_layer_of_their_number_with_their_scale(sources: dict[str, Source]) -> None:
    live, maker = live_model(sources["base"], CPU, layer_buffers=4), Materialiser(sources, base="base")
    recipe = path_of([("a", 1), ("base", 0), ("a", 1), ("a", 2), ("base", 2)], [1.0, 0.8, 0.8, 1.0, 1.3])
    maker.write(recipe, live)
    model = {name: tensor.clone() for name, tensor in live.tensors.items()}
    for number, (hop, factor) in enumerate(zip(recipe.hops, recipe.factors, strict=True)):
        for name, fold in sources["base"].folds.items():
            prefix = f"model.layers.{hop.layer_of('base')}."
            if name.startswith(prefix):
                fold_in(model[name.replace(prefix, f"model.layers.{number}.")], factor, fold)
    assert len(recipe.hops) > sources["base"].layers
    assert maker.change == pytest.approx(by_formula(model, sources["base"]), rel=1e-9)
    exported = dict(Materialiser(sources).tensors(recipe))
    assert maker.change == pytest.approx(by_formula(exported, sources["base"]), rel=1e-9)


def test_a_model_that_was_loaded_counts_as_one_that_was_written(sources: dict[str, Source], tmp_path: Path) -> None:
    builder = StackBuilder(BuildContext(sources, "base", base="base"))
    recipe = uniform(blend("ties"))
    live = builder.write(recipe)
    assert live.change is not None
    builder.export(recipe, tmp_path / "out", texts={})
    assert builder.reload(tmp_path / "out").change == live.change
    assert change_of(live, sources["base"], sources["base"]) == live.change


def test_a_path_longer_than_the_base_that_was_loaded_counts_as_one_that_was_written(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    builder = StackBuilder(BuildContext(sources, "base", base="base", layers=4))
    recipe = path_of([("a", 1), ("base", 0), ("a", 1), ("a", 2), ("base", 2)], [1.0] * 5)
    assert len(recipe.hops) > sources["base"].layers
    written = builder.write(recipe).change
    builder.export(recipe, tmp_path / "out", texts={})
    assert builder.reload(tmp_path / "out").change == pytest.approx(written, rel=1e-9)


def scored(live: LiveModel) -> float:
    return float(score(ChangeSettings().build(), live, "search", [0]).scores["change"][0])


def test_the_evaluator_says_what_was_measured(sources: dict[str, Source]) -> None:
    live = StackBuilder(BuildContext(sources, "base", base="base")).write(uniform(blend("ties")))
    assert scored(live) == np.float32(live.change)
    live.change = None
    with pytest.raises(InputError, match="not measured from a base"):
        scored(live)


# --- in searches


def test_every_candidate_of_a_search_with_a_base_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = {"evaluator": "change", "metric": "change"}
    file = short_search_file(
        tmp_path,
        budget={"candidates": 6},
        features={"distance": measure | {"range": [0, 0.5]}},
        constraints={"near": measure | {"at_most": 0.15}},
    )
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    with Store.open(tmp_path / "s" / "search.db") as store:
        rows = store.candidates()
    base = open_source("base", str(MINIATURES / "base"), place="base")
    maths = open_source("maths", str(MINIATURES / "maths"), place="maths")
    assert rows[0].change == 0.0
    assert rows[1].change == pytest.approx(by_formula({n: maths.read(n) for n in maths.tensors}, base), rel=1e-9)
    for row in rows:
        assert row.objectives["distance"].mean == row.objectives["near"].mean == np.float32(row.change)
    assert not rows[1].eligible
    listed = json_of(capsys, "top", tmp_path / "s", "--all", "--json")
    assert [entry["change"] for entry in listed] == [row.change for row in rows]
    assert evomerge("show", tmp_path / "s", "c0001") == 0
    assert "change: 19.8% of the base" in capsys.readouterr().out
    assert evomerge("export", tmp_path / "s", tmp_path / "out", "--candidate", "c0005") == 0
    assert "near, distance (change), 1 search items score exactly as recorded" in capsys.readouterr().out


def test_it_needs_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feature = {"evaluator": "change", "metric": "change", "range": [0, 1]}
    file = search_file(tmp_path, base=None, space={"method": "linear"}, features={"distance": feature})
    assert evomerge("validate", file) == 2
    assert "features.distance measures how far candidates are from the base, and there is none" in (
        capsys.readouterr().err.replace(":", "").replace("\n", " ")
    )


def test_a_worker_reports_it(sources: dict[str, Source]) -> None:
    from evomerge.merging.building.builders import Builders
    from evomerge.search.work.jobs import Job, Measured

    worker = Worker("w", Builders(BuildContext(sources, "base", base="base")), [])
    recipe = uniform(blend("ties"))
    result = worker.run(Job(0, 1, recipe, [])).result
    assert isinstance(result, Measured)
    assert result.change == StackBuilder(BuildContext(sources, "base", base="base")).write(recipe).change
