"""A routed recipe that keeps one expert of a token in each mlp is a plain mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import save_model
from helpers_mixture import DENSE, PROMPT, TEXTS
from helpers_mixture import loaded as in_transformers
from helpers_routed import logits, opened, random_routers, routed, routing
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from evomerge.calibration import Calibration
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.mixture.builder import MixtureBuilder
from evomerge.mixture.routed import mixture_of_routed
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.routed.builder import RoutedBuilder
from evomerge.routed.sites import places_of, sites_of

BLOCK = Router(kind="fitted", per="block")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("adapters")
    base = save_model(DENSE["llama tied"], root / "base", dtype=torch.float32)
    folders = {}
    for seed, name in enumerate(("maths", "japanese", "code")):
        torch.manual_seed(seed)
        modules = ["gate_proj", "up_proj", "down_proj"][: 3 if name != "code" else 2]
        config = LoraConfig(r=2 + seed, lora_alpha=4, target_modules=modules)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                torch.nn.init.normal_(tensor, std=0.3)
        adapted.save_pretrained(root / name)
        folders[name] = root / name
    return opened(base, **folders)


def exported(sources: dict[str, Source], recipe: RoutedRecipe, out: Path) -> Any:
    """The mixture of a recipe with random routers, in plain transformers."""
    places = places_of(recipe, sites_of(recipe, sources), sources["base"])
    count = len(recipe.experts) + recipe.router.base_expert
    made = {name: random_routers()(place, count) for name, place in places.items()}
    routers = {name: (router.weight, router.bias) for name, router in made.items()}
    mixture, rows = mixture_of_routed(recipe, routers, sources)
    MixtureBuilder(BuildContext(sources, "base")).export_with(rows, mixture, out, texts={})
    return in_transformers(out)


def grouped(*groups: dict[str, Any]) -> tuple[LayerGroup, ...]:
    return tuple(LayerGroup.model_validate({"layers": 1, **group}) for group in groups)


EVERY = ("maths", "japanese", "code")


@pytest.mark.parametrize(
    ("groups", "router"),
    [
        (grouped({"experts": EVERY, "top_k": 1}, {"experts": EVERY, "top_k": 1}), BLOCK),
        (
            grouped(
                {"experts": EVERY, "top_k": 1, "mlp_gain": 0.7, "temperature": 0.5, "bias": {"code": 0.4}},
                {"experts": ("japanese",), "mlp_gain": 1.3},
            ),
            BLOCK,
        ),
        (grouped({"experts": ()}, {"experts": ("maths", "code"), "top_k": 1}), BLOCK),
        (
            grouped({"experts": EVERY, "top_k": 1}, {"experts": ("code",), "top_k": 1}),
            BLOCK.model_copy(update={"base_expert": True}),
        ),
    ],
)
def test_one_expert_of_each_token_is_a_slot(
    sources: dict[str, Source], groups: tuple[LayerGroup, ...], router: Router, tmp_path: Path
) -> None:
    recipe = routed(sources, where="mlp", router=router, groups=groups, fit="of the items")
    with routing(sources, recipe, random_routers()) as live:
        wanted = logits(live, PROMPT)
    with torch.inference_mode():
        got = exported(sources, recipe, tmp_path / "out")(PROMPT).logits
        plain = in_transformers(sources["base"].folder)(PROMPT).logits
    assert float((got - wanted).abs().max()) < 1e-6 * max(1.0, float(wanted.abs().max()))
    assert float((plain - wanted).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"where": "all"}, "a mixture routes only mlps"),
        ({"router": Router(kind="fitted")}, "one for each layer"),
        ({"router": Router(kind="fitted", per="block", gate="sigmoid")}, "gates that are not 1"),
        ({"groups": (LayerGroup(layers=2, experts=EVERY, top_k=2),)}, "module by module, not mlp by mlp"),
        ({"groups": (LayerGroup(layers=2, experts=EVERY),)}, "module by module, not mlp by mlp"),
    ],
)
def test_what_is_no_mixture(sources: dict[str, Source], changes: dict[str, Any], said: str) -> None:
    whole = {"where": "mlp", "router": BLOCK, "groups": (LayerGroup(layers=2, experts=EVERY, top_k=1),)} | changes
    with pytest.raises(InputError, match=said):
        mixture_of_routed(routed(sources, fit="of the items", **whole), {}, sources)


def test_it_is_a_form_of_routed_recipes(sources: dict[str, Source], tmp_path: Path) -> None:
    texts = {name: lambda name=name: TEXTS[name] for name in EVERY}
    calibration = Calibration(None, 32, own=texts)
    recipe = routed(
        sources, where="mlp", router=Router(kind="prototypes", per="block"), calibration=calibration.digest,
        groups=(LayerGroup(layers=2, experts=EVERY, top_k=1),),
    )  # fmt: skip
    context = BuildContext(sources, "base", calibration=calibration, form="mixture")
    made = RoutedBuilder(context)
    made.export(recipe, tmp_path / "out", texts={})
    wanted = logits(made.write(recipe), PROMPT)
    assert type(made.reload(tmp_path / "out").model).__name__ == "Glm4MoeForCausalLM"
    assert float((logits(made.reload(tmp_path / "out"), PROMPT) - wanted).abs().max()) < 1e-6
    assert recipe.unlike("mixture")
