"""RegMean: its contract, its formula, what it does without inputs, and searches that run their texts once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers_miniature import (
    evomerge,
    export_of,
    kept_in,
    newest_scored,
    planned_evidence,
    search_file,
    short_search_file,
    write_texts,
)
from torch import Tensor

from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.measured import inputs
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.measured.inputs import LayerInput
from evomerge.merging.site import Ref, Site
from evomerge.method import find_method
from evomerge.recipes.stack import Blend, Role
from evomerge.store import Store
from evomerge.testing.methods import MethodContract

REGMEAN = find_method("regmean", "m")
THREADS = WorkerThreads(1)


class TestRegMean(MethodContract):
    method = REGMEAN
    tolerance: ClassVar[float] = 1e-5
    whole: ClassVar[Mapping[str, float] | None] = {"weight": 1.0}


class Given:
    """What layers are given, by source."""

    def __init__(self, grams: Mapping[str, Any], axis: int = 1) -> None:
        self._grams, self._axis = grams, axis

    def of(self, ref: Ref) -> LayerInput:
        gram = torch.tensor(self._grams[ref[0]], dtype=torch.float32)
        return LayerInput(gram, gram.diagonal().sqrt(), self._axis)


def grams(count: int, width: int, seed: int = 0, tokens: int | None = None) -> list[Any]:
    """Of inputs whose channels hang together, of other tokens for each source."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        rows = random.standard_normal((tokens or 3 * width, width)) @ random.standard_normal((width, width))
        made.append((rows.T @ rows / len(rows)).astype(np.float32).astype(np.float64))
    return made


