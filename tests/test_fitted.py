"""Coefficients that are fitted to right answers: against plain torch, as evidence, and in searches."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers_miniature import MINIATURES, ROOT, SHORT_MATHS, evomerge, export_of, short_search_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from evomerge.checkpoints.backward import Listening, no_listener
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.adapters.low_rank import coefficients, family_of, low_rank_problem
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.fitting.coefficients import HIGH, Coefficients, TensorSpace, share
from evomerge.merging.measured.evidence import Evidence
from evomerge.methods.fitted import FITTED
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.store import Store
from evomerge.testing.methods import MethodContract

pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS, ADAPTERS = ("maths", "japanese"), ("steps_ja", "kanji")
SEARCH_ITEMS = ROOT / "evaluators" / "tasks" / "data" / "mini_math_ja.search.jsonl"


class TestFitted(MethodContract):
    method = FITTED
    whole: ClassVar[Mapping[str, float] | None] = None


class Texts:
    """A fit to made-up texts: the cross entropy of every token, of other texts in every step."""

    digest = "made up"
    steps, rate = 4, 0.1

    def __init__(self, ends_at: int | None = None) -> None:
        self._ends_at = ends_at

    def ids(self, step: int) -> Tensor:
        return torch.randint(5, 500, (3, 12), generator=torch.Generator().manual_seed(step))

    def passes(self, live: LiveModel, step: int, listening: Listening = no_listener) -> Generator[Tensor]:
        if step == self._ends_at:
            raise KeyboardInterrupt
        for row in self.ids(step):  # in parts
            with listening(False):
                with torch.enable_grad():
                    part = loss_of(live.model(input_ids=row[None]).logits, row[None]) / 3
                yield part


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / name), place=name) for name in ("base", *EXPERTS)}


def builder_of(sources: Mapping[str, Source], fit: Texts, evidence: Evidence | None = None) -> StackBuilder:
    context = BuildContext(sources, "base", evidence or Evidence(), dtype=torch.float32, fit=fit)
    return StackBuilder(context)


def recipe_of(sources: Mapping[str, Source], fit: str = Texts.digest, weight: float = 1.0) -> StackRecipe:
    blend = Blend(method="fitted", sources=EXPERTS, base="base", parameters={"weight": dict.fromkeys(EXPERTS, weight)})
    references = {name: source.reference for name, source in sources.items()}
    return StackRecipe.uniform(
        blend, sources=references, tokenizer="base", layers=sources["base"].layers, dtype="float32", fit=fit
    )


def found(builder: StackBuilder) -> Mapping[str, Tensor]:
    assert isinstance(builder._coefficients, Coefficients)
    return builder._coefficients.found("base", EXPERTS)


@pytest.fixture(scope="module")
def fitted(sources: Mapping[str, Source]) -> Mapping[str, Tensor]:
    return found(builder_of(sources, Texts()))


def test_it_is_what_autograd_and_the_adam_of_torch_find(
    sources: Mapping[str, Source], fitted: Mapping[str, Tensor]
) -> None:
    """Weights as functions of leaves, without hooks, passes, plans or evidence."""
    models = {name: weights_of(name) for name in ("base", *EXPERTS)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MINIATURES / "base", dtype=torch.float32)
    tensors = [name for name in fitted if name != "losses"]
    leaves = {name: torch.full((2,), 0.5, requires_grad=True) for name in tensors}
    fit, losses = Texts(), []
    adam = torch.optim.Adam(leaves.values(), lr=fit.rate)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: share(step, fit.steps))
    for step in range(fit.steps):
        merged = {
            name: models["base"][name]
            + sum(c * (models[one][name] - models["base"][name]) for c, one in zip(leaves[name], EXPERTS, strict=True))
            for name in tensors
        }
        logits = functional_call(model, merged, kwargs={"input_ids": fit.ids(step)}).logits
        loss = torch.stack([loss_of(a[None], b[None]) for a, b in zip(logits, fit.ids(step), strict=True)]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
        losses.append(loss.item())
    assert fitted["losses"].tolist() == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    far = [float((fitted[name] - leaves[name].detach()).abs().max()) for name in tensors]
    # Where a derivative is all but zero its sign is rounding, and Adam's step goes by the sign.
    assert sum(one > 1e-3 for one in far) <= len(far) // 50
    assert max(float((fitted[name] - 0.5).abs().max()) for name in tensors) > 0.1


def weights_of(name: str) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(MINIATURES / name, dtype=torch.float32)
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def test_the_learning_rate_falls_to_nothing() -> None:
    shares = [share(step, 100) for step in range(100)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.5)
    assert 0 < shares[99] < 1e-3
    assert shares == sorted(shares, reverse=True)


def test_the_model_is_the_base_and_so_much_of_each_change(
    sources: Mapping[str, Source], fitted: Mapping[str, Tensor]
) -> None:
    live = builder_of(sources, Texts()).write(recipe_of(sources, weight=0.5))
    models = {name: weights_of(name) for name in ("base", *EXPERTS)}
    for name, tensor in live.tensors.items():
        wanted = models["base"][name].clone()
        for number, one in enumerate(EXPERTS):
            wanted += 0.5 * float(fitted[name][number]) * (models[one][name] - models["base"][name])
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_equal_items_give_equal_bits_and_who_is_interrupted_begins_again(
    sources: Mapping[str, Source], fitted: Mapping[str, Tensor], tmp_path: Path
) -> None:
    contents = {name: name for name in sources}
    with pytest.raises(KeyboardInterrupt):
        found(builder_of(sources, Texts(ends_at=2), Evidence(tmp_path, contents)))
    assert not list(tmp_path.glob("*"))
    again = found(builder_of(sources, Texts(), Evidence(tmp_path, contents)))
    assert again.keys() == fitted.keys()
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)
    (kept,) = tmp_path.glob("*.safetensors")
    known = found(builder_of(sources, Texts(ends_at=0), Evidence(tmp_path, contents)))  # which would not come far
    assert all(torch.equal(known[name], fitted[name]) for name in fitted)
    kept.write_bytes(kept.read_bytes()[:-64])
    mended = found(builder_of(sources, Texts(), Evidence(tmp_path, contents)))
    assert all(torch.equal(mended[name], fitted[name]) for name in fitted)


def test_a_recipe_of_another_fit_is_refused(sources: Mapping[str, Source]) -> None:
    builder = builder_of(sources, Texts(ends_at=0))
    with pytest.raises(InputError, match=r"recipe.fit: is made by a fit with the digest other.*has made up"):
        builder.materialiser.write(recipe_of(sources, fit="other"), builder.live)


def test_a_source_has_a_number_in_each_tensor_that_it_changes(sources: Mapping[str, Source]) -> None:
    changed = replace(sources["maths"], tensors={**sources["maths"].tensors, NORM: sources["base"].tensors[NORM]})
    space = TensorSpace({**sources, "maths": changed}, "base", "base", EXPERTS)
    names = [parameter.name for parameter in space.parameters]
    assert f"{NORM}.japanese" in names
    assert f"{NORM}.maths" not in names
    genome = torch.linspace(0, HIGH, len(names)).double().numpy()
    weights = dict(space.by_tensor(genome))
    assert weights[NORM][0] == 0.0
    blend = space.decode(genome).blend_for(sources["base"].roles[NORM], NORM)
    assert (blend.sources, blend.value("weight", "japanese")) == (("japanese",), weights[NORM][1])


def test_adapters_are_mixed_by_it_in_merged_weights_and_in_rows_alike() -> None:
    zoo = ROOT / "examples" / "zoo"
    references = {"base": str(zoo / "base"), **{name: f"{zoo / 'base'}+{zoo / name}" for name in ADAPTERS}}
    sources = {name: open_source(name, reference, place=name) for name, reference in references.items()}
    builder = builder_of(sources, Texts())
    blend = Blend(method="fitted", sources=ADAPTERS, base="base", parameters={"weight": dict.fromkeys(ADAPTERS, 0.5)})
    recipe = StackRecipe.uniform(
        blend, sources=references, tokenizer="base", layers=6, dtype="float32", fit=Texts.digest
    )
    live, family = builder.write(recipe), family_of(sources)
    assert isinstance(builder._coefficients, Coefficients)
    by_tensor = builder._coefficients.found("base", ADAPTERS)
    assert set(by_tensor) - {"losses"} == set(family.weights)  # nothing of what no adapter changes
    for weight in family.weights:
        wanted = sources["base"].read(weight).double()
        for number, name in enumerate(ADAPTERS):
            ((left, right, scale),) = sources[name].low_rank(weight)
            wanted += 0.5 * by_tensor[weight][number] * scale * (left.double() @ right.double())
        assert torch.allclose(live.tensors[weight].double(), wanted, atol=1e-6), weight
    assert low_rank_problem(recipe, sources) is None
    rows = coefficients(recipe, sources, family, builder.materialiser.fitted_for(recipe))
    expected = torch.stack([0.5 * by_tensor[weight] for weight in family.weights])
    assert torch.allclose(rows, expected.float())
    with pytest.raises(InputError, match="fit: is needed for"):
        coefficients(recipe, sources, family)


NORM = "model.layers.2.input_layernorm.weight"


# ---- searched --------------------------------------------------------------------------------------------------------


def write_items(path: Path, numbers: slice) -> None:
    path.write_text("\n".join(SEARCH_ITEMS.read_text("utf-8").splitlines()[numbers]) + "\n", "utf-8")


def fitting_file(folder: Path, method: str = "task_arithmetic") -> Path:
    """A search with a fit of three steps."""
    write_items(folder / "fit.jsonl", slice(100, 124))
    fit = {"file": "fit.jsonl", "steps": 3, "drawn": 4}
    return short_search_file(folder, objectives=SHORT_MATHS, space={"method": method}, fit=fit, confirm={"top": 1})


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    assert evomerge("search", fitting_file(folder), "--dir", folder / "search") == 0
    return folder


def test_a_search_with_a_fit_has_its_baseline_which_is_resumed_exported_and_merged_alike(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = searched / "search"
    monkeypatch.setattr(Coefficients, "_fitted", lambda *a: pytest.fail("fitted again"))
    assert evomerge("resume", search, "--set", "budget.candidates=10") == 0
    with Store.open(search / "search.db") as store:
        (row,) = (row for row in store.candidates(step=0) if row.label == "fitted")
        digest = store.search().fingerprints["fit"]
        runs = [event.payload for event in store.events(kinds=["fitted"])]
    assert (row.origin, row.status, row.genome) == ("fit", "done", None)
    assert json.loads(row.recipe)["fit"] == digest
    assert runs == [{"digest": digest, "items": 24, "steps": 3, "baselines": 1}] * 2
    assert export_of(row, search, tmp_path / "out") == 0
    monkeypatch.undo()
    recipe = tmp_path / "out" / "recipe.yaml"
    capsys.readouterr()
    assert evomerge("merge", recipe, tmp_path / "again") == 2
    assert "--fit FILE" in capsys.readouterr().err
    assert evomerge("merge", recipe, tmp_path / "again", "--fit", searched / "search.yaml") == 0
    ours, theirs = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again"))
    assert ours == theirs


def test_a_search_does_not_go_on_with_other_items(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (searched / "fit.jsonl").read_text("utf-8")
    write_items(searched / "fit.jsonl", slice(101, 125))
    try:
        assert evomerge("resume", searched / "search", "--set", "budget.candidates=12") == 2
    finally:
        (searched / "fit.jsonl").write_text(before, "utf-8")
    assert "are not the items that the search began with" in capsys.readouterr().err


def test_items_of_a_task_that_candidates_are_scored_on_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fitting_file(tmp_path)
    write_items(tmp_path / "fit.jsonl", slice(3, 9))
    assert evomerge("validate", file) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "fit.jsonl, line 1 is an item of the search split of objectives.mini_math_ja too" in said


def test_a_method_that_is_fitted_wants_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("validate", short_search_file(tmp_path, space={"method": "fitted"})) == 2
    assert "fitted is fitted to right answers, and there are none" in " ".join(capsys.readouterr().err.split())


@pytest.mark.nightly
def test_a_search_around_the_fit_begins_with_it_and_exports_what_it_finds(tmp_path: Path) -> None:
    search = tmp_path / "search"
    assert evomerge("search", fitting_file(tmp_path, "fitted"), "--dir", search) == 0
    with Store.open(search / "search.db") as store:
        labels = [row.label for row in store.candidates(step=0)]
        assert labels == ["base", *EXPERTS, "uniform average", "fitted defaults"]
        row = max((row for row in store.candidates() if row.status == "done"), key=lambda row: row.number)
    assert export_of(row, search, tmp_path / "out") == 0
