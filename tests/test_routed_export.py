"""Routed models as folders: with code of their own, to the last bit, and for peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from helpers_routed import EVERY, PROMPTS, logits, opened, routed
from test_adapters import train
from test_routed_builder import CALIBRATION, builder_of

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"])
def sources(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("models")
    base = save_model(tiny_config(), folder / "base", dtype=getattr(torch, request.param))
    alike: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": EVERY}
    return opened(base, **{name: train(base, folder / name, seed=n, **alike) for n, name in enumerate("abc")})


def recipes(sources: dict[str, Source]) -> list[RoutedRecipe]:
    groups = (
        LayerGroup(layers=1, experts=("a", "b", "c"), top_k=2, temperature=0.6, mlp_gain=1.4, bias={"b": 0.3}),
        LayerGroup(layers=1, experts=("c", "a")),
    )
    own = {"calibration": CALIBRATION.digest, "groups": groups}
    return [
        routed(sources, router=Router(kind="arrow", base_expert=True, gate="sigmoid"), groups=groups),
        routed(sources, router=Router(kind="spectral"), **own),
        routed(sources, router=Router(kind="prototypes", per="block"), **own),
    ]


def test_a_folder_with_its_own_code_is_the_live_model(sources: dict[str, Source], tmp_path: Path) -> None:
    for number, recipe in enumerate(recipes(sources)):
        builder = builder_of(sources, form="routed", dtype=None)
        out = tmp_path / f"out{number}"
        builder.export(recipe, out, texts={"README.md": "A card."})
        assert {"README.md", "modeling_routed.py", "gates.py", "computing.py", "tokenizer.json"} <= {
            file.name for file in out.iterdir()
        }
        live = builder.write(recipe)
        reloaded = builder.reload(out)
        assert type(reloaded.model).__name__ == "RoutedForCausalLM"
        assert reloaded.model.dtype == live.model.dtype
        assert torch.equal(logits(reloaded), logits(live))


def test_without_trust_it_is_no_model(sources: dict[str, Source], tmp_path: Path) -> None:
    """Loaded as the plain base it would be another model, and nobody would notice."""
    from transformers import AutoModelForCausalLM

    builder_of(sources, form="routed", dtype=None).export(recipes(sources)[0], tmp_path / "out", texts={})
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_folder_for_peft(sources: dict[str, Source], tmp_path: Path) -> None:
    recipe = routed(sources, group={"top_k": 2, "temperature": 0.8})
    builder = builder_of(sources, form="peft", dtype=None)
    builder.export(recipe, tmp_path / "out", texts={"README.md": "A card."})
    assert json.loads((tmp_path / "out" / "arrow.json").read_text())["arrow"]["top_k"] == 2
    found = logits(builder.reload(tmp_path / "out"))
    expected = logits(builder.write(recipe))
    # Its directions are those of a power iteration that is cut short, so that few tokens go elsewhere.
    assert (found - expected).abs().median() < 0.25 * expected.std()
    scope: dict[str, Any] = {"__file__": str(tmp_path / "out" / "load.py")}
    exec((tmp_path / "out" / "load.py").read_text(), scope)
    with torch.inference_mode():
        assert torch.allclose(scope["model"](PROMPTS).logits.float(), found, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": Router(kind="arrow", base_expert=True)},
        {"group": {"attention_gain": 2.0}},
        {"group": {"bias": {"a": 1.0}}},
        {"where": "mlp"},
        {"groups": (LayerGroup(layers=1, experts=("a", "b", "c")), LayerGroup(layers=1, experts=("a",)))},
        {"groups": (LayerGroup(layers=2, experts=("a", "b")),)},
    ],
)
def test_what_peft_cannot_do_is_refused(sources: dict[str, Source], tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="peft's Arrow") as caught:
        builder_of(sources, form="peft").export(routed(sources, **changes), tmp_path / "out", texts={})
    assert caught.value.place == "--as"
    assert not (tmp_path / "out").exists()
