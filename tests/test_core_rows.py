"""Merges in core space beside the weights of the base, several in one forward pass, against those written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from test_adapters import GPT2, train
from test_core_space import ADAPTED, ADAPTERS, GPT2_ADAPTERS, blend_of, recipe_with
from test_low_rank_rows import arithmetic, loaded, logits, opened, recipe_of
from test_together import SMALL, Asking, jobs_of, measured, save, start
from transformers import LlamaConfig

from evaluators.change import ChangeSettings
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.checkpoints.low_rank_rows import CoreRows
from evomerge.checkpoints.source import Source
from evomerge.merging import core_space
from evomerge.merging.adapters.low_rank import CoreMerges, base_recipe, family_of, low_rank_problem
from evomerge.merging.building.builders import BuildContext, Builders
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.search.work.jobs import Failed, Measured, Task
from evomerge.search.workers.worker import Worker
from evomerge.steps.scale import SCALE

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

METHODS = ("ties", "dare_ties", "karcher", "linear", "breadcrumbs", "della")
HEAD = {**ADAPTERS, "wide": {**ADAPTERS["wide"], "target_modules": ["q_proj", "down_proj", "o_proj"]}}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_model(tiny_config() if request.param == "llama" else GPT2, folder / "base")
    adapters = HEAD if request.param == "llama" else GPT2_ADAPTERS
    return opened(base, **{n: train(base, folder / n, seed=i, **each) for i, (n, each) in enumerate(adapters.items())})


def rows_of(sources: dict[str, Source], live: LiveModel) -> tuple[CoreRows, CoreMerges]:
    merges = CoreMerges(Materialiser(sources).core_space, sources, family_of(sources))
    return CoreRows(live, merges.bases), merges


def recipes_of(sources: dict[str, Source]) -> list[StackRecipe]:
    blends = [(blend_of(method), blend_of(method, weight=0.7)) for method in METHODS]
    scaled = blends[0][0].model_copy(update={"steps": (BlendStep(name="scale", parameters={"factor": 1.6}),)})
    return [recipe_with(sources, *pair) for pair in [(scaled, blends[0][1]), *blends[1:]]]


def test_every_row_has_the_logits_of_its_own_merge(sources: dict[str, Source]) -> None:
    recipes = recipes_of(sources)
    assert [low_rank_problem(recipe, sources) for recipe in recipes] == [None] * len(recipes)
    live = loaded(sources, base_recipe(recipes[0], sources, family_of(sources)))
    before = logits(live)
    rows, merges = rows_of(sources, live)
    with rows.mixed([rows.shares(merges.matrices(recipe)) for recipe in recipes]):
        for chosen in ([2, 0, 1], [3, 5, 4], [1, 1, 0]):
            rows.choose(chosen)
            found = logits(live)
            for row, candidate in enumerate(chosen):
                expected = logits(loaded(sources, recipes[candidate]))[row]
                assert torch.allclose(found[row], expected, atol=2e-5), METHODS[candidate]
                assert not torch.allclose(found[row], before[row], atol=1e-2)
        rows.choose(1)
        assert torch.allclose(logits(live), logits(loaded(sources, recipes[1])), atol=2e-5)
        rows.check_reached()
    assert torch.equal(logits(live), before)


def test_numbers_that_are_not_finite_are_named(sources: dict[str, Source]) -> None:
    live = loaded(sources, base_recipe(recipes_of(sources)[0], sources, family_of(sources)))
    rows, merges = rows_of(sources, live)
    matrices = merges.matrices(recipe_with(sources, blend_of("task_arithmetic")))
    matrices[2] = matrices[2].fill_(torch.inf)
    with pytest.raises(NotFiniteError, match=merges.bases[2][0]):
        rows.shares(matrices)


def part_of(sources: dict[str, Source], *blends: Blend, **changes: Any) -> str | None:
    return low_rank_problem(recipe_of(sources, list(blends), **changes), sources)


def test_recipes_that_are_only_in_part_in_core_space(sources: dict[str, Source]) -> None:
    core, dense = blend_of("ties"), arithmetic(dict.fromkeys(ADAPTED, 0.5))
    assert "only some of its parts are merged in core space" in (part_of(sources, core, dense) or "")
    two = blend_of("ties", ADAPTED[:2])
    assert "merges maths, japanese on base, not maths, japanese, wide on base" in (part_of(sources, core, two) or "")
    scaled = core.model_copy(update={"steps": (BlendStep(name="scale", parameters={"factor": 2.0}),)})
    with mock.patch.object(core_space, "find_step", return_value=replace(SCALE, in_any_basis=False)):
        assert "the step scale takes whole weights" in (part_of(sources, core, scaled) or "")
    assert part_of(sources, core, scaled) is None
    assert "ties plans by what the weights are" in (
        part_of(sources, *[core.model_copy(update={"basis": None})] * 2) or ""
    )


# ---- candidates scored together --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("family")
    base = save(LlamaConfig(**SMALL), folder / "base")
    return opened(base, **{n: train(base, folder / n, seed=i, **each) for i, (n, each) in enumerate(HEAD.items())})


def mixed_recipes(family: dict[str, Source]) -> Sequence[StackRecipe]:
    """Core space and weighted sums in turns, as baselines and candidates of one search are."""
    plain = [recipe_of(family, [arithmetic(dict.fromkeys(ADAPTED, weight))] * 2) for weight in (0.0, 0.3)]
    return [recipes_of(family)[0], plain[0], *recipes_of(family)[1:4], plain[1]]


def test_answers_are_those_of_each_candidate_alone(family: dict[str, Source]) -> None:
    evaluator = Asking()
    worker = start(family, [evaluator])
    jobs = jobs_of(mixed_recipes(family), [Task(0, "search", range(9))])
    alone = [worker.run(job) for job in jobs]
    assert len(set(map(tuple, evaluator.said))) == len(jobs)
    together = worker.run_together(jobs)
    assert measured(together) == measured(alone)
    assert [each.candidate for each in together] == [each.candidate for each in alone]
    assert measured(worker.run_together(jobs[::-1])) == measured(alone)[::-1]
    assert measured([worker.run(job) for job in jobs]) == measured(alone)


def test_how_far_a_candidate_is_from_the_base(family: dict[str, Source]) -> None:
    """Of its small matrices as of the weights that a merge writes."""
    builders = Builders(BuildContext(family, "base", dtype=torch.float32, base="base"))
    worker = Worker("here", builders, [ChangeSettings().build()])
    jobs = jobs_of(mixed_recipes(family), [Task(0, "search", [0])])
    alone = [worker.run(job).result for job in jobs]
    for one, other in zip(alone, worker.run_together(jobs), strict=True):
        assert isinstance(one, Measured)
        assert isinstance(other.result, Measured)
        assert one.change is not None
        assert other.result.change == pytest.approx(one.change, rel=1e-5)
        assert other.result.scores[0]["change"].tolist() == [np.float32(other.result.change)]


def test_what_cannot_be_computed_beside_weights_ends_alone(family: dict[str, Source]) -> None:
    worker = start(family, [Asking()])
    recipes = [recipes_of(family)[0], recipe_of(family, [blend_of("ties"), arithmetic({"maths": 1.0})])]
    jobs = jobs_of(recipes, [Task(0, "search", range(4))])
    first, second = worker.run_together(jobs)
    assert measured([first]) == measured([worker.run(jobs[0])])
    assert isinstance(second.result, Failed)
    assert "only some of its parts" in second.result.message
