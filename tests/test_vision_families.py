"""Models that read images, of every family: opened, mixed with models of texts alone, merged and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_checkpoints import in_own_memory
from helpers_tiers import nightly_but
from helpers_vision import COMMIT, VISION, image_inputs, save_twin, save_vision
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.live import LiveModel, check_live, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import Blend, StackRecipe

CPU = torch.device("cpu")
PROMPT = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {}


@pytest.fixture(params=nightly_but(COMMIT, VISION))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if family not in folders:
        folders[family] = save_vision(family, tmp_path_factory.mktemp("models") / family)
    return folders[family]


def opened(folder: Path, name: str = "sees") -> Source:
    return open_source(name, str(folder), place=f"sources.{name}")


def loaded(source: Source) -> LiveModel:
    live = live_model(source, CPU)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    check_live(live)
    return live


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_loaded_source_is_what_from_pretrained_gives(folder: Path) -> None:
    source = opened(folder)
    assert source.takes_images
    assert (source.layers, source.warnings) == (2, ())
    live = loaded(source)
    plain = in_own_memory(AutoModelForImageTextToText.from_pretrained(folder).eval())
    with torch.inference_mode():
        assert torch.equal(live.model(PROMPT, use_cache=False).logits, plain(PROMPT, use_cache=False).logits)
    mine = dict(live.model.named_parameters())
    assert all(torch.equal(mine[name], tensor) for name, tensor in plain.named_parameters())


def test_every_tensor_of_the_files_has_a_role_and_its_own_name(folder: Path) -> None:
    source = opened(folder)
    assert {source.written_as(name, role) for name, role in source.roles.items()} == stored(folder).keys()
    kinds = {role.kind for role in source.roles.values()}
    assert {"embedding", "attention", "mlp", "norm", "vision"} <= kinds
    seen = [name for name, role in source.roles.items() if role.kind == "vision"]
    assert seen
    assert not any(name.startswith(("model.layers", "lm_head")) for name in seen)


def test_text_logits_are_those_of_the_plain_model_with_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    """A folder of a plain model of texts, of the text tensors of the other under the names that sources give them."""
    source = opened(folder)
    twin = save_twin(source, tmp_path / "twin")
    plain = opened(twin, "plain")
    texts = {name for name, role in source.roles.items() if role.kind != "vision"}
    assert plain.tensors.keys() == texts
    with torch.inference_mode():
        ours = loaded(source).model(PROMPT, use_cache=False).logits
        theirs = AutoModelForCausalLM.from_pretrained(twin).eval()(PROMPT, use_cache=False).logits
    assert torch.allclose(ours, theirs, atol=1e-6)


def mixed(folder: Path, tmp_path: Path, weight: float) -> tuple[StackRecipe, dict[str, Source]]:
    """The model that sees, with so much of a plain model of texts in it."""
    sources = {"sees": opened(folder)}
    sources["plain"] = opened(save_twin(sources["sees"], tmp_path / "plain", seed=1), "plain")
    check_compatible(sources)
    blend = Blend.weighted_sum({"sees": 1.0 - weight, "plain": weight})
    names = {name: source.reference for name, source in sources.items()}
    return StackRecipe.uniform(blend, sources=names, tokenizer="sees", layers=2), sources


def test_a_merge_with_nothing_of_the_plain_model_is_the_model_that_sees(folder: Path, tmp_path: Path) -> None:
    recipe, sources = mixed(folder, tmp_path, 0.0)
    write_model(recipe, sources, tmp_path / "out", texts={})
    made, own = stored(tmp_path / "out"), stored(folder)
    assert made.keys() == own.keys()
    assert all(torch.equal(made[name], own[name]) for name in own)
    assert (tmp_path / "out" / "config.json").exists()


def test_export_and_live_agree_and_load_without_a_word(folder: Path, tmp_path: Path) -> None:
    recipe, sources = mixed(folder, tmp_path, 0.25)
    write_model(recipe, sources, tmp_path / "out", texts={})
    assert stored(tmp_path / "out").keys() == stored(folder).keys()
    model, said = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = live_model(sources["sees"], CPU)
    Materialiser(sources).write(recipe, live)
    check_live(live)
    mine = dict(live.model.named_parameters())
    assert all(torch.equal(mine[name], tensor) for name, tensor in model.named_parameters())
    with torch.inference_mode():
        ours = live.model(PROMPT, use_cache=False).logits
        assert torch.equal(ours, in_own_memory(model.eval())(PROMPT, use_cache=False).logits)
        assert not torch.equal(ours, loaded(sources["sees"]).model(PROMPT, use_cache=False).logits)


def test_export_and_live_agree_with_an_image(family: str, folder: Path, tmp_path: Path) -> None:
    recipe, sources = mixed(folder, tmp_path, 0.25)
    write_model(recipe, sources, tmp_path / "out", texts={})
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    live = live_model(sources["sees"], CPU)
    Materialiser(sources).write(recipe, live)
    shown = image_inputs(family, plain)
    blank = {**shown, "pixel_values": torch.full_like(shown["pixel_values"], 0.25)}
    with torch.inference_mode():
        logits = [model(**shown).logits for model in (live.model, plain)]
        answers = [model.generate(**shown, max_new_tokens=6, do_sample=False) for model in (live.model, plain)]
        assert not torch.allclose(plain(**blank).logits, logits[1])  # it looks
    assert torch.allclose(*logits, rtol=0, atol=1e-5)
    assert torch.equal(*answers)


def test_a_plain_model_swapped_in_keeps_what_sees(folder: Path, tmp_path: Path) -> None:
    recipe, sources = mixed(folder, tmp_path, 1.0)
    made = dict(Materialiser(sources).tensors(recipe))
    for name, role in sources["sees"].roles.items():
        giver = sources["sees" if role.kind == "vision" else "plain"]
        assert torch.equal(made[name], giver.read(name)), name
