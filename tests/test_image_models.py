"""Image models: their blocks against what diffusers itself makes of the layouts, and what is refused of them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers_miniature import ROOT, evomerge, export_of, newest_scored
from helpers_search import table
from safetensors.torch import save_file

from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.raw.blocks import blocks_of, grouped
from evomerge.raw.layouts import KEPT, LAYOUTS, layout_of
from evomerge.recipes.base import read_recipe
from evomerge.recipes.state_dict import StateDictRecipe
from evomerge.report.drawings import drawing_grid, embedded
from evomerge.report.status import status_of
from evomerge.store import Store

UNET = "model.diffusion_model."


def unet_file(levels: int, depth: int) -> dict[str, torch.Tensor]:
    """A UNet in Stable Diffusion's single file with so many levels, of each block one number; each another one."""
    last = levels * (depth + 1)
    names = ["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"]
    for number in range(1, last):
        halves = number % (depth + 1) == 0
        names += [f"input_blocks.{number}.0.op.{kind}" for kind in ("weight", "bias")] if halves else [
            f"input_blocks.{number}.0.in_layers.2.weight", f"input_blocks.{number}.1.proj_in.weight",
        ]  # fmt: skip
    names += ["middle_block.0.in_layers.2.weight", "middle_block.1.proj_in.weight", "middle_block.2.in_layers.2.weight"]
    for number in range(last):
        names += [f"output_blocks.{number}.0.in_layers.2.weight", f"output_blocks.{number}.1.proj_in.weight"]
        if number % (depth + 1) == depth and number != last - 1:
            names += [f"output_blocks.{number}.2.conv.weight", f"output_blocks.{number}.2.conv.bias"]
    return {UNET + name: torch.tensor(float(number)) for number, name in enumerate(names)}


@pytest.mark.nightly  # importing diffusers takes seconds; tests/test_raw.py holds the names of some by hand
@pytest.mark.parametrize(("levels", "depth"), [(4, 2), (3, 2), (2, 1)], ids=["sd 1", "sd xl", "shallow"])
def test_blocks_of_a_folder_are_those_of_the_file(levels: int, depth: int) -> None:
    """By the converter of diffusers: a tensor is of the same block before and after it."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    file = unet_file(levels, depth)
    blocks = {float(file[name]): block for name, block in blocks_of(file).items()}
    converted = {
        f"unet/{name}": t for name, t in convert_ldm_unet_checkpoint(file, {"layers_per_block": depth}).items()
    }
    assert len(converted) > 5 * levels
    assert {name: blocks[float(converted[name])] for name in converted} == blocks_of(converted)
    assert {f"IN{levels * (depth + 1) - 1:02d}", "IN00", "MID", f"OUT{levels * (depth + 1) - 1:02d}"} <= {
        *blocks.values()
    }


class _Recorded(dict[str, torch.Tensor]):
    """A checkpoint that has whatever is asked of it; of each name another number."""

    def __init__(self, *names: str) -> None:
        super().__init__(dict.fromkeys(names, torch.zeros(())))
        self.asked: list[str] = []

    def pop(self, name: str, *_: object) -> torch.Tensor:  # type: ignore[override]
        self.asked.append(name)
        rows = 7 * 3072 if "linear1" in name else 6  # which the converter cuts into pieces of the real model's widths
        return torch.full((rows, 1), float(len(self.asked) - 1))


@pytest.mark.nightly
@pytest.mark.parametrize("prefix", ["", "transformer/"])
def test_blocks_of_flux_are_those_of_its_file(prefix: str) -> None:
    """By the converter of diffusers, of two double and three single blocks."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    file = _Recorded("double_blocks.0.x", "double_blocks.1.x", "single_blocks.0.x", "single_blocks.2.x", "guidance")
    converted = convert_flux_transformer_checkpoint_to_diffusers(file)
    before = blocks_of(file.asked)
    assert {*before.values()} == {"IN", "OUT", "D00", "D01", "S00", "S01", "S02"}
    expected = {f"{prefix}{name}": before[file.asked[int(tensor.flatten()[0])]] for name, tensor in converted.items()}
    assert blocks_of(expected) == expected


