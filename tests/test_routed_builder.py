"""The builder of routed recipes: its routers, what it writes and exports, and what it refuses."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_checkpoints import WORDS, save_model, tiny_config
from helpers_routed import EVERY, PROMPTS, logits, merge, opened, routed
from peft.tuners.lora import ArrowConfig, create_arrow_model
from test_adapters import train
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.calibration import Calibration
from evomerge.checkpoints.backward import Listening, no_listener
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.fitting.fit import Fit
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import read_recipe
from evomerge.recipes.routed import Balance, LayerGroup, RoutedRecipe, Router
from evomerge.routed.builder import RoutedBuilder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters that differ in nothing but their numbers, of rank 2, and one of other modules."""
    folder = tmp_path_factory.mktemp("models")
    base = save_model(tiny_config(), folder / "base", dtype=torch.float32)
    alike = {"r": 2, "lora_alpha": 3, "target_modules": EVERY}
    made = {name: train(base, folder / name, seed=n, **alike) for n, name in enumerate("abc")}
    made["other"] = train(base, folder / "other", seed=9, r=3, target_modules=["v_proj", "up_proj"])
    made["head"] = train(base, folder / "head", seed=9, r=3, target_modules=["v_proj", "lm_head"])
    return {"base": base, **made}


@pytest.fixture(scope="module")
def sources(folders: dict[str, Path]) -> dict[str, Source]:
    return opened(folders["base"], **{name: folders[name] for name in "abc"})


def texts(name: str) -> list[str]:
    """Of each source other words."""
    first = 5 * (ord(name[0]) - ord("a"))
    return [" ".join(WORDS[3 + (first + step * k) % 20] for k in range(8)) for step in (1, 3, 2)]


CALIBRATION = Calibration(None, 16, own={name: (lambda name=name: texts(name)) for name in ("base", "a", "b", "c")})


