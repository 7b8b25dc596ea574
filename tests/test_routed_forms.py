"""The four systems by their equations, each written out plainly, and (IA)3 vectors as experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from helpers_routed import EVERY, MakeRouter, loaded, logits, opened, random_routers, routed, routing, zeros
from test_adapters import train
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.routed.factors import factors_of
from evomerge.routed.sites import Place, places_of, sites_of
from evomerge.routed.trunk import base_alone

pytestmark = pytest.mark.filterwarnings("ignore")

MLP = ["gate_proj", "up_proj", "down_proj"]


def train_vectors(base: Path, folder: Path, seed: int) -> Path:
    """(IA)3 on keys, values and what the last map of the mlp is given."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def matrices(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Four LoRA of every linear layer."""
    folder, alike = tmp_path_factory.mktemp("adapters"), {"r": 2, "lora_alpha": 3, "target_modules": EVERY}
    return opened(base, **{name: train(base, folder / name, seed=n, **alike) for n, name in enumerate("abcd")})


@pytest.fixture(scope="module")
def vectors(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("vectors")
    return opened(base, **{name: train_vectors(base, folder / name, n) for n, name in enumerate("abc")})


def unbiased(make: MakeRouter) -> MakeRouter:
    """The papers' routers have no bias."""

    def made(place: Place, experts: int) -> Any:
        router = make(place, experts)
        return type(router)(router.kind, router.weight)

    return made


Equation = Callable[[str, torch.nn.Linear, Tensor], Tensor]
"""(name of a linear layer, it, what it is given) -> what the paper says it gives."""


def written_out(sources: dict[str, Source], recipe: RoutedRecipe, equation: Equation) -> Tensor:
    """The logits of the base with its adapted linear layers replaced by a paper's equation."""
    live = loaded(sources, base_alone(recipe, 2))
    for site in sites_of(recipe, sources):
        module = live.model.get_submodule(site.module)
        module.forward = lambda given, name=site.module, module=module: equation(name, module, given)
    return logits(live)


def router_of(sources: dict[str, Source], recipe: RoutedRecipe, make: MakeRouter) -> dict[str, Tensor]:
    places = places_of(recipe, sites_of(recipe, sources), sources["base"])
    return {name: make(place, len(recipe.experts)).weight for name, place in places.items()}


def changes_of(sources: dict[str, Source], recipe: RoutedRecipe) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for site in sites_of(recipe, sources):
        factors = [factors_of(site, expert) for expert in range(len(recipe.experts))]
        found[site.module] = [f.up @ f.down for f in factors if f is not None]
    return found


def test_molora(matrices: dict[str, Source]) -> None:
    """W0 x + sum_i s_i (alpha / r) B_i A_i x, s = softmax(W_g x), in every linear layer (2309.05444, equation 3)."""
    recipe, make = routed(matrices), unbiased(random_routers(1))
    routers, changes = router_of(matrices, recipe, make), changes_of(matrices, recipe)

    def equation(name: str, module: torch.nn.Linear, given: Tensor) -> Tensor:
        gates = torch.softmax(given @ routers[name].T, -1)
        output = given @ module.weight.T
        for expert, change in enumerate(changes[name]):
            output = output + gates[..., expert, None] * (given @ change.T)
        return output

    with routing(matrices, recipe, make) as live:
        assert torch.allclose(logits(live), written_out(matrices, recipe, equation), atol=1e-5)


def test_loramoe(matrices: dict[str, Source]) -> None:
    """W0 x + (alpha / r) sum_i omega_i B_i A_i x in the mlp alone, dense (2312.09979, equations 3 and 4)."""
    recipe, make = routed(matrices, where="mlp"), unbiased(random_routers(2))
    routers, changes = router_of(matrices, recipe, make), changes_of(matrices, recipe)
    assert {name.rsplit(".", 1)[1] for name in changes} == set(MLP)

    def equation(name: str, module: torch.nn.Linear, given: Tensor) -> Tensor:
        scores = (given @ routers[name].T).exp()
        gates = scores / scores.sum(-1, keepdim=True)
        weights = module.weight + torch.einsum("bte,eoi->btoi", gates, torch.stack(changes[name]))
        return torch.einsum("btoi,bti->bto", weights, given)

    with routing(matrices, recipe, make) as live:
        assert torch.allclose(logits(live), written_out(matrices, recipe, equation), atol=1e-5)


def test_mola(matrices: dict[str, Source]) -> None:
    """Two experts in the lower layer and four in the upper: softmax over those, the best two, divided by their sum."""
    groups = (
        LayerGroup(layers=1, experts=("a", "b"), top_k=2),
        LayerGroup(layers=1, experts=("a", "b", "c", "d"), top_k=2),
    )
    recipe, make = routed(matrices, groups=groups), unbiased(random_routers(3))
    routers, changes = router_of(matrices, recipe, make), changes_of(matrices, recipe)

    def equation(name: str, module: torch.nn.Linear, given: Tensor) -> Tensor:
        count = 2 if ".0." in name else 4
        output = given @ module.weight.T
        probabilities = torch.softmax(given @ routers[name][:count].T, -1)
        best, chosen = probabilities.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        for slot in range(2):
            for expert in range(count):
                gate = torch.where(chosen[..., slot] == expert, best[..., slot], 0.0)
                output = output + gate[..., None] * (given @ changes[name][expert].T)
        return output

    with routing(matrices, recipe, make) as live:
        assert torch.allclose(logits(live), written_out(matrices, recipe, equation), atol=1e-5)


def mov(sources: dict[str, Source], heads: bool, **changes: Any) -> RoutedRecipe:
    return routed(sources, router=Router(kind="prototypes", heads=heads), calibration="x", **changes)


def vectors_by_module(sources: dict[str, Source], recipe: RoutedRecipe) -> dict[str, Tensor]:
    """[experts, width] by module."""
    sites = sites_of(recipe, sources)
    return {s.module: torch.stack([sources[e].vectors(s.weight)[0][0] for e in recipe.experts]) for s in sites}


@pytest.mark.parametrize("heads", [True, False])
def test_mov(vectors: dict[str, Source], heads: bool) -> None:
    """x * (sum_i s_i l_i), s of the very activation; keys and values by head (2309.05444, equation 2, and its code)."""
    recipe, make = mov(vectors, heads), unbiased(random_routers(4))
    routers, scales = router_of(vectors, recipe, make), vectors_by_module(vectors, recipe)
    assert len(scales) == 6

    def equation(name: str, module: torch.nn.Linear, given: Tensor) -> Tensor:
        own = scales[name]
        if name.endswith("down_proj"):
            gates = torch.softmax(given @ routers[name].T, -1)
            return (given * (gates @ own)) @ module.weight.T
        output = given @ module.weight.T
        if not heads:
            return output * (torch.softmax(output @ routers[name].T, -1) @ own)
        parts = []
        for number, part in enumerate(output.split(4, -1)):  # two heads of four
            gates = torch.softmax(part @ routers[name].T, -1)
            parts.append(part * (gates @ own[:, 4 * number : 4 * number + 4]))
        return torch.cat(parts, -1)

    with routing(vectors, recipe, make) as live:
        assert torch.allclose(logits(live), written_out(vectors, recipe, equation), atol=1e-5)


def test_mixing_vectors_is_mixing_outputs(vectors: dict[str, Source]) -> None:
    """Of routers that know nothing: the plain merge of folded vectors; of sure ones that adapter, as peft has it."""
    recipe = mov(vectors, True)
    with routing(vectors, recipe, zeros) as live:
        mixed = logits(live)
    folded = loaded(vectors, base_alone(recipe, 2))
    for site in sites_of(recipe, vectors):
        weights = [vectors[name].read(site.weight).float() for name in recipe.experts]
        folded.model.get_parameter(f"{site.module}.weight").data.copy_(torch.stack(weights).mean(0))
    assert torch.allclose(mixed, logits(folded), atol=1e-5)
    alone = mov(vectors, True, groups=(LayerGroup(layers=2, experts=("b",)),))
    model = AutoModelForCausalLM.from_pretrained(vectors["base"].folder, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(model, vectors["b"].adapters[0]).eval()
    with routing(vectors, alone, random_routers(5)) as live, torch.inference_mode():
        assert torch.allclose(logits(live), expected(torch.arange(3, 21).reshape(3, 6)).logits, atol=1e-5)


def test_vectors_may_be_abstained_from(vectors: dict[str, Source]) -> None:
    """Of four that are gated alike, one the base: a quarter of each vector's difference from 1."""
    for heads in (False, True):
        recipe = mov(vectors, heads)
        recipe = recipe.model_copy(update={"router": recipe.router.model_copy(update={"base_expert": True})})
        with routing(vectors, recipe, zeros) as live:
            found = logits(live)
        with routing(vectors, mov(vectors, heads, group={"attention_gain": 0.75, "mlp_gain": 0.75}), zeros) as live:
            assert torch.allclose(found, logits(live), atol=1e-5)


def test_vectors_that_nobody_is_sure_of_leave_the_base(vectors: dict[str, Source]) -> None:
    recipe = mov(vectors, False, group={"attention_gain": 0.0, "mlp_gain": 0.0})
    with routing(vectors, recipe, random_routers(6)) as live:
        assert torch.equal(logits(live), logits(loaded(vectors, base_alone(recipe, 2))))


def test_a_cache_and_padding_change_nothing_by_head(vectors: dict[str, Source]) -> None:
    prompts = torch.arange(3, 21).reshape(3, 6)
    with routing(vectors, mov(vectors, True, group={"top_k": 2}), random_routers(7)) as live, torch.inference_mode():
        whole = logits(live)
        first = live.model(prompts[:, :3], use_cache=True)
        then = live.model(prompts[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        assert torch.allclose(torch.cat([first.logits, then.logits], 1), whole, atol=1e-5)
        padded = torch.nn.functional.pad(prompts, (2, 0))
        assert torch.allclose(logits(live, padded, attention_mask=(padded > 0).long())[:, 2:], whole, atol=1e-5)


def test_what_vectors_and_matrices_cannot_share_is_refused(
    vectors: dict[str, Source], matrices: dict[str, Source]
) -> None:
    both = {"base": vectors["base"], "a": vectors["a"], "b": matrices["b"]}
    with pytest.raises(InputError, match="several ways"):
        sites_of(routed(both, router=Router(kind="prototypes"), calibration="x"), both)
    with pytest.raises(InputError, match="low-rank"):
        sites_of(routed(vectors), vectors)
    with pytest.raises(InputError, match="are LoRA"):
        sites_of(mov(matrices, True), matrices)
