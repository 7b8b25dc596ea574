"""Searches over tables of tensors: scored by a function that reads candidates, exported, verified, resumed."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from helpers_miniature import ROOT, evomerge, export_of, json_of, newest_scored
from helpers_search import table
from helpers_service import BEARER, TOKEN
from PIL import Image
from safetensors.torch import load_file, save_file

from evomerge.inference.pictures import data_url
from evomerge.mergekit import dump_recipe
from evomerge.raw.blocks import grouped
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, BlendStep
from evomerge.recipes.state_dict import StateDictRecipe, TensorGroup
from evomerge.report.drawings import drawing_grid, embedded
from evomerge.report.status import status_of
from evomerge.service.app import create_app
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.root import Root
from evomerge.store import Store

UNET = "model.diffusion_model."
NAMES = {
    f"{UNET}input_blocks.0.0.weight": (4, 3), f"{UNET}input_blocks.1.0.weight": (6, 4),
    f"{UNET}middle_block.1.weight": (4, 4), f"{UNET}out.2.weight": (2, 4), "first_stage_model.conv.weight": (2, 2, 3),
}  # fmt: skip
POSITIONS = "cond_stage_model.positions"
GROUPS = {"in": "IN*", "middle": [f"{UNET}middle_block.*"]}

FUNCTION = '''
from safetensors.numpy import load_file


def score(items, weights):
    """Minus the mean square of a tensor's distance from a number."""
    files = [weights] if weights.is_file() else sorted(weights.glob("*/*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return [-float(((tensors[item["tensor"]] - item["wanted"]) ** 2).mean()) for item in items]
'''


DRAWING = '''
from PIL import Image


def drawn(items, weights):
    """The same with a picture whose red is how near it is."""
    numbers = score(items, weights)
    pictures = [Image.new("RGB", (8, 8), (int(255 / (1 - number)), 0, 0)) for number in numbers]
    return {"near": numbers, "pictures": pictures}
'''


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random) for name, shape in NAMES.items()}
    return {**tensors, POSITIONS: torch.arange(5) + seed}


def write_items(folder: Path, *tensors: str) -> None:
    (folder / "score.py").write_text(FUNCTION + DRAWING)
    items = [{"tensor": name, "wanted": wanted / 10} for name in tensors for wanted in range(8)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))


def search_file(folder: Path, suffix: str = ".safetensors", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "tables", "sources": {name: f"{name}{suffix}" for name in "abc"},
        "space": {"kind": "state_dict", "method": "linear", "groups": GROUPS, "switches": {"normalize": False}},
        "objectives": {"near": {
            "evaluator": "python", "file": "score.py", "given": "weights", "items_file": "items.jsonl",
            "metrics": {"near": "maximize"}, "metric": "near",
        }},
        "allow_task_code": True, "optimizer": {"name": "cma", "population": 4}, "budget": {"candidates": 13},
        "confirm": {"top": 1},
    }  # fmt: skip
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        save_file(tensors_of(seed), tmp_path / f"{name}.safetensors")
    write_items(tmp_path, f"{UNET}input_blocks.1.0.weight", f"{UNET}middle_block.1.weight")
    return tmp_path


def test_a_tensor_is_of_the_first_group_that_has_it() -> None:
    some = list(NAMES)
    assert grouped(some, {"block": ["IN01"], "rest": ["*"]}) == {
        some[0]: "rest", some[1]: "block", some[2]: "rest", some[3]: "rest",
    }  # fmt: skip
    assert grouped(some, {"kept": ["VAE"], "two": ["*.0.weight"]}) == {
        some[0]: "two", some[1]: "two", some[4]: "kept",
    }  # fmt: skip
    assert grouped(["layer.0.w", "layer.1.w"], {"model": ["layer.1.*"]}) == {"layer.1.w": "model"}


def test_a_search_ends_in_a_verified_export(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is the recipe's weighted sums; what is in no group, the VAE and positions are the first's."""
    folder, out = files / "s", files / "out"
    assert evomerge("search", search_file(files), "--dir", folder) == 0
    row = newest_scored(folder)
    with Store.open(folder / "search.db") as store:
        labels = [candidate.label for candidate in store.candidates()][:5]
        recipe = read_recipe(row.recipe, store.search().record.sources)
        near = next(iter(store.scores(row.number, "search"))).metrics["near"]
    assert labels == ["a", "b", "c", "uniform average", "linear defaults"]
    assert isinstance(recipe, StateDictRecipe)
    assert export_of(row, folder, out) == 0
    assert "score exactly as recorded" in capsys.readouterr().out

    made, sources = load_file(out / "model.safetensors"), {name: tensors_of(n) for n, name in enumerate("abc")}
    weights = {group.name: group.blend.parameters["weight"] for group in recipe.groups}
    for name in NAMES:
        group = "in" if "input_blocks" in name else "middle" if "middle" in name else None
        if group is None:
            assert torch.equal(made[name], sources["a"][name])
            continue
        of = weights[group]
        assert isinstance(of, dict)
        expected = sum(float(of[source]) * sources[source][name].double() for source in "abc")
        assert torch.allclose(made[name].double(), torch.as_tensor(expected), atol=1e-6)
    assert torch.equal(made[POSITIONS], torch.arange(5))

    items = [json.loads(line) for line in (files / "items.jsonl").read_text().splitlines()]
    distances = [-float(((made[item["tensor"]] - item["wanted"]) ** 2).mean()) for item in items]
    assert all(min(abs(score - distance) for distance in distances) < 1e-5 for score in near.tolist())

    assert evomerge("merge", out / "recipe.yaml", files / "again") == 0
    assert (files / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_drawings_are_kept_of_sources_and_the_winner_and_shown(files: Path) -> None:
    file, folder = search_file(files), files / "root" / "s"
    assert evomerge("search", file, "--dir", folder, "--set", "objectives.near.function=drawn") == 0
    settings = ServiceSettings(Root.of(str(folder.parent), folder.parent), TOKEN)
    client = TestClient(create_app(settings), base_url="http://127.0.0.1", headers=BEARER)
    with Store.open(folder / "search.db") as store:
        (measure,) = store.search().record.objectives
        status = status_of(store)
        grid = drawing_grid(store, status, embedded(store))
        assert grid is not None
        assert grid.held_out
        assert [row.label for row in grid.rows[:4]] == ["a", "b", "c", "uniform average"]
        assert grid.rows[-1].roles == ["best"]
        for row in grid.rows:
            number = int(row.id[1:])
            scores = {s.evaluator: s for s in store.scores(number, "held_out")}[measure.version].metrics["near"]
            images = store.drawings(number, "held_out")[measure.version]
            assert images.keys() == {*range(min(8, len(scores)))}
            for item, image in images.items():
                assert Image.open(io.BytesIO(image)).getpixel((3, 3)) == (int(255 / (1 - float(scores[item]))), 0, 0)
                assert row.items[item].address == data_url(image)
        number, image = int(grid.rows[-1].id[1:]), store.drawings(0, "search")[measure.version][2]
    page, report = client.get("/searches/s").text, client.get("/searches/s/report.html").text
    assert report.count("data:image/png") == sum(len(row.items) for row in grid.rows)
    address = f"/api/v1/searches/s/candidates/{number}/drawings/0?split=held_out&objective=near"
    assert html.escape(address) in page
    assert client.get(address).headers["content-type"] == "image/png"
    assert client.get("/api/v1/searches/s/candidates/0/drawings/2").content == image
    assert client.get("/api/v1/searches/s/candidates/0/drawings/900").status_code == 404
    assert "/drawings/" in client.get(f"/searches/s/candidates/{grid.rows[-1].id}").text
    assert "/drawings/" in client.get("/searches/s/compare?a=c0000&b=c0001&split=held_out").text


def test_a_source_scores_as_its_own_file(files: Path) -> None:
    """A baseline is the whole file: its own output layer, where candidates have the first's."""
    write_items(files, f"{UNET}out.2.weight", f"{UNET}middle_block.1.weight")
    assert evomerge("search", search_file(files, budget={"candidates": 5}), "--dir", files / "s") == 0
    with Store.open(files / "s" / "search.db") as store:
        rows = {row.label: row for row in store.candidates()}
        assert rows["b"].genome is None
        assert export_of(rows["b"], files / "s", files / "out") == 0
    made = load_file(files / "out" / "model.safetensors")
    assert made.keys() == tensors_of(1).keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors_of(1).items())


def test_resumed_is_uninterrupted(files: Path) -> None:
    assert evomerge("search", search_file(files), "--dir", files / "whole") == 0
    assert evomerge("search", search_file(files, budget={"candidates": 9}), "--dir", files / "parts") == 0
    assert evomerge("resume", files / "parts", "--set", "budget.candidates=13") == 0
    assert table(files / "whole") == table(files / "parts")


@pytest.mark.nightly
def test_workers_of_ray_find_the_same(files: Path) -> None:
    assert evomerge("search", search_file(files), "--dir", files / "one") == 0
    assert evomerge("search", search_file(files, pool="ray", cluster={"workers": 2}), "--dir", files / "ray") == 0
    assert table(files / "one") == table(files / "ray")


def test_folders_of_diffusers_are_searched(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        random = torch.Generator().manual_seed(seed)
        for component, tensor in (("unet", "mid_block.x"), ("vae", "decoder.x")):
            (tmp_path / name / component).mkdir(parents=True)
            file = tmp_path / name / component / "diffusion_pytorch_model.safetensors"
            save_file({tensor: torch.randn(3, 2, generator=random)}, file)
            (tmp_path / name / component / "config.json").write_text("{}")
        (tmp_path / name / "model_index.json").write_text("{}")
    write_items(tmp_path, "mid_block.x")
    space = {"kind": "state_dict", "method": "slerp", "groups": "blocks"}
    sources = {"a": "a", "b": "b"}
    file = search_file(tmp_path, "", space=space, sources=sources, budget={"candidates": 8})
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    assert export_of(newest_scored(tmp_path / "s"), tmp_path / "s", tmp_path / "out") == 0
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "unet" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "model_index.json").exists()
    assert torch.equal(load_file(tmp_path / "out" / vae)["decoder.x"], load_file(tmp_path / "a" / vae)["decoder.x"])
    copy = tmp_path / "copy"
    newest = f"c{newest_scored(tmp_path / 's').number:04d}"
    assert evomerge("export", tmp_path / "s", copy.as_uri(), "--candidate", newest) == 0
    files = {file.relative_to(copy).as_posix(): file for file in copy.rglob("*") if file.is_file()}
    assert {"SHA256SUMS", "model_index.json", "unet/config.json", vae} <= files.keys()
    assert files[vae].read_bytes() == (tmp_path / "out" / vae).read_bytes()
    assert str(tmp_path) not in files["recipe.yaml"].read_text()
    (tmp_path / "a" / "unet" / "config.json").write_text("{ }")
    assert evomerge("resume", tmp_path / "s", "--set", "budget.candidates=12") == 2


def test_methods_on_matrices_change_matrices_alone(tmp_path: Path) -> None:
    """Iso-C by numpy, on the weight of a linear layer; a table that is looked up and a kernel are plain sums."""
    random = torch.Generator().manual_seed(3)
    shapes = {"blocks.0.proj.weight": (6, 4), "token_embedding.weight": (6, 4), "conv.weight": (2, 2, 3, 3)}
    tensors = {name: {key: torch.randn(shape, generator=random) for key, shape in shapes.items()} for name in "abc"}
    for name, of_name in tensors.items():
        save_file(of_name, tmp_path / f"{name}.safetensors")
    blend = Blend(
        method="task_arithmetic", base="c", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 1.0}},
        steps=(BlendStep(name="iso", parameters={"strength": 1.0}),),
    )  # fmt: skip
    group = TensorGroup(name="all", patterns=("*",), blend=blend)
    sources = {name: str(tmp_path / f"{name}.safetensors") for name in "abc"}
    recipe = StateDictRecipe(sources=sources, tokenizer="c", groups=(group,))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "out") == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name in shapes:
        a, b, base = (tensors[key][name].double().numpy() for key in "abc")
        change = 0.5 * (a - base) + (b - base)
        if name.startswith("blocks"):
            left, sizes, right = np.linalg.svd(change, full_matrices=False)
            change = np.linalg.norm(sizes) / len(sizes) ** 0.5 * (left @ right)
        assert np.allclose(made[name].double().numpy(), base + change, atol=1e-5), name


def test_steps_of_a_table_are_searched(files: Path) -> None:
    given = {"method": "task_arithmetic", "fixed": {"lambda": 1.0}, "steps": {"scale": {}}, "groups": "model"}
    changes = space(**given) | {"base": "c", "budget": {"candidates": 10}}
    assert evomerge("search", search_file(files, **changes), "--dir", files / "s") == 0
    with Store.open(files / "s" / "search.db") as store:
        recipe = read_recipe(newest_scored(files / "s").recipe, store.search().record.sources)
    assert isinstance(recipe, StateDictRecipe)
    assert [step.name for step in recipe.groups[0].blend.steps] == ["scale"]


def space(**changes: Any) -> dict[str, Any]:
    return {"space": {"kind": "state_dict", "method": "linear", **changes}}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such tensor": (space(groups={"x": "nothing.*"}), "space.groups.x", "Blocks: IN00, IN01, MID, OUT"),
    "an empty group": (space(groups={"x": "*", "y": "MID"}), "space.groups.y", "groups before it"),
    "texts needed": (space(method="regmean"), "space.method", "cannot be run on texts"),
    "texts needed by a step": ({**space(method="linear", steps={"activations": {}}), "base": "c"},
                               "space.steps.activations", "cannot be run on texts"),
    "a step without a base": (space(steps={"iso": {}}), "base", "is added to a base"),
    "a step that there is not": (space(steps={"isso": {}}), "space.steps.isso", "iso"),
    "no base": (space(method="ties"), "base", "needs a base"),
    "a strange setting": (space(switches={"x": True}), "space.switches.x", "normalize"),
    "a language model": ({"sources": {"a": str(ROOT / "examples/miniatures/base"), "b": "b.safetensors"}}, "sources.a",
                         "neither a file of tensors"),
    "gone": ({"sources": {"a": "a.safetensors", "b": "gone.safetensors"}}, "sources.b", "there is no file"),
    "other shapes": ({"sources": {"a": "a.safetensors", "b": "other.safetensors"}}, "sources", "in a and"),
    "other tensors": ({"sources": {"a": "a.safetensors", "b": "less.safetensors"}}, "sources", "keys: union"),
    "asks a model": ({"objectives": {"near": {"task": "mini_math_ja", "metric": "acc_ja"}}},
                     "objectives.near.evaluator", "given: weights"),
    "several at once": ({"together": 2}, "together", "one by one"),
    "texts": ({"calibration": {"file": "items.jsonl"}}, "calibration", "is for language models"),
    "stages": ({"space": {"kind": "staged", "stages": [
        {"name": "first", "sources": ["a", "b"], "space": {"kind": "parameter_space", "method": "linear"}},
        {"name": "last", "sources": ["first", "c"], "space": {"kind": "parameter_space", "method": "linear"}},
    ]}}, "sources.a", "not in stages"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_searched_is_refused(files: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, place, words = BAD[case]
    middle = f"{UNET}middle_block.1.weight"
    save_file({**tensors_of(1), middle: torch.ones(4, 5)}, files / "other.safetensors")
    save_file({name: tensor for name, tensor in tensors_of(1).items() if name != middle}, files / "less.safetensors")
    assert evomerge("validate", search_file(files, **changes)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert place in said
    assert words in said


def test_weights_are_given_in_no_other_space(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(ROOT / "examples/miniatures/base")
    file = search_file(files, sources={"a": base, "b": base}, space={"method": "linear"})
    assert evomerge("validate", file) == 2
    assert "objectives.near.given: is weights" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy
    import shutil

    shutil.copytree(ROOT / "examples" / "tables", tmp_path / "tables")
    shutil.copy(ROOT / "examples" / "state_dict.yaml", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path / "tables")
        runpy.run_path(str(tmp_path / "tables" / "make.py"), run_name="__main__")
    file = tmp_path / "state_dict.yaml"
    assert evomerge("search", file, "--dir", tmp_path / "s", "--set", "budget.candidates=10") == 0
    assert json_of(capsys, "status", tmp_path / "s", "--json")["state"] == "finished"
