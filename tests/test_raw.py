"""Tables of tensors: flat checkpoints, and image models in one file or in a folder of components."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.raw.blocks import blocks_of

Tensors = dict[str, torch.Tensor]

UNET = "model.diffusion_model."
NAMES = {
    f"{UNET}input_blocks.0.0.weight": (4, 3), f"{UNET}input_blocks.4.1.proj.weight": (6, 4),
    f"{UNET}time_embed.0.bias": (5,), f"{UNET}middle_block.1.weight": (4, 4),
    f"{UNET}output_blocks.11.0.weight": (3, 4),
    f"{UNET}out.2.weight": (2, 4), "cond_stage_model.transformer.text_model.final.weight": (4,),
    "first_stage_model.decoder.conv.weight": (2, 2, 3, 3), "model_ema.decay": (1,),
}  # fmt: skip
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def checkpoint(path: Path, seed: int, dtype: torch.dtype = torch.float16) -> Tensors:
    """A little Stable Diffusion 1 in its usual file, whose positions are whole numbers."""
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in NAMES.items()}
    tensors[POSITIONS] = torch.arange(7)[None] + seed
    save_file(tensors, path)
    return tensors


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Tensors]:
    return {name: checkpoint(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("abc")}


def write(folder: Path, **config: Any) -> Path:
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def inputs(**weights: Any) -> list[dict[str, Any]]:
    return [{"model": f"{name}.safetensors", "parameters": {"weight": w}} for name, w in weights.items()]


def made(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def test_blocks_have_the_names_that_people_use() -> None:
    blocks = blocks_of([*NAMES, POSITIONS])
    assert [blocks[name] for name in NAMES] == ["IN00", "IN04", "IN00", "MID", "OUT11", "OUT11", "TEXT", "VAE", "EMA"]
    others = {
        f"{UNET}label_emb.0.0.weight": "IN00", f"{UNET}output_blocks.8.0.weight": "OUT08", f"{UNET}out.0.bias": "OUT08",
        "conditioner.embedders.0.transformer.x": "TEXT1", "conditioner.embedders.1.model.x": "TEXT2",
    }  # fmt: skip
    assert blocks_of(others) == others
    flux = {
        "double_blocks.18.img_mlp.0.weight": "D18", f"{UNET}single_blocks.3.linear1.weight": "S03",
        "img_in.weight": "IN",
        "final_layer.linear.weight": "OUT", "vector_in.in_layer.bias": "IN",
    }  # fmt: skip
    assert blocks_of(flux) == flux
    folder = {
        "unet/down_blocks.1.resnets.0.conv1.weight": "IN04", "unet/down_blocks.0.resnets.1.conv1.weight": "IN02",
        "unet/down_blocks.1.downsamplers.0.conv.weight": "IN06", "unet/mid_block.resnets.0.conv1.weight": "MID",
        "unet/up_blocks.2.attentions.1.proj_in.weight": "OUT07", "unet/up_blocks.2.resnets.2.x": "OUT08",
        "unet/up_blocks.1.upsamplers.0.conv.bias": "OUT05", "unet/conv_out.weight": "OUT08", "vae/decoder.x": "VAE",
        "text_encoder/text_model.x": "TEXT1", "text_encoder_2/text_model.x": "TEXT2", "safety_checker/x": "SAFETY",
    }  # fmt: skip
    assert blocks_of(folder) == folder
    flux_folder = {
        "transformer/transformer_blocks.4.x": "D04", "transformer/single_transformer_blocks.30.x": "S30",
        "transformer/x_embedder.weight": "IN", "transformer/proj_out.bias": "OUT", "text_encoder/x": "TEXT1",
        "text_encoder_2/y": "TEXT2",
    }  # fmt: skip
    assert blocks_of(flux_folder) == flux_folder
    assert blocks_of(["layer.0.weight"]) == {"layer.0.weight": ""}


def test_a_weighted_sum_by_blocks(models: dict[str, Tensors], tmp_path: Path) -> None:
    """(1 - M) A + M B, another M for some blocks; the VAE, averages and positions are A's."""
    at = [{"filter": "IN04", "value": 0.9}, {"filter": "TEXT", "value": 0.0}, {"value": 0.25}]
    less = [{**one, "value": 1 - one["value"]} for one in at]
    merge(write(tmp_path, merge_method="linear", models=inputs(a=less, b=at)), tmp_path / "out")
    out, a, b = made(tmp_path / "out"), models["a"], models["b"]
    assert out.keys() == a.keys()
    for name in NAMES:
        m = 0.9 if "input_blocks.4" in name else 0.0 if "cond_stage" in name else 0.25
        if "first_stage" in name or "ema" in name:
            assert torch.equal(out[name], a[name])
        else:
            expected = (1 - m) * a[name].double() + m * b[name].double()
            assert torch.allclose(out[name].double(), expected, rtol=1e-3, atol=1e-4), name
        assert out[name].dtype == torch.float16
    assert torch.equal(out[POSITIONS], a[POSITIONS])
    assert out[POSITIONS].dtype == torch.int64