def fine_tunes(shape: tuple[int, int], count: int) -> list[Tensor]:
    """Sources that differ by a fiftieth of their size."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=random)
    return [base + 0.02 * torch.randn(shape, generator=random) for _ in range(count)]


def merged(sources: list[Tensor], given: Given, weights: list[float], off_diagonal: float) -> Tensor:
    names = tuple(f"s{i}" for i in range(len(sources)))
    held = dict(zip(names, sources, strict=True))
    parameters = {"weight": dict(zip(names, weights, strict=True)), "off_diagonal": off_diagonal}
    blend = Blend(method="regmean", sources=names, parameters=parameters)
    site = Site("w", Role("mlp", 0), tuple(sources[0].shape), {name: (name, "w") for name in names})
    facts = Facts(site, Weights(lambda ref: held[ref[0]], THREADS), Evidence(), 0, given)
    plan = REGMEAN.plan(facts, blend)
    out = torch.empty(sources[0].shape)
    THREADS.run([TensorJob(plan, [held[name] for name in plan.inputs], out)])
    return out


def plainly(sources: list[Any], of_inputs: list[Any], weights: list[float], off_diagonal: float) -> Any:
    """Equation 2 and section 3.3, without a ridge."""
    above, below = np.zeros(sources[0].shape), np.zeros(of_inputs[0].shape)
    for weight, source, gram in zip(weights, sources, of_inputs, strict=True):
        mixed = weight * (off_diagonal * gram + (1 - off_diagonal) * np.diag(np.diag(gram)))
        above, below = above + source @ mixed, below + mixed
    return np.linalg.solve(below.T, above.T).T


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1000, 530), (530, 1000)])
def test_is_the_plain_formula(shape: tuple[int, int]) -> None:
    """To a part in a thousand of the change: the ridge is towards the mean, from which nothing is far."""
    sources, of_inputs, weights = fine_tunes(shape, 2), grams(2, shape[1]), [0.7, 1.2]
    made = merged(sources, Given(dict(zip(("s0", "s1"), of_inputs, strict=True))), weights, 0.8)
    wanted = plainly([source.double().numpy() for source in sources], of_inputs, weights, 0.8)
    assert np.abs(made.numpy() - wanted).max() < 1e-3 * np.abs(wanted - sources[0].numpy()).max()


def test_a_layer_that_stands_the_other_way_is_the_same_layer() -> None:
    sources, of_inputs = fine_tunes((40, 60), 3), dict(zip(("s0", "s1", "s2"), grams(3, 60), strict=True))
    one = merged(sources, Given(of_inputs), [0.7, 1.2, 0.4], 0.8)
    other = merged([source.T.contiguous() for source in sources], Given(of_inputs, axis=0), [0.7, 1.2, 0.4], 0.8)
    assert torch.allclose(one, other.T, atol=1e-6)


def test_equal_inputs_give_the_weighted_mean() -> None:
    sources, (gram,) = fine_tunes((40, 60), 2), grams(1, 60)
    made = merged(sources, Given({"s0": gram, "s1": gram}), [0.5, 1.5], 0.9)
    assert torch.allclose(made, 0.25 * sources[0] + 0.75 * sources[1], atol=1e-6)


def test_inputs_that_no_text_has_leave_the_weighted_mean() -> None:
    """Half of the channels are never seen, by any source: there the sum of Gram matrices is singular."""
    sources, of_inputs = fine_tunes((40, 60), 2), grams(2, 60)
    for gram in of_inputs:
        gram[30:] = gram[:, 30:] = 0.0
    made = merged(sources, Given(dict(zip(("s0", "s1"), of_inputs, strict=True))), [0.5, 1.5], 1.0)
    mean = 0.25 * sources[0] + 0.75 * sources[1]
    assert torch.allclose(made[:, 30:], mean[:, 30:], atol=1e-6)
    seen = plainly([s[:, :30].double().numpy() for s in sources], [g[:30, :30] for g in of_inputs], [0.5, 1.5], 1.0)
    assert np.abs(made[:, :30].numpy() - seen).max() < 1e-3 * np.abs(seen - mean[:, :30].numpy()).max()


def test_a_source_that_no_text_reached_does_not_count_where_others_were() -> None:
    """As an expert that is never chosen: its layer has no say, and with no text at all the mean is left."""
    sources, (gram,) = fine_tunes((40, 60), 2), grams(1, 60)
    nothing = np.zeros_like(gram)
    assert torch.allclose(merged(sources, Given({"s0": gram, "s1": nothing}), [1.0, 1.0], 0.9), sources[0], atol=1e-4)
    alone = merged(sources, Given({"s0": nothing, "s1": nothing}), [1.0, 1.0], 0.9)
    assert torch.allclose(alone, (sources[0] + sources[1]) / 2, atol=1e-6)


# ---- searched --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search by RegMean in the folder ``search``, of its texts beside it."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_texts(folder / "texts.jsonl", slice(6))
    calibration = {"file": "texts.jsonl", "prompts": 6, "tokens": 64}
    file = short_search_file(folder, space={"method": "regmean"}, calibration=calibration)
    assert evomerge("search", file, "--dir", folder / "search") == 0
    return folder


def test_a_calibrated_method_is_searched_resumed_and_exported_and_runs_its_texts_once(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = kept_in(calibrated / "search/evidence")
    assert made < planned_evidence(calibrated / "search") < 1.5 * made  # as if q, k and v had an input each
    monkeypatch.setattr(inputs, "observed", lambda *a, **k: pytest.fail("ran over the texts again"))
    search = calibrated / "search"
    assert evomerge("resume", search, "--set", "budget.candidates=10") == 0
    row = newest_scored(search)
    with Store.open(search / "search.db") as store:
        digest = store.search().fingerprints["calibration"]
        runs = [event.payload["sources"] for event in store.events(kinds=["calibrated"])]
    assert runs == [["maths", "japanese"]] * 2  # of the search and of its resumption; nothing is asked of the base
    assert json.loads(row.recipe)["calibration"] == digest
    assert export_of(row, search, tmp_path / "out") == 0
    monkeypatch.undo()
    recipe = tmp_path / "out" / "recipe.yaml"
    assert evomerge("merge", recipe, tmp_path / "again") == 2
    assert "--calibration FILE" in capsys.readouterr().err
    texts = ("--calibration", calibrated / "texts.jsonl", "--prompts", 6, "--tokens", 64)
    assert evomerge("merge", recipe, tmp_path / "again", *texts) == 0
    ours, theirs = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again"))
    assert ours == theirs


def test_an_export_that_is_not_verified_needs_the_evidence_and_not_the_texts(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search, texts, away = calibrated / "search", calibrated / "texts.jsonl", tmp_path / "texts.jsonl"
    with Store.open(search / "search.db") as store:
        row = max((row for row in store.candidates() if row.status == "done"), key=lambda row: row.number)
    export = ("export", search, "--candidate", f"c{row.number:04d}", "--no-verify")
    texts.rename(away)
    try:
        assert evomerge(*export, tmp_path / "out") == 0
        shutil.copytree(search, tmp_path / "search")
        shutil.rmtree(tmp_path / "search" / "evidence")
        capsys.readouterr()
        assert evomerge(export[0], tmp_path / "search", *export[2:], tmp_path / "again") == 2
    finally:
        away.rename(texts)
    assert "calibration.file" in capsys.readouterr().err
    assert "calibration" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_search_does_not_go_on_with_other_texts(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = calibrated / "texts.jsonl"
    before = texts.read_text()
    more = before.replace("{", '{"note": "", ', 1)  # the same texts in other words of JSON
    other = before.replace("[", "(", 1).replace('"text": "', '"text": "? ', 1)
    for content, code in ((more, 0), (other, 2)):
        texts.write_text(content)
        try:
            assert evomerge("resume", calibrated / "search", "--set", "budget.candidates=12") == code
        finally:
            texts.write_text(before)
    assert "are not the texts that the search began with" in capsys.readouterr().err


def test_a_calibrated_method_wants_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("validate", search_file(tmp_path, space={"method": "regmean"})) == 2
    assert "calibration" in "".join(capsys.readouterr())
    file = search_file(tmp_path, space={"method": "regmean"}, calibration={"file": "nowhere.jsonl"})
    assert evomerge("validate", file) == 2
    assert "calibration.file" in "".join(capsys.readouterr())
