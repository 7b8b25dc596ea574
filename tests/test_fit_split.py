"""The third split: what of a search file's `fit` section is read, refused and drawn, and the loss of its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_miniature import MINIATURES

from evomerge.errors import InputError
from evomerge.inference.prefill import log_likelihoods
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Likelihood
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.stack import StackRecipe
from evomerge.search.preparing.prepare import prepare
from evomerge.search.settings.fitting import FitSplit
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.search.workers.building import build_context
from evomerge.search.workers.fitting import AnswersFit

pytestmark = pytest.mark.filterwarnings("ignore")

MakeFile = Callable[..., SearchFile]


def write(path: Path, numbers: range) -> None:
    lines = [{"prompt": f"Q: {n} + 1 =\nA:", "answer": f" {n + 1}"} for n in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    write(tmp_path / "search.jsonl", range(40))
    write(tmp_path / "confirm.jsonl", range(40, 60))
    write(tmp_path / "fit.jsonl", range(60, 90))

    def make(**fit: Any) -> SearchFile:
        content = {
            "name": "fits",
            "sources": {name: str(MINIATURES / name) for name in ("base", "maths", "japanese")},
            "base": "base",
            "space": {"method": "task_arithmetic"},
            "objectives": {
                "sums": {
                    "evaluator": "likelihood", "metric": "log_likelihood", "file": "search.jsonl",
                    "held_out_file": "confirm.jsonl",
                }
            },
            "fit": {"file": "fit.jsonl", "steps": 3} | fit,
            "budget": {"candidates": 8},
            "dtype": "float32",
        }  # fmt: skip
        return parse_search_file(content, place="search.yaml", root=tmp_path)

    return make


def split_of(file: SearchFile, digest: str | None = None) -> FitSplit:
    split = file.recorded_fit(digest) if digest else file.fit_split
    assert split is not None
    return split


def test_all_items_of_the_file_are_fitted_to(make_file: MakeFile) -> None:
    assert split_of(make_file()).count == 30
    assert split_of(make_file(items=7)).count == 7
    prepare(make_file())


@pytest.mark.parametrize("change", [{"steps": 4}, {"rate": 0.2}, {"drawn": 3}, {"items": 5}, {"prompt": "{prompt} "}])
def test_whatever_the_fit_follows_from_is_in_its_digest(make_file: MakeFile, change: dict[str, Any]) -> None:
    assert split_of(make_file()).digest == split_of(make_file()).digest
    assert split_of(make_file()).digest != split_of(make_file(**change)).digest


@pytest.mark.parametrize(("numbers", "split"), [(range(39, 41), "search"), (range(55, 70), "held-out")])
def test_an_item_of_another_split_is_refused_with_its_line(
    make_file: MakeFile, tmp_path: Path, numbers: range, split: str
) -> None:
    write(tmp_path / "fit.jsonl", numbers)
    with pytest.raises(InputError, match=rf"fit\.jsonl.* line 1 is an item of the {split} split of objectives.sums"):
        prepare(make_file())


def test_another_answer_makes_no_other_item(make_file: MakeFile, tmp_path: Path) -> None:
    (tmp_path / "fit.jsonl").write_text(json.dumps({"prompt": "Q: 50 + 1 =\nA:", "answer": " fifty-one"}) + "\n")
    with pytest.raises(InputError, match="held-out split"):
        prepare(make_file())


def test_items_beyond_those_that_count_may_be_anywhere(make_file: MakeFile, tmp_path: Path) -> None:
    write(tmp_path / "fit.jsonl", range(62, 30, -1))
    with pytest.raises(InputError, match="is an item of the held-out split"):
        prepare(make_file(items=4))
    prepare(make_file(items=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluator": "rouge"}, "fit.evaluator: asks rouge, and only"),
        ({"held_out": 0.3}, "fit.held_out: makes no sense here"),
        ({"held_out_file": "confirm.jsonl"}, "fit.held_out_file: makes no sense here"),
        ({"promt": "x"}, "fit.promt"),
        ({"steps": 0}, "fit.steps"),
    ],
)
def test_what_makes_no_fit_is_refused_when_the_file_is_read(
    make_file: MakeFile, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_file(**change)


def test_too_few_items_are_refused(make_file: MakeFile) -> None:
    with pytest.raises(InputError, match=r"fit\.items: asks for 31 of 30 items"):
        prepare(make_file(items=31))


def test_test_items_of_a_benchmark_are_refused(
    make_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evaluators.likelihood.benchmark_of", lambda fields: "a benchmark" if fields.get("of") else None
    )
    (tmp_path / "fit.jsonl").write_text(json.dumps({"prompt": "Q: 70 + 1 =\nA:", "answer": " 71", "of": 1}) + "\n")
    with pytest.raises(InputError, match="fit: 1 of the 1 items to search on are test items of a benchmark"):
        prepare(make_file())


def test_an_item_that_cannot_be_put_to_the_model_is_refused_before_the_search(make_file: MakeFile) -> None:
    with pytest.raises(InputError, match="fit: apply_chat_template: the tokenizer has no chat template"):
        prepare(make_file(apply_chat_template=True))


def test_other_items_than_those_recorded_are_refused(make_file: MakeFile, tmp_path: Path) -> None:
    split = split_of(make_file(), "0123456789abcdef")
    assert split.digest == "0123456789abcdef"  # nothing is read
    with pytest.raises(InputError, match="these are not the items with the digest 0123456789abcdef"):
        _ = split.evaluator


def test_steps_draw_all_items_before_any_twice(make_file: MakeFile) -> None:
    fit = AnswersFit(split_of(make_file(drawn=8)))
    steps = [fit.drawn(step) for step in range(15)]
    assert all(len(step) == 8 for step in steps)
    drawn = [number for step in steps for number in step]
    rounds = [drawn[start : start + 30] for start in range(0, 120, 30)]
    assert all(sorted(one) == list(range(30)) for one in rounds)
    assert rounds[0] != rounds[1]


def test_the_parts_of_a_step_sum_to_the_mean_loss_of_its_answers(make_file: MakeFile) -> None:
    prepared = prepare(file := make_file(drawn=30))
    context = build_context(file, prepared.sources, Evidence())
    recipe = next(iter(prepared.setup.space.baselines())).recipe
    assert isinstance(recipe, StackRecipe)
    live = StackBuilder(context).write(recipe)
    fit = context.fit
    assert isinstance(fit, AnswersFit)
    requests = split_of(file).evaluator.requests(Reader.of(live), "search", fit.drawn(0))
    with torch.inference_mode():
        logs = [one.log for one in log_likelihoods(live, [r for r in requests if isinstance(r, Likelihood)])]
    wanted = sum(math.log1p(-log) for log in logs) / len(logs)
    assert sum(float(part.detach()) for part in fit.passes(live, 0)) == pytest.approx(wanted, rel=1e-5)


def test_each_row_of_a_part_has_the_group_of_its_item(
    make_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer prompts, which come first in a batch, are of one group."""
    lines = [
        {"prompt": "Q: " + "1 + " * (n % 2 * 5) + f"{n} =\nA:", "answer": " 1", "group": ["short", "long"][n % 2]}
        for n in range(60, 90)
    ]
    (tmp_path / "fit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepared = prepare(file := make_file(drawn=30))
    context = build_context(file, prepared.sources, Evidence())
    recipe = next(iter(prepared.setup.space.baselines())).recipe
    assert isinstance(recipe, StackRecipe)
    live = StackBuilder(context).write(recipe)
    fit = context.fit
    assert fit is not None
    monkeypatch.setattr("evomerge.inference.proxy.MAX_TOKENS", 400)
    kinds = [fit.kinds for _ in fit.passes(live, 0)]
    assert len(kinds) > 1
    assert sum(kinds, ()) == (0,) * 15 + (1,) * 15  # type: ignore[arg-type]


def test_groups_are_of_all_items_or_of_none_and_part_of_the_digest(make_file: MakeFile, tmp_path: Path) -> None:
    plain = split_of(make_file()).digest
    lines = [json.loads(line) for line in (tmp_path / "fit.jsonl").read_text().splitlines()]

    def write_groups(groups: list[str]) -> None:
        grouped = [line | ({"group": group} if group else {}) for line, group in zip(lines, groups, strict=True)]
        (tmp_path / "fit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in grouped))

    write_groups(["maths"] * 15 + ["other"] * 15)
    assert split_of(make_file()).groups == (0,) * 15 + (1,) * 15
    assert split_of(make_file()).digest != plain
    write_groups(["maths"] * 29 + [""])
    with pytest.raises(InputError, match="no `group`") as caught:
        _ = split_of(make_file()).digest
    assert caught.value.place.endswith("line 30")