def test_a_difference_is_added(models: dict[str, Tensors], tmp_path: Path) -> None:
    """A + M (B - C), which is task arithmetic on C with A at 1; in float32 where that is asked for, the VAE too."""
    config = {"merge_method": "task_arithmetic", "base_model": "c.safetensors", "dtype": "float32"}
    weight = [{"filter": "VAE", "value": 0.5}, {"value": 0.7}]
    merge(write(tmp_path, **config, models=inputs(a=1.0, b=weight)), tmp_path / "out")
    out = made(tmp_path / "out")
    for name in NAMES:
        if "ema" in name:
            continue
        m = 0.5 if "first_stage" in name else 0.7
        a, b, c = (models[key][name].double() for key in "abc")
        assert torch.allclose(out[name].double(), a + m * (b - c), rtol=1e-5, atol=1e-6), name
        assert out[name].dtype == torch.float32


def test_a_merge_is_put_into_object_storage(models: dict[str, Tensors], tmp_path: Path) -> None:
    path = write(tmp_path, merge_method="linear", models=inputs(a=1, b=1))
    merge(path, tmp_path / "out")
    merge(path, (tmp_path / "storage").as_uri())
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "storage" / file.name).read_bytes() == file.read_bytes()


def test_methods_that_trim_and_elect_work_on_tables(models: dict[str, Tensors], tmp_path: Path) -> None:
    config = {"merge_method": "ties", "base_model": "c.safetensors", "parameters": {"density": 0.5}}
    merge(write(tmp_path, **config, models=inputs(a=1.0, b=1.0)), tmp_path / "out")
    name = f"{UNET}input_blocks.4.1.proj.weight"
    changes = [models[key][name].float() - models["c"][name].float() for key in "ab"]
    kept = [c * (c.abs() >= c.abs().flatten().sort().values[12]) for c in changes]
    sign = (kept[0] + kept[1] >= 0).float() * 2 - 1
    agree = [(k * sign > 0).float() for k in kept]
    total = sum(a * k for a, k in zip(agree, kept, strict=True))
    expected = models["c"][name].float() + total / sum(agree).clamp_min(1)
    assert torch.allclose(made(tmp_path / "out")[name].float(), expected, atol=2e-3)


def test_tensors_that_not_all_have(models: dict[str, Tensors], tmp_path: Path) -> None:
    extra = {**models["b"], "lora.alpha": torch.ones(2)}
    del extra[f"{UNET}out.2.weight"]
    save_file(extra, tmp_path / "b.safetensors")
    path = write(tmp_path, merge_method="linear", models=inputs(a=1, b=1))
    with pytest.raises(InputError, match=r"has no lora.alpha, which .* has \(1 in all\).*--keys union"):
        merge(path, tmp_path / "out")
    merge(path, tmp_path / "union", keys="union")
    merge(path, tmp_path / "common", keys="intersection")
    union, common = made(tmp_path / "union"), made(tmp_path / "common")
    assert torch.equal(union["lora.alpha"], torch.ones(2).half().float())
    assert torch.equal(union[f"{UNET}out.2.weight"], models["a"][f"{UNET}out.2.weight"])
    assert union.keys() == {*models["a"], "lora.alpha"}
    assert common.keys() == models["a"].keys() - {f"{UNET}out.2.weight"}


def folder_of(path: Path, seed: int) -> dict[str, Tensors]:
    """A little folder as diffusers writes it."""
    random = torch.Generator().manual_seed(seed)
    components: dict[str, Tensors] = {
        "unet": {
            "conv_in.weight": torch.randn(4, 4, generator=random),
            "mid_block.x": torch.randn(3, generator=random),
        },
        "vae": {"decoder.x": torch.randn(3, generator=random)},
        "text_encoder": {"text_model.x": torch.randn(3, generator=random)},
    }
    for name, tensors in components.items():
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text(json.dumps({"seed": seed}))
        save_file(tensors, path / name / "diffusion_pytorch_model.safetensors")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return components


