"""The contract of an evaluator, as tests to inherit.

class TestMine(EvaluatorContract):
    @pytest.fixture
    def settings(self, tmp_path):
        return MySettings(file=some_items(tmp_path))
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from evaluators.base import MODEL, Evaluator, EvaluatorSettings, Item, ItemScores, Split, prompts_of
from evaluators.benchmarks import count
from evaluators.scoring import Scoring, score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.inference.requests import respond_to
from evomerge.inference.transformers_engine import TransformersEngine
from evomerge.testing.models import tiny_live

SPLITS: tuple[Split, ...] = ("search", "held_out")


HARMLESS = frozenset({"allow_task_code", "batch_size", "batch_tokens", "count_tokens", "max_gigabytes", "max_seconds"})
"""Settings of this project's evaluators that affect no score, and so need not affect a version: how items are batched,
what code may do, and the metric added by ``counted``, which has its own version."""


class EvaluatorContract:
    """Override ``settings``: splits of about ten items suffice. ``live`` is tiny, random, and reads any text.

    Attributes:
        harmless: settings that affect no score, and need not affect the version.
        changes: another valid value for a setting, if none can be derived from its type.
    """

    harmless: ClassVar[frozenset[str]] = HARMLESS
    changes: ClassVar[Mapping[str, object]] = {}

    @pytest.fixture
    def settings(self) -> EvaluatorSettings:
        """Settings whose ``build`` returns the evaluator under test."""
        raise NotImplementedError

    @pytest.fixture
    def live(self) -> LiveModel:
        """A model that the evaluator can score, on the CPU, in float32."""
        return tiny_live()

    @pytest.fixture
    def evaluator(self, settings: EvaluatorSettings) -> Evaluator:
        return settings.build()

    def test_it_says_what_it_measures(self, evaluator: Evaluator) -> None:
        assert evaluator.name
        assert evaluator.version
        assert evaluator.metrics
        assert all(isinstance(higher, bool) for higher in evaluator.metrics.values())

    def test_no_item_is_in_both_splits(self, evaluator: Evaluator) -> None:
        search, held_out = evaluator.items("search"), evaluator.items("held_out")
        assert len(search) > 0
        assert len(held_out) > 0
        assert all(isinstance(item, Item) and item.id for item in (*search, *held_out))
        assert not {item.id for item in search} & {item.id for item in held_out}

    @pytest.mark.parametrize("split", SPLITS)
    def test_it_says_which_items_are_a_benchmarks(self, evaluator: Evaluator, split: Split) -> None:
        items = evaluator.items(split)
        assert all(name and 0 < number <= len(items) for name, number in count(i.benchmark for i in items).items())

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_item_gets_a_score(self, evaluator: Evaluator, live: LiveModel, split: Split) -> None:
        count = len(evaluator.items(split))
        scores = score(evaluator, live, split, range(count)).scores
        assert set(scores) == set(evaluator.metrics)
        for values in scores.values():
            assert values.shape == (count,)
            assert values.dtype == np.float32
            assert np.isfinite(values).all()

    @pytest.mark.parametrize("split", SPLITS)
    def test_what_is_asked_can_be_seen_before(self, evaluator: Evaluator, live: LiveModel, split: Split) -> None:
        before = _generators()
        for index in range(len(evaluator.items(split))):
            for prompt in prompts_of(evaluator, Reader.of(live), split, index):
                assert prompt.place
                assert 0 <= prompt.scored < len(prompt.ids)
                assert prompt.lost == 0
        assert _generators() == before

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_item_can_be_read(self, evaluator: Evaluator, live: LiveModel, split: Split) -> None:
        items = evaluator.items(split)
        assert all(isinstance(text, str) for item in items for text in (item.question, item.answer))
        last = len(items) - 1
        first = score(evaluator, live, split, [last]).answers
        assert first.keys() <= {last}
        assert score(evaluator, live, split, range(last + 1)).answers.keys() in (first.keys(), set(range(last + 1)))
        assert not score(evaluator, live, split, []).answers

    @pytest.mark.parametrize("split", SPLITS)
    def test_media_are_files_that_are_there(self, evaluator: Evaluator, split: Split) -> None:
        media = [one for item in evaluator.items(split) for one in item.media]
        assert all(one.held is not None if one.file is None else one.file.is_file() for one in media)

    def test_several_objectives_may_ask_before_any_is_graded(self, evaluator: Evaluator, live: LiveModel) -> None:
        """Requests of one split, then of the other; grades in the order of the requests."""
        reader, engine = Reader.of(live), TransformersEngine(live)
        begun = [Scoring(evaluator, reader, split, range(len(evaluator.items(split)))) for split in SPLITS]
        answers = [respond_to(engine, scoring.requests) if scoring.requests else [] for scoring in begun]
        for split, scoring, given in zip(SPLITS, begun, answers, strict=True):
            wanted = score(evaluator, live, split, range(len(evaluator.items(split)))).scores
            for metric, values in scoring.finish(given, live, engine).scores.items():
                if metric not in evaluator.measured:
                    np.testing.assert_array_equal(values, wanted[metric])

    def test_the_same_again(self, evaluator: Evaluator, live: LiveModel) -> None:
        whole = range(len(evaluator.items("search")))
        first = score(evaluator, live, "search", whole).scores
        score(evaluator, live, "held_out", [0])
        second = score(evaluator, live, "search", whole).scores
        for metric in evaluator.metrics:
            np.testing.assert_array_equal(first[metric], second[metric])

    def test_an_item_scores_the_same_in_any_company(self, evaluator: Evaluator, live: LiveModel) -> None:
        last = len(evaluator.items("search")) - 1
        whole = score(evaluator, live, "search", range(last + 1)).scores
        for chosen in ([last], [last, 0], [0, last, 0]):
            _assert_agree(score(evaluator, live, "search", chosen).scores, whole, chosen)

    def test_no_items_no_scores(self, evaluator: Evaluator, live: LiveModel) -> None:
        for values in score(evaluator, live, "search", []).scores.values():
            assert values.shape == (0,)

    def test_an_item_that_is_not_there(self, evaluator: Evaluator, live: LiveModel) -> None:
        for index in (-1, len(evaluator.items("search"))):
            with pytest.raises(IndexError):
                score(evaluator, live, "search", [index])

    def test_answers_are_of_the_model_at_hand(self, evaluator: Evaluator, live: LiveModel) -> None:
        """Weights change in place under an evaluator; it must not remember anything from the previous model."""
        whole = range(len(evaluator.items("search")))
        before = score(evaluator, live, "search", whole).scores
        saved = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
        with torch.no_grad():
            for tensor in live.model.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)))
        other = score(evaluator, live, "search", whole).scores
        live.model.load_state_dict(saved)
        again = score(evaluator, live, "search", whole).scores
        assert any(not np.array_equal(before[metric], other[metric]) for metric in evaluator.metrics)
        for metric in evaluator.metrics:
            np.testing.assert_array_equal(before[metric], again[metric])

    def test_it_leaves_no_trace(self, settings: EvaluatorSettings, live: LiveModel) -> None:
        weights = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
        before = _generators()
        evaluator = settings.build()
        score(evaluator, live, "search", [0])
        assert _generators() == before
        for name, tensor in live.model.state_dict().items():
            assert torch.equal(tensor, weights[name])

    def test_a_worker_builds_the_same_from_json(self, settings: EvaluatorSettings, evaluator: Evaluator) -> None:
        copied = type(settings).model_validate_json(settings.model_dump_json())
        assert copied == settings
        assert hash(copied) == hash(settings)
        rebuilt = copied.build()
        assert rebuilt.version == evaluator.version
        for split in SPLITS:
            assert list(rebuilt.items(split)) == list(evaluator.items(split))

    def test_the_version_follows_from_every_setting(self, settings: EvaluatorSettings, evaluator: Evaluator) -> None:
        """Scores are cached by version: if it does not change, scores of other settings are reused by mistake.

        Each setting is given another value, except names of files and models, and settings whose other values are all
        rejected; ``changes`` provides a valid value for these.
        """
        missing = []
        for name, field in type(settings).model_fields.items():
            if name in self.harmless:
                continue
            values = [self.changes[name]] if name in self.changes else _others(field, getattr(settings, name))
            other = next(_built(settings, name, values), evaluator)
            if other is not evaluator and other.version == evaluator.version:
                missing.append(name)
        assert not missing, f"the version is the same with other values of {', '.join(missing)}"


def _built(settings: EvaluatorSettings, name: str, values: Sequence[object]) -> Iterator[Evaluator]:
    """The evaluators for other values of one setting; rejected values are skipped."""
    for value in values:
        try:
            changed = type(settings).model_validate(settings.model_dump() | {name: value})
            if changed != settings:  # half of zero is zero
                yield changed.build()
        except (ValidationError, InputError):
            continue


def _others(field: FieldInfo, value: object) -> Sequence[object]:
    """Other values that a setting may have, the most likely valid ones first; none for files, models and mappings."""
    kinds = _kinds(field.annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return [choice for choice in choices if choice != value]
    if MODEL in field.metadata or Path in kinds:
        return []
    if value is None:
        made: dict[object, object] = {bool: True, int: 512, float: 0.5, str: "another"}
        return [made[kind] for kind in kinds if kind in made]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value / 2, value / 4]
    if isinstance(value, str):
        return [f"{value} another"]
    return [(*value, "another")] if isinstance(value, tuple) else []


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have: for ``X | None``, X and None."""
    alternatives = [] if get_origin(annotation) is Literal else get_args(annotation)
    is_union = bool(alternatives) and get_origin(annotation) not in (tuple, list, dict)
    return [kind for inner in alternatives for kind in _kinds(inner)] if is_union else [annotation]


def _assert_agree(scores: ItemScores, whole: ItemScores, chosen: Sequence[int]) -> None:
    for metric, values in scores.items():
        np.testing.assert_allclose(values, whole[metric][list(chosen)], rtol=1e-4, atol=1e-5)


def _generators() -> list[str]:
    """The state of every global random generator."""
    numpy_state: Any = np.random.get_state(legacy=True)
    return [
        str(random.getstate()),
        str([part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]),
        str(torch.get_rng_state().tolist()),
    ]