@dataclass
class Answers:
    """A fit that has a model say what another says."""

    teacher: Mapping[str, Tensor]
    steps: int = 12
    rate: float = 0.4
    digest: str = "answers"
    kinds: tuple[int, ...] | None = (0, 1, 0)

    def passes(self, live: LiveModel, step: int, listening: Listening = no_listener) -> Generator[Tensor]:
        prompts = self.teacher["prompts"].roll(step, 0)
        with listening(step % 2 == 1):
            with torch.enable_grad():
                mask = torch.ones_like(prompts)
                found = live.model(prompts, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
                right = self.teacher["right"].roll(step, 0)
                loss = torch.nn.functional.kl_div(found, right, log_target=True, reduction="batchmean")
            yield loss

    def loss(self, live: LiveModel) -> float:
        return float(next(self.passes(live, 0)).detach())


@pytest.fixture(scope="module")
def fit(sources: dict[str, Source]) -> Answers:
    """The first prompt is answered as one adapter does, and the last ones as another."""
    one, other = logits(merge(sources, a=1.0)), logits(merge(sources, b=1.0))
    right = torch.cat([one[:1], other[1:]]).log_softmax(-1)
    return Answers({"prompts": PROMPTS, "right": right})


def builder_of(sources: Mapping[str, Source], fit: Fit | None = None, **changes: Any) -> RoutedBuilder:
    context = {"base": "base", "calibration": CALIBRATION, "dtype": torch.float32, **changes}
    return RoutedBuilder(BuildContext(sources, "base", fit=fit, **context))


def fitted(sources: Mapping[str, Source], **router: Any) -> RoutedRecipe:
    return routed(sources, router=Router(kind="fitted", **router), fit="answers")


KINDS = [
    {"router": Router(kind="arrow")},
    {"router": Router(kind="spectral"), "calibration": CALIBRATION.digest},
    {"router": Router(kind="prototypes"), "calibration": CALIBRATION.digest},
    {"router": Router(kind="prototypes", per="block", base_expert=True), "calibration": CALIBRATION.digest},
    {"router": Router(kind="fitted"), "fit": "answers"},
]


@pytest.mark.parametrize("changes", KINDS, ids=["arrow", "spectral", "prototypes", "block", "fitted"])
def test_a_recipe_gives_the_same_bits_from_kept_and_from_lost_routers(
    sources: dict[str, Source], fit: Answers, changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = routed(sources, group={"top_k": 2, "temperature": 0.5}, **changes)
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    contents = {name: name for name in sources}
    first = logits(builder_of(sources, fit, evidence=Evidence(tmp_path / "one", contents)).write(recipe))
    files = set((tmp_path / "one").iterdir())
    again = builder_of(sources, fit, evidence=Evidence(tmp_path / "one", contents))
    assert torch.equal(logits(again.write(recipe)), first)
    assert set((tmp_path / "one").iterdir()) == files
    assert torch.equal(logits(builder_of(sources, fit).write(recipe)), first)
    assert not torch.allclose(first, logits(merge(sources, a=1 / 3, b=1 / 3, c=1 / 3)), atol=1e-3)


def test_candidates_follow_each_other_without_a_trace(sources: dict[str, Source]) -> None:
    builder = builder_of(sources)
    one = routed(sources, group={"top_k": 1})
    other = routed(sources, groups=(LayerGroup(layers=1, experts=("b",)), LayerGroup(layers=1, experts=("a", "c"))))
    first, second = logits(builder.write(one)), logits(builder.write(other))
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(logits(builder.write(one)), first)


def test_arrow_is_that_of_peft(folders: dict[str, Path], sources: dict[str, Source]) -> None:
    """On tokens whose choice of experts does not hang on the last digits of a power iteration."""
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    arrow = create_arrow_model(
        model, [str(folders[name]) for name in "abc"], ArrowConfig(top_k=2, router_temperature=0.8, rng_seed=1)
    ).eval()
    exact = builder_of(sources).routers(routed(sources))
    with torch.inference_mode():
        likeness: list[Tensor] = []
        arrow(PROMPTS)  # makes its prototypes, by a power iteration that is cut short, which are put right here
        for name, module in arrow.named_modules():
            if name.endswith("arrow_router") and hasattr(module, "prototypes"):
                own = exact[name.removeprefix("base_model.model.").removesuffix(".lora_arrow.arrow_router")].weight
                likeness.append((module.prototypes * own).sum(1).abs())
                module.prototypes = own.clone()
        expected = arrow(PROMPTS).logits
    assert torch.cat(likeness).median() > 0.99
    live = builder_of(sources).write(routed(sources, group={"top_k": 2, "temperature": 0.8}))
    assert torch.allclose(logits(live), expected, atol=1e-5)


def test_arrow_grows_alike_with_the_temperature(sources: dict[str, Source]) -> None:
    live = builder_of(sources).write(routed(sources, group={"temperature": 1e6}))
    assert torch.allclose(logits(live), logits(merge(sources, a=1 / 3, b=1 / 3, c=1 / 3)), atol=1e-4)


def test_prototypes_tell_the_texts_of_experts_apart(sources: dict[str, Source]) -> None:
    builder = builder_of(sources)
    recipe = routed(sources, router=Router(kind="prototypes"), calibration=CALIBRATION.digest)
    router = builder.routers(recipe)["model.layers.0.self_attn.q_proj"]
    live = builder.write(recipe)
    layer = live.model.model.layers[0]
    means = {}
    for name in "abc":
        ids = [torch.tensor([live.tokenizer(text)["input_ids"]]) for text in texts(name)]
        seen = [layer.input_layernorm(live.model.model.embed_tokens(text))[0] for text in ids]
        means[name] = torch.cat(seen).mean(0)
    middle = sum(means.values()) / 3
    for row, name in zip(router.weight, "abc", strict=True):
        apart = means[name] - middle
        assert torch.allclose(row, apart / apart.norm(), atol=1e-5)
    assert router.bias is not None
    assert torch.allclose(router.logits(middle), torch.zeros(3), atol=1e-5)


def test_spectral_logits_are_one_on_average_on_own_texts(sources: dict[str, Source]) -> None:
    builder = builder_of(sources)
    recipe = routed(sources, router=Router(kind="spectral"), calibration=CALIBRATION.digest)
    router = builder.routers(recipe)["model.layers.0.mlp.gate_proj"]
    live = builder.write(routed(sources, groups=(LayerGroup(layers=2, experts=()),)))
    for number, name in enumerate("abc"):
        seen: list[Tensor] = []
        hook = live.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda m, given, seen=seen: seen.append(given[0][0])
        )
        for text in texts(name):
            logits(live, torch.tensor([live.tokenizer(text)["input_ids"]]))
        hook.remove()
        assert router.logits(torch.cat(seen))[:, number].mean().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_fitted_routers_have_less_loss_than_those_that_know_nothing(
    sources: dict[str, Source], fit: Answers, gate: str
) -> None:
    builder = builder_of(sources, fit)
    builder.write(fitted(sources, gate=gate))
    after = fit.loss(builder.write(fitted(sources, gate=gate)))
    nothing = routed(sources, router=Router(kind="arrow", gate=gate), group={"temperature": 1e9})
    before = fit.loss(builder.write(nothing))
    assert after < 0.8 * before


def test_losses_of_use_change_what_is_fitted(sources: dict[str, Source], fit: Answers) -> None:
    builder = builder_of(sources, fit)
    plain = builder.routers(fitted(sources))
    place = "model.layers.1.mlp.down_proj"
    for balance in (Balance(switch=1.0), Balance(z=1.0), Balance(localized=1.0)):
        other = builder.routers(fitted(sources, balance=balance))
        assert not torch.equal(other[place].weight, plain[place].weight)
    small = builder.routers(fitted(sources, balance=Balance(z=100.0)))[place]
    assert small.bias is not None
    assert small.bias.logsumexp(0) < 1.05  # log 3 is 1.0986, where routers know nothing


def test_fitting_groups_needs_items_with_groups(sources: dict[str, Source], fit: Answers) -> None:
    without = Answers(fit.teacher, kinds=None)
    with pytest.raises(InputError, match="have none") as caught:
        builder_of(sources, without).routers(fitted(sources, balance=Balance(localized=1.0)))
    assert caught.value.place == "recipe.router.balance.localized"


def test_refitted_routers_are_those_of_the_recipe(sources: dict[str, Source], fit: Answers) -> None:
    builder = builder_of(sources, fit)
    once, two = fitted(sources), fitted(sources, refitted=True)
    group = (LayerGroup(layers=2, experts=("a", "b"), top_k=1),)
    same = builder.routers(once.model_copy(update={"groups": group}))
    place = "model.layers.0.mlp.up_proj"
    assert torch.equal(same[place].weight, builder.routers(once)[place].weight)
    refitted = builder.routers(two.model_copy(update={"groups": group}))
    assert not torch.equal(refitted[place].weight, same[place].weight)
    assert not torch.equal(refitted[place].weight, builder.routers(two)[place].weight)


def test_flattened_is_the_plain_merge_of_mean_gates(sources: dict[str, Source], tmp_path: Path) -> None:
    """Of gates that are the same for every token it is the very model; else one whose weights say what they were."""
    builder = builder_of(sources)
    even = routed(sources, group={"temperature": 1e9, "mlp_gain": 2.0})
    expected = logits(builder.write(even))
    builder.export(even, tmp_path / "even", texts={"README.md": "x"})
    assert torch.allclose(logits(builder.reload(tmp_path / "even")), expected, atol=1e-3)
    plain = builder.flattened(routed(sources, group={"top_k": 1}, where="mlp"))
    blend = plain.blend_for(
        sources["base"].roles["model.layers.0.mlp.up_proj.weight"], "model.layers.0.mlp.up_proj.weight"
    )
    weights = blend.parameters["weight"]
    assert isinstance(weights, dict)
    assert sum(float(weight) for weight in weights.values()) == pytest.approx(1.0)
    assert "model.layers.0.self_attn.q_proj.weight" not in plain.tensors


def refused(recipe: RoutedRecipe, sources: Mapping[str, Source], fit: Fit | None = None, **context: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        builder_of(sources, fit, **context).write(recipe)
    return caught.value


def test_what_is_no_expert_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    head = opened(folders["base"], a=folders["a"], head=folders["head"])
    assert "lm_head" in str(refused(routed(head), head))
    another = save_model(tiny_config(), tmp_path / "another", seed=4)
    strange = opened(folders["base"], a=folders["a"])
    strange |= {"b": opened(another, b=folders["b"])["b"]}
    error = refused(routed(strange), strange)
    assert error.place == "recipe.experts.b"
    assert "another model" in str(error)
    full = {"base": strange["base"], "a": strange["base"]}
    assert "no adapter" in str(refused(routed(full), full))
    dora = train(folders["base"], tmp_path / "dora", r=2, use_dora=True, target_modules=["q_proj"])
    doras = opened(folders["base"], a=dora)
    assert "DoRA" in str(refused(routed(doras), doras))


def test_mixed_targets_are_allowed_and_layers_counted(folders: dict[str, Path]) -> None:
    mixed = opened(folders["base"], a=folders["a"], other=folders["other"])
    builder_of(mixed).write(routed(mixed))
    error = refused(routed(mixed, groups=(LayerGroup(layers=3, experts=("a",)),)), mixed)
    assert error.place == "recipe.groups"


def test_texts_and_items_that_are_missing_are_named(sources: dict[str, Source], fit: Answers) -> None:
    prototypes = routed(sources, router=Router(kind="prototypes"), calibration="elsewhere")
    assert refused(prototypes, sources, calibration=None).place == "recipe.calibration"
    assert refused(prototypes, sources).place == "recipe.calibration"
    shared = Calibration(lambda: texts("a"), 16)
    recipe = routed(sources, router=Router(kind="prototypes"), calibration=shared.digest)
    assert refused(recipe, sources, calibration=shared).place == "calibration.sources"
    assert refused(fitted(sources), sources).place == "recipe.fit"
    assert refused(fitted(sources), sources, Answers(fit.teacher, digest="others")).place == "recipe.fit"


def test_recipes_that_say_what_cannot_be_are_refused(sources: dict[str, Source]) -> None:
    with pytest.raises(ValueError, match="per: module"):
        Router(kind="arrow", per="block")
    with pytest.raises(ValueError, match="not fitted"):
        Router(kind="arrow", balance=Balance(switch=0.1))
    with pytest.raises(ValueError, match="calibration"):
        routed(sources, router=Router(kind="spectral"))
    with pytest.raises(ValueError, match="keeps 4"):
        routed(sources, group={"top_k": 4})


def test_peft_is_the_reference(folders: dict[str, Path], sources: dict[str, Source]) -> None:
    """A layer of one expert is what peft computes with that adapter active."""
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(model, folders["b"]).eval()
    live = builder_of(sources).write(routed(sources, groups=(LayerGroup(layers=2, experts=("b",)),)))
    with torch.inference_mode():
        assert torch.allclose(logits(live), expected(PROMPTS).logits, atol=1e-5)