def test_a_folder_of_components_goes_in_and_out(tmp_path: Path) -> None:
    a, b = (folder_of(tmp_path / name, seed) for seed, name in enumerate("ab"))
    weighted = [{"model": name, "parameters": {"weight": [{"filter": "MID", "value": w}, {"value": 1}]}}
                for name, w in (("a", 1), ("b", 3))]  # fmt: skip
    merge(write(tmp_path, merge_method="linear", models=weighted), tmp_path / "out")
    read = {
        name: load_file(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors") for name in a
    }  # fmt: skip
    assert torch.allclose(
        read["unet"]["conv_in.weight"], (a["unet"]["conv_in.weight"] + b["unet"]["conv_in.weight"]) / 2
    )
    assert torch.allclose(read["unet"]["mid_block.x"], (a["unet"]["mid_block.x"] + 3 * b["unet"]["mid_block.x"]) / 4)
    assert torch.equal(read["vae"]["decoder.x"], a["vae"]["decoder.x"])
    for file in ("model_index.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "a" / file).read_text()


# ---- what cannot be ----


def test_what_cannot_be_merged_is_refused(models: dict[str, Tensors], tmp_path: Path) -> None:
    def refused(words: str, keys: str | None = None, out: str = "out", **config: Any) -> None:
        path = write(tmp_path, **{"merge_method": "linear", "models": inputs(a=1, b=1), **config})
        before = set(tmp_path.iterdir())
        with pytest.raises(InputError, match=words):
            merge(path, tmp_path / out, keys=keys)
        assert set(tmp_path.iterdir()) == before

    (tmp_path / "p.ckpt").write_bytes(b"x")
    refused("p.ckpt is pickled", models=[{"model": "p.ckpt"}, {"model": "a.safetensors"}])
    refused("there is no file .*nowhere", models=inputs(a=1, nowhere=1))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    refused("cut.safetensors is cut short", models=inputs(a=1, cut=1))
    refused("needs a base_model|base", merge_method="task_arithmetic")
    refused("--keys", keys="some")
    refused("slices: is of language models", slices=[])
    refused("there is no merge method", merge_method="add_difference")
    refused("densty", parameters={"densty": 1})
    save_file({**models["b"], f"{UNET}middle_block.1.weight": torch.zeros(4, 5).half()}, tmp_path / "b.safetensors")
    refused(r"middle_block.1.weight is \[4, 4\] in .* and \[4, 5\] in")
    broken = {**models["b"], f"{UNET}middle_block.1.weight": torch.full((4, 4), torch.nan).half()}
    save_file(broken, tmp_path / "b.safetensors")
    refused("has NaN or Inf")
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in models["b"].items()}, tmp_path / "b.safetensors")
    refused("is stored as F8_E4M3")
    save_file({"a": torch.arange(3)}, tmp_path / "b.safetensors")
    refused("holds no tensors in floating point")


def test_stages_of_tables_are_refused_with_what_to_do(models: dict[str, Tensors], tmp_path: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": inputs(a=1, b=1)}
    last = {"merge_method": "linear", "models": [{"model": "half", "parameters": {"weight": 1}}, *inputs(c=1)]}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump_all([first, last]))
    with pytest.raises(InputError, match=r"document 1: is one of several merges.*FOLDER/model\.safetensors"):
        merge(tmp_path / "stages.yaml", tmp_path / "out")


def test_language_models_take_no_rule_for_keys(tmp_path: Path) -> None:
    path = write(tmp_path, merge_method="linear", models=[{"model": "some/model", "parameters": {"weight": 1}}])
    with pytest.raises(InputError, match="--keys: is for tables of tensors"):
        merge(path, tmp_path / "out", keys="union")


