"""What stands in ``examples/plugins``: found by entry point, keeps its contract, and can be searched."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from averaged_logits import AveragedLogits, AveragedLogitsBuilder
from helpers_miniature import MINIATURES, evomerge, export_of, json_of, newest_scored, search_file, short_search_file
from hill_climber import HillClimberSettings
from median import MEDIAN
from picture_size import PictureSizeSettings, png_size
from transformers import AutoModelForCausalLM

from evaluators.base import EvaluatorSettings, prompts_of
from evaluators.scoring import score
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.measured.facts import Facts
from evomerge.method import Method
from evomerge.optimizers.base import Settings
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend
from evomerge.store import Store
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.methods import MethodContract
from evomerge.testing.models import tiny_live
from evomerge.testing.optimizers import OptimizerContract

pytestmark = pytest.mark.usefixtures("plugins_installed")


class TestMedian(MethodContract):
    method = MEDIAN


def _svd_by_rows(facts: Facts, blend: Blend) -> Pass:
    """As a decomposition would have to be written if there were no passes of whole tensors; wrong beyond one piece."""

    def rows(given: list[torch.Tensor], first: int) -> torch.Tensor:
        base, *sources = given
        u, s, v = torch.linalg.svd(sum(sources) / len(sources) - base, full_matrices=False)
        return base + (u[:, :1] * s[:1]) @ v[:1]

    return RowFunction((str(blend.base), *blend.sources), rows)  # type: ignore[arg-type]


def test_the_contract_catches_a_decomposition_of_pieces() -> None:
    class Wrong(MethodContract):
        method = Method("by_rows", _svd_by_rows, needs_base=True)
        tolerance: ClassVar[float] = 1e-5

    with pytest.raises(AssertionError, match="is a TensorFunction, not a RowFunction"):
        Wrong().test_large_tensors_are_made_as_the_plain_definition_makes_them_whole()


def test_the_contract_minds_no_rounding_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run is cut decides on the last bit of a power."""

    def powers(facts: Facts, blend: Blend) -> Pass:
        return RowFunction(blend.sources, lambda given, first: given[0].abs() ** 0.3)

    class Powers(MethodContract):
        method = Method("powers", powers)

    Powers().test_pieces_do_not_show((40, 6), monkeypatch)


def test_a_method_of_ones_own_is_searched_resumed_and_exported(tmp_path: Path) -> None:
    file = short_search_file(tmp_path, space={"method": "median"})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=10") == 0
    assert export_of(newest_scored(tmp_path / "search"), tmp_path / "search", tmp_path / "out") == 0


class TestHillClimber(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return HillClimberSettings(name="hill_climber")


def test_an_optimizer_of_ones_own_is_searched_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"optimizer": {"name": "hill_climber", "step": 0.2}, "confirm": {"top": 1}}
    whole = short_search_file(tmp_path, **changes, budget={"candidates": 21})
    assert evomerge("search", whole, "--dir", tmp_path / "whole") == 0
    part = short_search_file(tmp_path, **changes, budget={"candidates": 13})
    assert evomerge("search", part, "--dir", tmp_path / "part") == 0
    assert evomerge("resume", tmp_path / "part", "--set", "budget.candidates=21") == 0
    rows = json_of(capsys, "top", tmp_path / "whole", "--all", "--json")
    assert json_of(capsys, "top", tmp_path / "part", "--all", "--json") == rows
    assert "hill_climber" in {row["origin"] for row in rows}


def test_an_optimizer_that_nobody_brings_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, optimizer={"name": "hill_climbr"})
    assert evomerge("validate", file) == 2
    told = "".join(capsys.readouterr())
    assert "optimizer.name" in told
    assert "Did you mean 'hill_climber'?" in told
    file = search_file(tmp_path, optimizer={"name": "hill_climber", "stp": 1})
    assert evomerge("validate", file) == 2
    assert "optimizer.stp" in "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search for the best share of two models' logits, gone on with once."""
    folder = tmp_path_factory.mktemp("averaged")
    task = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:6]", "held_out": "test[:6]"}
    file = search_file(
        folder,
        space={"kind": "averaged_logits"},
        objectives={"sums": task},
        optimizer={"name": "tpe", "population": 3},
        budget={"candidates": 7},
        confirm={"top": 1},
    )
    assert evomerge("search", file, "--dir", folder / "search") == 0
    assert evomerge("resume", folder / "search", "--set", "budget.candidates=9") == 0
    return folder / "search"


