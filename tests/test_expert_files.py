"""Folders of many experts and their routers: MoLA's and LoRAMoE's, read against plain equations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from helpers_routed import EVERY, PROMPTS, logits, routed
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints.references import adapter_types, check_reference
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.files import absolute_reference, split_expert
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.report.public_names import movable
from evomerge.routed.builder import RoutedBuilder
from evomerge.service.allowed import located

LAYERS, RANK, ALPHA = 2, 2, 8
MOLA, LORAMOE = "mola", "loramoe"
EXPERTS = {MOLA: (2, 3), LORAMOE: (3, 3)}
"""In each layer."""
MODULES = {MOLA: EVERY, LORAMOE: ["gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "base", dtype=torch.float32)


def names_of(form: str, module: str, expert: int) -> tuple[str, str, str]:
    """Of A, B and the router, as the codes of the papers write them."""
    if form == MOLA:
        return f"{module}.lora_A_{expert}.weight", f"{module}.lora_B_{expert}.weight", f"{module}.router.router.weight"
    return f"{module}.lora_A{expert}.weight", f"{module}.lora_B{expert}.weight", f"{module}.lora_route.weight"


def written(base: Path, folder: Path, form: str) -> dict[str, Tensor]:
    """A checkpoint of random numbers; gives its tensors."""
    numbers = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in MODULES[form] or ".layers." not in module:
            continue
        count = EXPERTS[form][int(module.split(".")[2])]
        stem = f"base_model.model.{module}"
        for expert in range(count):
            down, up, router = names_of(form, stem, expert)
            tensors[down] = torch.randn(RANK, weight.shape[1], generator=numbers)
            tensors[up] = 0.03 * torch.randn(weight.shape[0], RANK, generator=numbers)
        tensors[router] = torch.randn(count, weight.shape[1], generator=numbers)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": ALPHA, "target_modules": MODULES[form]}
    config |= {"r": [RANK] * LAYERS} if form == MOLA else {"r": RANK, "lora_nums": 3, "blc_alpha": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def opened(base: Path, folder: Path, count: int = 3) -> dict[str, Source]:
    named = {"base": str(base)} | {f"e{number}": f"{base}+{folder}#{number}" for number in range(count)}
    return {name: open_source(name, reference, place=f"sources.{name}") for name, reference in named.items()}


@pytest.mark.parametrize("form", [MOLA, LORAMOE])
def test_a_folder_of_experts_opens_as_a_base_and_an_adapter_for_each(base: Path, tmp_path: Path, form: str) -> None:
    tensors = written(base, tmp_path / form, form)
    for number in range(3):
        source = opened(base, tmp_path / form)[f"e{number}"]
        layers = [layer for layer in range(LAYERS) if EXPERTS[form][layer] > number]
        assert len(source.changes) == len(layers) * len(MODULES[form])
        for weight in source.changes:
            module = f"base_model.model.{weight.removesuffix('.weight')}"
            down, up, _ = names_of(form, module, number)
            ((left, right, scale),) = source.low_rank(weight)
            assert torch.equal(left, tensors[up])
            assert torch.equal(right, tensors[down])
            assert scale == ALPHA / RANK


def builder(sources: Mapping[str, Source]) -> RoutedBuilder:
    evidence = Evidence(contents={name: name for name in sources})
    return RoutedBuilder(BuildContext(sources, tokenizer="base", evidence=evidence, dtype=torch.float32))


def mixed(form: str, tensors: Mapping[str, Tensor], module: str, given: Tensor) -> Tensor:
    """What the experts add to a module's output, by the papers' equations, one token after another."""
    count = EXPERTS[form][int(module.split(".")[2])]
    stem = f"base_model.model.{module}"
    out = []
    for token in given.flatten(0, -2):
        shares = torch.softmax(tensors[names_of(form, stem, 0)[2]] @ token, -1)
        if form == MOLA:
            best = shares.topk(2)
            shares = torch.zeros(count, dtype=shares.dtype).scatter(0, best.indices, best.values / best.values.sum())
        parts = [
            tensors[names_of(form, stem, e)[1]] @ (tensors[names_of(form, stem, e)[0]] @ token) for e in range(count)
        ]
        out.append(ALPHA / RANK * sum(share * part for share, part in zip(shares, parts, strict=True)))
    return torch.stack(out).unflatten(0, given.shape[:-1])


@contextmanager
def by_the_paper(model: Any, form: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    hooks = []
    for name, module in model.named_modules():
        if f"base_model.model.{name}" in {key.rpartition(".lora_A")[0] for key in tensors}:

            def hook(_: Any, given: tuple[Tensor], output: Tensor, name: str = name) -> Tensor:
                return output + mixed(form, tensors, name, given[0])

            hooks.append(module.register_forward_hook(hook))
    assert len(hooks) == LAYERS * len(MODULES[form])
    yield
    for one in hooks:
        one.remove()


@pytest.mark.parametrize("form", [MOLA, LORAMOE])
def test_stored_routers_compute_what_the_paper_says(base: Path, tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM

    tensors = written(base, tmp_path / form, form)
    sources = opened(base, tmp_path / form)
    recipe = routed(sources, router=Router(kind="stored"), group={"top_k": 2 if form == MOLA else None}, fit="f")
    live = builder(sources).write(recipe)
    # In float64, because the equations written out plainly round more in float32 than what is tested.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with torch.inference_mode():
        unrouted = model(PROMPTS).logits
        with by_the_paper(model, form, {name: tensor.double() for name, tensor in tensors.items()}):
            expected = model(PROMPTS).logits
    assert (expected - unrouted).abs().max() > 0.1
    assert (logits(live) - expected).abs().max() < 1e-5


def test_an_expert_that_a_layer_lacks_is_never_gated_there(base: Path, tmp_path: Path) -> None:
    """Layer 0 has the experts 0 and 1: with the third alone present it is the base, and finite."""
    written(base, tmp_path / MOLA, MOLA)
    sources = opened(base, tmp_path / MOLA)
    groups = (LayerGroup(layers=1, experts=("e2",)), LayerGroup(layers=1, experts=()))
    recipe = routed(sources, router=Router(kind="stored"), groups=groups, fit="f")
    one = builder(sources)
    alone = routed(sources, router=Router(kind="arrow"), groups=(LayerGroup(layers=2, experts=()),), fit="f")
    base_logits = logits(one.write(alone)).clone()
    assert torch.equal(logits(one.write(recipe)), base_logits)


def test_which_expert_is_meant_must_be_said(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "moe", LORAMOE)
    with pytest.raises(InputError, match="holds the experts 0 to 2") as caught:
        open_source("x", f"{base}+{tmp_path}/moe", place="sources.x")
    assert f"BASE+{tmp_path}/moe#0" in caught.value.hint
    with pytest.raises(InputError, match="and no expert 3"):
        open_source("x", f"{base}+{tmp_path}/moe#3", place="sources.x")
    with pytest.raises(InputError, match="no folder"):
        open_source("x", f"{base}+{tmp_path}/other#3", place="sources.x")


def test_routers_that_were_never_stored_are_asked_for(base: Path, tmp_path: Path) -> None:
    tensors = written(base, tmp_path / "moe", LORAMOE)
    sources = opened(base, tmp_path / "moe")
    file = tmp_path / "moe" / "adapter_model.safetensors"
    save_file({name: t for name, t in tensors.items() if "lora_route" not in name or "down_proj" not in name}, file)
    lacking = opened(base, tmp_path / "moe")
    recipe: RoutedRecipe = routed(sources, router=Router(kind="stored"), fit="f")
    RoutedBuilder.check(recipe, sources)
    with pytest.raises(InputError, match=r"down_proj.* no router is stored"):
        RoutedBuilder.check(recipe, lacking)
    save_file(tensors | {name: t[:2] for name, t in tensors.items() if "lora_route" in name}, file)
    with pytest.raises(InputError, match="which is none of expert 2"):
        opened(base, tmp_path / "moe")


def test_references_to_experts_are_moved_and_checked_as_folders_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(base, tmp_path / "moe", LORAMOE)
    monkeypatch.chdir(tmp_path)
    reference = f"{base}+moe#1"
    check_reference(reference, "sources.x")
    assert adapter_types(reference, "sources.x") == ("LORA",)
    absolute = f"{base}+{tmp_path}/moe#1"
    assert absolute_reference(reference, tmp_path) == absolute
    assert located(absolute, "sources.x", [tmp_path, base.parent]) == absolute
    with pytest.raises(InputError, match="does not allow"):
        located(absolute, "sources.x", [base.parent])
    (tmp_path / "a#1").mkdir()
    assert split_expert("a#1", tmp_path) == ("a#1", None)
    assert split_expert("b#1", tmp_path) == ("b", 1)
    recipe = routed(opened(base, tmp_path / "moe"), fit="f")
    assert movable(recipe, stays=False).sources["e1"] == "base+moe#1"