def test_a_full_disk_leaves_nothing(
    models: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "add_bytes", full)
    with pytest.raises(InputError, match="the disk is full"):
        merge(write(tmp_path, merge_method="linear", models=inputs(a=1, b=1)), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_a_killed_process_left_goes_away(models: dict[str, Tensors], tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial-999999999"
    stale.mkdir()
    merge(write(tmp_path, merge_method="linear", models=inputs(a=1, b=1)), tmp_path / "out")
    assert not stale.exists()
    shutil.rmtree(tmp_path / "out")


# ---- folders of diffusers that cannot be merged, or only by parts ----------------------------------------------------


def diffusers_refused(folder: Path, words: str, keys: str | None = None) -> None:
    """Merging the folders a and b says these words, and leaves nothing."""
    models = [{"model": name, "parameters": {"weight": 1}} for name in "ab"]
    before = {path for path in folder.iterdir() if path.name != "merge.yaml"}
    with pytest.raises(InputError, match=words):
        merge(write(folder, merge_method="linear", models=models), folder / "out", keys=keys)
    assert {path for path in folder.iterdir() if path.name != "merge.yaml"} == before


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        folder_of(tmp_path / name, seed)
    return tmp_path


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_components_that_are_pickled_or_gone_or_elsewhere_are_refused(folders: Path) -> None:
    safe, index = folders / "b" / "vae" / WEIGHTS, folders / "b" / "model_index.json"
    content = safe.read_bytes()
    safe.unlink()
    safe.with_name("diffusion_pytorch_model.bin").write_bytes(b"pickle")
    diffusers_refused(folders, r"b/vae is pickled, which can run code.*save_pretrained")
    safe.with_name("diffusion_pytorch_model.bin").unlink()
    safe.write_bytes(content)
    for name in ("unet_2", "../a", "/etc"):
        index.write_text(json.dumps({"_class_name": "X", name: ["diffusers", "UNet2DConditionModel"]}))
        diffusers_refused(folders, f"model_index.json names '{name}', which is no folder beside it")
    index.write_text(json.dumps({"_class_name": "X", "safety_checker": [None, None], "vae": ["diffusers", "Y"]}))
    (folders / "b" / "vae" / "link.json").symlink_to("/etc/hostname")
    diffusers_refused(folders, "link.json is a link that leaves the folder")


def test_components_of_another_architecture_or_with_nan_are_refused(folders: Path) -> None:
    unet = folders / "b" / "unet" / WEIGHTS
    tensors = load_file(unet)
    save_file({**tensors, "conv_in.weight": torch.ones(4, 9)}, unet)
    diffusers_refused(folders, r"unet/conv_in.weight is \[4, 4\] in .* and \[4, 9\] in")
    save_file({**tensors, "mid_block.x": torch.full((3,), torch.nan)}, unet)
    diffusers_refused(folders, "has NaN or Inf")
    save_file({"conv_in.weight": tensors["conv_in.weight"]}, unet)
    diffusers_refused(folders, r"has no unet/mid_block.x, which .*--keys union")


def test_models_that_predict_different_things_are_refused(folders: Path) -> None:
    for name, kind in (("a", "epsilon"), ("b", "v_prediction")):
        (folders / name / "scheduler").mkdir()
        (folders / name / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))
    diffusers_refused(folders, r"predict different things \(.*epsilon.*v_prediction\)")


def test_a_folder_that_a_full_disk_cuts_off_is_not_there(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "add_bytes", full)
    diffusers_refused(folders, "the disk is full")


def test_an_index_of_several_files_names_what_is_there(folders: Path) -> None:
    """A transformer in two files, of which one source lacks a tensor that is left out."""
    for name in "ab":
        files = {"m-00001-of-00002.safetensors": "transformer_blocks.0.x", "m-00002-of-00002.safetensors": "proj_out.y"}
        (folders / name / "transformer").mkdir()
        for file, tensor in files.items():
            extra = {"norm_out.z": torch.ones(2)} if name == "a" and tensor == "proj_out.y" else {}
            save_file({tensor: torch.ones(2), **extra}, folders / name / "transformer" / file)
        weight_map = {tensor: file for file, tensor in files.items()} | ({"norm_out.z": file} if name == "a" else {})
        index = folders / name / "transformer" / "m.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    models = [{"model": name, "parameters": {"weight": 1}} for name in "ab"]
    merge(write(folders, merge_method="linear", models=models), folders / "out", keys="intersection")
    made = folders / "out" / "transformer"
    told = json.loads((made / "m.safetensors.index.json").read_text())["weight_map"]
    assert told == {name: file.name for file in made.glob("*.safetensors") for name in load_file(file)}
    assert told.keys() == {"transformer_blocks.0.x", "proj_out.y"}
