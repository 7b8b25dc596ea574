"""Routed experts on a live model: the identities that hold for any router, and plain formulas."""

from __future__ import annotations

import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from helpers_routed import EVERY, PROMPTS, logits, merge, opened, random_routers, routed, routing, zeros
from test_adapters import train

from evomerge.checkpoints.source import Source
from evomerge.recipes.routed import LayerGroup, Router
from evomerge.routed import computing
from evomerge.routed.live import LiveExperts
from evomerge.routed.routers import routings
from evomerge.routed.sites import Place, places_of, sites_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Three adapters of unlike ranks and targets."""
    folder = tmp_path_factory.mktemp("models")
    base = save_model(tiny_config(), folder / "base")
    return opened(
        base,
        a=train(base, folder / "a", seed=1, r=4, lora_alpha=6, target_modules=EVERY),
        b=train(base, folder / "b", seed=2, r=2, lora_alpha=3, target_modules=EVERY),
        c=train(base, folder / "c", seed=3, r=3, lora_alpha=2, target_modules=["q_proj", "o_proj", "down_proj"]),
    )


@pytest.fixture(scope="module")
def twins(sources: dict[str, Source]) -> dict[str, Source]:
    """One adapter under three names."""
    return {"base": sources["base"], **dict.fromkeys(("a", "b", "c"), sources["a"])}


def only(chosen: int) -> object:
    def make(place: Place, experts: int) -> computing.Router:
        bias = torch.full((experts,), -1e4)
        bias[chosen] = 0.0
        return computing.Router("linear", torch.zeros(experts, place.width), bias)

    return make


PER = pytest.mark.parametrize("per", ["module", "block"])


@PER
def test_identical_experts_are_that_adapter_whatever_the_router_says(twins: dict[str, Source], per: str) -> None:
    for top_k in (None, 1, 2):
        recipe = routed(twins, router=Router(kind="prototypes", per=per), calibration="x", group={"top_k": top_k})
        with routing(twins, recipe, random_routers(1)) as live:
            assert torch.allclose(logits(live), logits(merge(twins, a=1.0)), atol=1e-5)


@PER
def test_a_router_that_is_sure_gives_one_adapter(sources: dict[str, Source], per: str) -> None:
    recipe = routed(sources, router=Router(kind="prototypes", per=per), calibration="x")
    for number, name in enumerate(recipe.experts):
        with routing(sources, recipe, only(number)) as live:
            assert torch.allclose(logits(live), logits(merge(sources, **{name: 1.0})), atol=1e-5)


def test_a_router_that_knows_nothing_gives_the_mean_and_with_gain_the_sum(sources: dict[str, Source]) -> None:
    with routing(sources, routed(sources)) as live:
        assert torch.allclose(logits(live), logits(merge(sources, a=1 / 3, b=1 / 3, c=1 / 3)), atol=1e-5)
    with routing(sources, routed(sources, group={"attention_gain": 3.0, "mlp_gain": 3.0})) as live:
        assert torch.allclose(logits(live), logits(merge(sources, a=1.0, b=1.0, c=1.0)), atol=1e-5)


def test_gains_are_of_attention_and_of_the_mlp(sources: dict[str, Source]) -> None:
    with routing(sources, routed(sources, group={"attention_gain": 0.0})) as live:
        found = logits(live)
    with routing(sources, routed(sources, where="mlp")) as live:
        assert torch.allclose(found, logits(live), atol=1e-6)
    with routing(sources, routed(sources, group={"mlp_gain": 0.0})) as live:
        found = logits(live)
    with routing(sources, routed(sources, where="attention")) as live:
        assert torch.allclose(found, logits(live), atol=1e-6)


def test_all_kept_is_soft(sources: dict[str, Source]) -> None:
    with routing(sources, routed(sources, group={"top_k": 3}), random_routers(2)) as live:
        found = logits(live)
    with routing(sources, routed(sources), random_routers(2)) as live:
        assert torch.equal(found, logits(live))


def test_no_expert_present_is_the_base_bit_for_bit(sources: dict[str, Source]) -> None:
    alone = logits(merge(sources, a=0.0))
    nobody = (LayerGroup(layers=2, experts=()),)
    for base_expert in (False, True):
        recipe = routed(sources, groups=nobody, router=Router(kind="arrow", base_expert=base_expert))
        with routing(sources, recipe, random_routers(3)) as live:
            assert torch.equal(logits(live), alone)


def test_an_abstaining_router_is_the_base(sources: dict[str, Source]) -> None:
    recipe = routed(sources, router=Router(kind="arrow", base_expert=True))
    with routing(sources, recipe, only(3)) as live:
        assert torch.allclose(logits(live), logits(merge(sources, a=0.0)), atol=1e-6)
    with routing(sources, recipe, zeros) as live:
        assert torch.allclose(logits(live), logits(merge(sources, a=0.25, b=0.25, c=0.25)), atol=1e-5)


def test_present_in_some_layers_alone(sources: dict[str, Source]) -> None:
    groups = (LayerGroup(layers=1, experts=("b",)), LayerGroup(layers=1, experts=("a", "b", "c")))
    recipe = routed(sources, groups=groups)
    sure = only(0)

    def make(place: Place, experts: int) -> computing.Router:
        return sure(place, experts)  # type: ignore[operator,no-any-return]

    with routing(sources, recipe, make) as live:  # a, where it is
        found = logits(live)
    expected = merge(sources, b=1.0)
    other = merge(sources, a=1.0)
    expected.model.model.layers[1].load_state_dict(other.model.model.layers[1].state_dict())
    assert torch.allclose(found, logits(expected), atol=1e-5)


@PER
def test_tokens_are_routed_as_the_formula_says(sources: dict[str, Source], per: str) -> None:
    """Against a model whose linear layers are replaced by the plain sum over experts and tokens."""
    group = {"top_k": 2, "temperature": 0.7, "attention_gain": 1.3, "mlp_gain": 0.8, "bias": {"b": 0.4}}
    recipe = routed(sources, router=Router(kind="prototypes", per=per), calibration="x", group=group)
    make = random_routers(4, 0.5)
    with routing(sources, recipe, make) as live:
        found = logits(live)
    expected = merge(sources, a=0.0)
    folded = {name: merge(sources, **{name: 1.0}).model for name in recipe.experts}
    seen: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for block in ("self_attn", "mlp"):
            for name, module in expected.model.model.layers[layer].get_submodule(block).named_children():
                if isinstance(module, torch.nn.Linear):
                    whole = f"model.layers.{layer}.{block}.{name}"
                    others = [folded[expert].get_submodule(whole).weight - module.weight for expert in recipe.experts]
                    place = f"model.layers.{layer}.{block}" if per == "block" else whole
                    router = make(
                        Place(place, layer, "mlp", per == "block", 16 if per == "block" else module.in_features), 3
                    )
                    module.forward = slow(
                        module, others, router, 1.3 if block == "self_attn" else 0.8, seen, place, per
                    )
    assert torch.allclose(found, logits(expected), atol=2e-5)


def slow(module, changes, router, gain, seen, place, per):  # type: ignore[no-untyped-def]
    def forward(given: torch.Tensor) -> torch.Tensor:
        if per == "module" or (module.in_features == 16 and place not in seen):
            seen[place] = given  # of a block, what its first module is given
        output = given @ module.weight.T
        for row in range(given.shape[0]):
            for token in range(given.shape[1]):
                scores = (router.weight @ seen[place][row, token] + router.bias) / 0.7 + torch.tensor([0, 0.4, 0])
                scores[scores.argmin()] = -torch.inf
                gates = scores.exp() / scores.exp().sum()
                for gate, change in zip(gates, changes, strict=True):
                    output[row, token] += gain * gate * (change @ given[row, token])
        return output

    return forward


@PER
def test_cache_batch_padding_and_order_change_nothing(sources: dict[str, Source], per: str) -> None:
    recipe = routed(sources, router=Router(kind="prototypes", per=per), calibration="x", group={"top_k": 2})
    with routing(sources, recipe, random_routers(5)) as live, torch.inference_mode():
        whole = logits(live)
        assert torch.allclose(logits(live, PROMPTS[1:2])[0], whole[1], atol=1e-5)
        assert torch.allclose(logits(live, PROMPTS.flip(0)).flip(0), whole, atol=1e-5)
        first = live.model(PROMPTS[:, :4], use_cache=True)
        then = live.model(PROMPTS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        assert torch.allclose(torch.cat([first.logits, then.logits], 1), whole, atol=1e-5)
        padded = torch.nn.functional.pad(PROMPTS, (3, 0))
        left = (padded > 0).long()
        assert torch.allclose(logits(live, padded, attention_mask=left)[:, 3:], whole, atol=1e-5)
        right = torch.nn.functional.pad(PROMPTS, (0, 3))
        assert torch.allclose(logits(live, right, attention_mask=(right > 0).long())[:, :6], whole, atol=1e-5)


@PER
def test_what_is_given_alike_is_computed_at_once_and_as_if_apart(sources: dict[str, Source], per: str) -> None:
    """c does not change the keys: it has no part there, and a router of its own all the same."""
    base, recipe = sources["base"], routed(sources, router=Router(kind="prototypes", per=per), calibration="x")
    live = merge(sources, a=0.0)
    sites = sites_of(recipe, sources)
    places = places_of(recipe, sites, base)
    gating = routings(recipe, places, {name: random_routers(8)(place, 3) for name, place in places.items()})
    experts = LiveExperts(live, sites, recipe.experts)
    units = [[site.module.split(".")[-1] for site in unit.sites] for unit in experts.units(recipe, gating)]
    assert units == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    told: dict[bool, dict[str, torch.Tensor]] = {}
    found = {}
    for apart in (False, True):
        heard = Heard()
        with experts.install(recipe, places, gating, heard, apart=apart):
            found[apart] = logits(live)
        told[apart] = heard.gates
    assert torch.allclose(found[False], found[True], atol=1e-6)
    assert told[False].keys() == told[True].keys() == places.keys()
    assert all(torch.allclose(gates, told[True][name], atol=1e-6) for name, gates in told[False].items())


class Heard:
    """Remembers the gates of every place."""

    def __init__(self) -> None:
        self.gates: dict[str, torch.Tensor] = {}

    def tokens(self, mask: torch.Tensor | None) -> None:
        """Begins a pass."""

    def routed(self, place: str, logits: torch.Tensor, gates: torch.Tensor) -> None:
        self.gates[place] = gates

    def done(self) -> None:
        """Ends one."""


def test_in_bfloat16_gates_are_float32(sources: dict[str, Source]) -> None:
    with routing(sources, routed(sources), random_routers(6)) as live:
        wide = logits(live)
    with routing(sources, routed(sources), random_routers(6), torch.bfloat16) as live:
        narrow = logits(live)
    with routing(sources, routed(sources), zeros, torch.bfloat16) as live:
        other = logits(live)
    assert (narrow - wide).abs().max() < 0.2 * (other - wide).abs().max()


def test_hooks_go_away(sources: dict[str, Source]) -> None:
    with routing(sources, routed(sources), random_routers(7)) as live:
        routed_logits = logits(live)
    assert not torch.allclose(logits(live), routed_logits, atol=1e-2)
    assert torch.equal(logits(live), logits(merge(sources, a=0.0)))
