"""Models that read images, of every family: opened, mixed with models of texts alone, merged and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_checkpoints import in_own_memory
from helpers_tiers import nightly_but
from helpers_vision import COMMIT, VISION, save_twin, save_vision
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from evomerge.checkpoints.live import LiveModel, check_live, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source

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
    assert source.takes_images and source.layers == 2 and source.warnings == ()
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
    assert seen and not any("layers" in name and name.startswith("model.layers") for name in seen)


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