def test_a_kind_of_recipe_of_ones_own_is_searched_shown_and_exported(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json_of(capsys, "top", averaged, "--all", "--json")
    assert {row["status"] for row in rows} <= {"done", "cached"}
    candidate = next(row["id"] for row in rows if row["label"] == "equal shares")
    assert evomerge("show", averaged, candidate) == 0
    assert "times 0.5" in capsys.readouterr().out
    assert evomerge("export", averaged, tmp_path / "out", "--candidate", candidate) == 0  # which verifies
    assert "score exactly as recorded" in capsys.readouterr().out
    assert evomerge("merge", tmp_path / "out" / "recipe.yaml", tmp_path / "again") == 0
    for name in ("maths", "japanese"):
        ours, theirs = ((tmp_path / out / name / "model.safetensors").read_bytes() for out in ("out", "again"))
        assert ours == theirs


def test_averaged_logits_are_the_mean_of_two_models(averaged: Path, tmp_path: Path) -> None:
    """With shares of 1 and 0 each alone; between them the mean of what transformers computes; with a cache too."""
    sources = {name: open_source(name, str(MINIATURES / name), place=name) for name in ("maths", "japanese")}
    builder = AveragedLogitsBuilder(BuildContext(sources, "maths", dtype=torch.float32))
    tokens = torch.tensor([[3, 50, 7, 200, 11, 90]])
    plain = [
        AutoModelForCausalLM.from_pretrained(MINIATURES / name, dtype=torch.float32)(tokens).logits for name in sources
    ]
    for share in (0.0, 0.3, 1.0):
        recipe = AveragedLogits(
            sources={name: str(MINIATURES / name) for name in sources},
            tokenizer="maths", first="maths", second="japanese", share=share,
        )  # fmt: skip
        assert read_recipe(recipe.canonical(), recipe.sources) == recipe
        live = builder.write(recipe)
        assert torch.allclose(live.model(tokens).logits, share * plain[0] + (1 - share) * plain[1], atol=1e-4)
        begun = live.model(tokens[:, :4], use_cache=True)
        more = live.model(tokens[:, 4:], use_cache=True, past_key_values=begun.past_key_values)
        assert torch.allclose(more.logits, live.model(tokens).logits[:, 4:], atol=1e-4)


def test_a_kind_of_recipe_that_nobody_brings_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("kind: averaged_logit\nsources: {}\n")
    assert evomerge("merge", file, tmp_path / "out") == 2
    assert "Did you mean 'averaged_logits'?" in capsys.readouterr().err
    file.write_text("kind: averaged_logits\nsources: {a: b}\ntokenizer: a\nfirst: a\nsecond: a\nshare: 2\n")
    assert evomerge("merge", file, tmp_path / "out") == 2
    assert "share" in capsys.readouterr().err


# ---- an evaluator whose items carry a picture ------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pictures(folder: Path, count: int = 16, wider: int = 0) -> Path:
    """Items that ask how wide or high their pictures are."""
    rows = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(10 + 7 * number + wider, 90 - number))
        side = ("width", "height")[number % 2]
        rows.append({"question": f"The {side} of picture {number} is", "picture": f"{number}.png", "side": side})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pictures.jsonl"


class TestPictureSize(EvaluatorContract):
    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return PictureSizeSettings(file=pictures(tmp_path))


def test_the_answer_is_what_the_picture_shows(tmp_path: Path) -> None:
    """The same questions about other pictures have other answers, items and scores."""
    found = []
    for wider in (0, 1):
        evaluator = PictureSizeSettings(file=pictures(tmp_path, 40, wider)).build()
        items = {item.question: item for split in ("search", "held_out") for item in evaluator.items(split)}  # type: ignore[arg-type]
        widths = {q: item.answer for q, item in items.items() if "width" in q}
        assert {f" {10 + 7 * number + wider} pixels" for number in range(0, 40, 2)} == set(widths.values())
        assert all(item.media[0].file.read_bytes()[:4] == b"\x89PNG" for item in items.values())
        first = prompts_of(evaluator, Reader.of(tiny_live()), "search", 0)[0]
        assert first.answer == evaluator.items("search")[0].answer
        found.append((evaluator.version, score(evaluator, tiny_live(), "search", [0]).scores["log_likelihood"].item()))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"GIF89a" + content[6:], "is not a PNG picture"),
        (lambda content: content[:20], "is not a PNG picture"),
        (lambda content: content[:-5], "damaged or cut"),
        (lambda content: content[:17] + b"\x7f" + content[18:], "damaged or cut"),
        (lambda content: b"", "is not a PNG picture"),
    ],
)
def test_a_picture_that_is_none_is_refused_with_its_line(tmp_path: Path, change: Any, said: str) -> None:
    file = pictures(tmp_path)
    (tmp_path / "3.png").write_bytes(change(png(4, 5)))
    with pytest.raises(InputError, match=rf"pictures\.jsonl, line 4: picture: {said}|line 4: picture: .*{said}"):
        PictureSizeSettings(file=file).build()
    assert png_size(png(4, 5), "here") == (4, 5)


def test_an_evaluator_of_ones_own_is_searched_confirmed_and_exported(tmp_path: Path) -> None:
    pictures(tmp_path, 24)
    objective = {"evaluator": "picture_size", "metric": "log_likelihood", "file": "pictures.jsonl"}
    file = search_file(tmp_path, objectives={"pictures": objective}, budget={"candidates": 8}, confirm={"top": 1})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    with Store.open(tmp_path / "search" / "search.db") as store:
        assert store.counts()["failed"] == 0
    assert evomerge("export", tmp_path / "search", tmp_path / "out") == 0