@pytest.fixture(scope="module")
def sdxl() -> list[str]:
    """The names of Stable Diffusion XL's UNet in diffusers, which builds it without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), addition_embed_type="text_time", cross_attention_dim=2048,
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, transformer_layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return [f"unet/{name}" for name in unet.state_dict()]


@pytest.mark.nightly
def test_every_tensor_of_a_unet_is_in_a_block(sdxl: list[str]) -> None:
    blocks = blocks_of(sdxl)
    sides = [f"{side}{number:02d}" for side in ("IN", "OUT") for number in range(9)]
    assert {*blocks.values()} == {*sides, "MID"}
    assert grouped(sdxl, {"in": ["IN"], "all": ["*"]}) == {
        name: "in" if blocks[name].startswith("IN") else "all" for name in sdxl
    }


def test_layouts_are_told_apart() -> None:
    of = {
        "Stable Diffusion 1 or 2 in one file": [f"{UNET}input_blocks.0.0.weight", "cond_stage_model.x"],
        "Stable Diffusion XL in one file": [f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.x"],
        "Flux in one file": ["double_blocks.0.img_mod.lin.weight"],
        "a UNet of diffusers": ["vae/decoder.x", "unet/mid_block.x"],
        "Flux of diffusers": ["transformer/transformer_blocks.0.x", "transformer/single_transformer_blocks.0.x"],
    }
    assert {name: found.name for name, names in of.items() if (found := layout_of(names))} == {n: n for n in of}
    assert {layout.name for layout in LAYOUTS} == {*of}
    assert layout_of(["vae/decoder.x", "prior/blocks.0.x"]) is None


def test_what_stands_beside_a_model_is_kept_unless_it_is_named() -> None:
    names = [f"{UNET}input_blocks.0.0.weight", "first_stage_model.x", "alphas_cumprod", "model_ema.decay"]
    assert grouped(names, {"all": ["*"]}) == {names[0]: "all"}
    assert grouped(names, {"all": ["*"], "vae": ["VAE"]}) == {names[0]: "all", names[1]: "vae"}
    assert {*blocks_of(names).values()} == {"IN00", *KEPT} - {"SAFETY"}


def test_letters_of_a_block_are_all_its_numbers() -> None:
    names = [f"conditioner.embedders.{number}.x" for number in (0, 1)]
    assert grouped(names, {"clip_l": ["TEXT1"], "other": ["TEXT"]}) == {names[0]: "clip_l", names[1]: "other"}


def test_models_in_two_layouts_are_refused(tmp_path: Path) -> None:
    save_file(unet_file(2, 1), tmp_path / "a.safetensors")
    save_file({"double_blocks.0.x": torch.ones(2)}, tmp_path / "b.safetensors")
    models = [{"model": f"{name}.safetensors", "parameters": {"weight": 1}} for name in "ab"]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    for keys in (None, "union"):
        with pytest.raises(InputError, match=r"a\S* is Stable Diffusion 1 or 2 in one file, and b\S* is Flux in one"):
            merge(tmp_path / "m.yaml", tmp_path / "out", keys=keys)


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/image.yaml with its models made, and hardly trained: the folder that it lies in."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "diffusers").mkdir()
    for script in ("make.py", "draw.py"):
        shutil.copy(ROOT / "examples" / "diffusers" / script, folder / "diffusers")
    shutil.copy(ROOT / "examples" / "image.yaml", folder)
    spec = importlib.util.spec_from_file_location("make_diffusers", folder / "diffusers" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.make(2, 2, 2, 2)
    return folder


@pytest.mark.nightly
def test_the_example_runs_to_a_verified_export_that_diffusers_loads(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    folder, out = example / "s", example / "out"
    assert evomerge("search", example / "image.yaml", "--dir", folder, "--set", "budget.candidates=14") == 0
    newest = newest_scored(folder)
    assert export_of(newest, folder, out) == 0
    assert "score exactly as recorded" in capsys.readouterr().out
    with Store.open(folder / "search.db") as store:
        grid = drawing_grid(store, status_of(store), embedded(store))
        recipe = read_recipe(newest.recipe, store.search().record.sources)
    assert grid is not None
    assert grid.held_out
    assert [row.label for row in grid.rows][:4] == ["base", "warm", "cool", "uniform average"]
    assert all(item.address for row in grid.rows for item in row.items)
    assert isinstance(recipe, StateDictRecipe)
    models = {name: StableDiffusionPipeline.from_pretrained(example / "diffusers" / name) for name in recipe.sources}
    made = StableDiffusionPipeline.from_pretrained(out)
    blocks = {group.patterns[0]: group.blend.parameters["weight"] for group in recipe.groups}
    for part, name, pattern in (
        ("unet", "mid_block.resnets.0.conv1.weight", "MID"), ("unet", "conv_out.weight", "OUT*"),
        ("unet", "down_blocks.1.resnets.0.conv1.weight", "IN*"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight", "TEXT"),
    ):  # fmt: skip
        base, warm, cool, found = (
            {key.removeprefix("text_model."): t.double() for key, t in getattr(model, part).state_dict().items()}[name]
            for model in (*(models[key] for key in ("base", "warm", "cool")), made)
        )
        weight = blocks[pattern]
        assert isinstance(weight, dict)
        expected = base + float(weight["warm"]) * (warm - base) + float(weight["cool"]) * (cool - base)
        assert torch.allclose(found, expected, atol=1e-5), name
    vae = models["base"].vae.state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in made.vae.state_dict().items())


@pytest.mark.nightly
def test_workers_of_ray_draw_the_same(example: Path) -> None:
    few = ("--set", "budget.candidates=10", "--set", "confirm.top=1")
    assert evomerge("search", example / "image.yaml", "--dir", example / "one", *few) == 0
    on_ray = ("--set", "pool=ray", "--set", "cluster.workers=1")
    assert evomerge("search", example / "image.yaml", "--dir", example / "ray", *few, *on_ray) == 0
    assert table(example / "one") == table(example / "ray")
    drawn = []
    for name in ("one", "ray"):
        with Store.open(example / name / "search.db") as store:
            drawn.append([store.drawings(number, "search") for number in range(10)])
    assert drawn[0] == drawn[1]
