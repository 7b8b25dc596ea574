"""Mixtures of dense models: held against the dense models themselves and against the plain formula."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_mixture import (
    DENSE,
    TEXTS,
    alone,
    builder,
    dense_models,
    loaded,
    logits_of,
    mean,
    mixture,
    texts,
)
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from evomerge.checkpoints.backward import Listening, no_listener
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import check_recipe
from evomerge.mixture.layout import needed_bytes
from evomerge.recipes.base import read_recipe
from evomerge.recipes.mixture import MixtureRecipe

HOSTS = [
    ("llama", "mixtral"), ("mistral of a window", "mixtral"), ("llama of other heads", "qwen2_moe"),
    ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("llama tied", "glm4_moe"), ("qwen2", "glm4_moe"),
]  # fmt: skip
MORE_HOSTS = [
    ("llama tied", "mixtral"), ("llama 3", "mixtral"), ("mistral", "mixtral"), ("llama", "qwen2_moe"),
    ("llama 3", "qwen2_moe"), ("llama", "glm4_moe"), ("llama 3", "glm4_moe"), ("llama of other heads", "glm4_moe"),
    ("mistral", "glm4_moe"),
]  # fmt: skip


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return dense_models(DENSE["llama"], tmp_path_factory.mktemp("llamas") / "models")


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return dense_models(DENSE["qwen2"], tmp_path_factory.mktemp("qwens") / "models")


class PlainMixture(nn.Module):
    """sum_e g_e FFN_e(x) over the slots of a layer, computed for every token and slot."""

    def __init__(self, experts: list[nn.Module], weight: Tensor, gates: Any, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.experts, self.weight, self.gates, self.shared = nn.ModuleList(experts), weight, gates, shared

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x @ self.weight.T)
        out = sum(gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        return out if self.shared is None else out + self.shared(x)


def softmax_of_all(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def best_alone(logits: Tensor) -> Tensor:
    return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()


def best_unnormalised(logits: Tensor) -> Tensor:
    return logits.softmax(-1) * best_alone(logits)


def sigmoids(logits: Tensor) -> Tensor:
    return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)


def plain(sources: Mapping[str, Source], gate_weights: list[Tensor], gates: Any) -> Tensor:
    """Logits of the first source's model with a plain mixture of the first two sources in every layer."""
    first, second = (loaded(source.folder) for source in list(sources.values())[:2])
    for layer, weight in enumerate(gate_weights):
        experts = [first.model.layers[layer].mlp, second.model.layers[layer].mlp]
        first.model.layers[layer].mlp = PlainMixture(experts, weight, gates)
    return logits_of(first)


def gate_weights(live: LiveModel) -> list[Tensor]:
    return [t.detach().clone() for name, t in live.model.named_parameters() if name.endswith("mlp.gate.weight")]


@pytest.mark.parametrize(
    ("kind", "architecture"), [*HOSTS, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in MORE_HOSTS)]
)
def test_equal_experts_are_the_dense_model_live_and_exported(kind: str, architecture: str, tmp_path: Path) -> None:
    sources = dense_models(DENSE[kind], tmp_path / "models")
    first = next(iter(sources))
    recipe = mixture(
        architecture, sources, blends=[alone(first)], rest=0, embedding=0,
        groups=[{"layers": 2, "slots": {"a": 0, "b": 0}}],
        router={"kind": "random", "rest": 0, "slots": {"a": 0, "b": 0}},
    )  # fmt: skip
    made = builder(sources)
    got = logits_of(made.write(recipe).model)
    made.export(recipe, tmp_path / "out", texts={})
    assert torch.equal(got, logits_of(loaded(tmp_path / "out")))
    assert float((got - logits_of(loaded(sources[first].folder))).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("architecture", "changes", "gates"),
    [
        ("mixtral", {}, softmax_of_all),
        ("mixtral", {"top_k": 1}, best_alone),
        ("qwen2_moe", {"top_k": 1, "normalised": False}, best_unnormalised),
        ("glm4_moe", {}, sigmoids),
    ],
)
def test_a_mixture_computes_the_plain_formula(
    llamas: dict[str, Source], architecture: str, changes: dict[str, Any], gates: Any
) -> None:
    recipe = mixture(architecture, llamas, rest=0, embedding=0, **changes)
    live = builder(llamas).write(recipe)
    wanted = plain(llamas, gate_weights(live), gates)
    assert float((logits_of(live.model) - wanted).abs().max()) < 1e-5


def test_files_have_the_classic_names_and_the_bits_of_the_live_model(tmp_path: Path) -> None:
    sources = dense_models(DENSE["llama"], tmp_path / "models", torch.bfloat16)
    recipe = mixture("mixtral", sources)
    made = builder(sources)
    made.export(recipe, tmp_path / "out", texts={"README.md": "made\n"})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"model.layers.1.block_sparse_moe.experts.1.{w}.weight" for w in ("w1", "w2", "w3")} <= stored.keys()
    model = loaded(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert torch.equal(logits_of(made.write(recipe).model), logits_of(model))
    assert (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    second = load_file(sources["japanese"].folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(stored["model.layers.0.block_sparse_moe.experts.1.w3.weight"], second)


def test_what_was_written_before_changes_nothing(llamas: dict[str, Source]) -> None:
    one = mixture("mixtral", llamas)
    other = mixture("mixtral", llamas, blends=[mean("maths", "code"), alone("code"), alone("maths")], top_k=1)
    made = builder(llamas)
    first = logits_of(made.write(one).model)
    second = logits_of(made.write(other).model)
    assert not torch.equal(first, second)
    assert torch.equal(logits_of(made.write(one).model), first)
    assert torch.equal(logits_of(builder(llamas).write(other).model), second)


@pytest.mark.parametrize("lacking", [False, True])
def test_its_change_is_the_mean_square_of_what_its_slots_change(llamas: dict[str, Source], lacking: bool) -> None:
    """By the plain formula: attention as it is, and in its mlp's place the slots of each layer by equal shares."""
    first, second = {"layers": 1, "slots": {"maths": 0, "japanese": 1}}, {"layers": 1, "slots": {"japanese": 1}}
    groups = [first, second if lacking else first]
    slots = [[*group["slots"]] for group in groups]
    live = builder(llamas, base="code").write(mixture("glm4_moe", llamas, groups=groups, top_k=1))
    squares = sizes = 0.0
    for name in (name for name in llamas["code"].tensors):
        base, maths, japanese = (llamas[source].read(name).double() for source in ("code", "maths", "japanese"))
        here = {"maths": maths, "japanese": japanese}
        made = [here[slot] for slot in slots[int(name.split(".")[2])]] if ".mlp." in name else [(maths + japanese) / 2]
        squares += sum(float((tensor - base).square().sum()) for tensor in made) / len(made)
        sizes += float(base.square().sum())
    assert live.change == pytest.approx((squares / sizes) ** 0.5, rel=1e-6)


def test_the_one_slot_that_is_kept_weighs_exactly_one(llamas: dict[str, Source]) -> None:
    live = builder(llamas).write(mixture("mixtral", llamas, top_k=1))
    seen: list[Tensor] = []
    for layer in live.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, given, out: seen.append(out[1]))
    logits_of(live.model)
    assert len(seen) == 2
    assert all(bool((weights == 1).all()) for weights in seen)


def test_a_temperature_is_a_scale_of_the_rows(llamas: dict[str, Source]) -> None:
    made = builder(llamas)
    warm = [{"layers": 1, "slots": {"maths": 0, "japanese": 1}, "temperature": 4.0},
            {"layers": 1, "slots": {"maths": 0, "japanese": 1}, "temperature": 0.5}]  # fmt: skip
    plain_rows = gate_weights(made.write(mixture("mixtral", llamas)))
    scaled = gate_weights(made.write(mixture("mixtral", llamas, groups=warm)))
    assert torch.equal(scaled[0] * 4, plain_rows[0])
    assert torch.equal(scaled[1] / 2, plain_rows[1])


def test_a_bias_that_decides_is_that_expert(llamas: dict[str, Source]) -> None:
    group = {"layers": 2, "slots": {"maths": 0, "japanese": 1}, "bias": {"japanese": 5.0}}
    recipe = mixture("glm4_moe", llamas, rest=0, embedding=0, groups=[group], top_k=1)
    first, second = loaded(llamas["maths"].folder), loaded(llamas["japanese"].folder)
    for layer, other in zip(first.model.layers, second.model.layers, strict=True):
        layer.mlp = other.mlp
    got = logits_of(builder(llamas).write(recipe).model)
    assert float((got - logits_of(first)).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["llamas", "qwens"])
def test_layers_may_have_unequal_numbers_of_experts(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    sources: dict[str, Source] = request.getfixturevalue(kind)
    slots = {"maths": 0, "japanese": 1, "code": 3}
    recipe = mixture(
        "glm4_moe", sources, blends=[alone("maths"), alone("japanese"), mean("maths", "code"), alone("code")],
        groups=[{"layers": 1, "slots": slots}, {"layers": 1, "slots": {"code": 3}}], top_k=1,
        router={"kind": "random", "rest": 2, "slots": slots},
    )  # fmt: skip
    made = builder(sources)
    live = made.write(recipe)
    got = logits_of(live.model)
    made.export(recipe, tmp_path / "out", texts={})
    model = loaded(tmp_path / "out")
    assert torch.equal(logits_of(model), got)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[:2] = 1e4
        experts.down_proj[:2] = -1e4
    assert torch.equal(logits_of(model), got)  # no token is routed to these
    only = loaded(sources["code"].folder).model.layers[1].mlp
    given = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert float((model.model.layers[1].mlp(given) - only(given)).abs().max()) < 1e-6


@pytest.mark.parametrize("architecture", ["qwen2_moe", "glm4_moe"])
def test_a_shared_expert_computes_every_token(llamas: dict[str, Source], architecture: str, tmp_path: Path) -> None:
    blends = [alone("maths"), alone("japanese"), alone("code")]
    router = {"kind": "uniform", "rest": 0, "slots": {"maths": 0, "japanese": 1}}
    shared = {"blend": 2, "scale": 0.25}
    recipe = mixture(architecture, llamas, blends=blends, rest=0, embedding=0, shared=shared, router=router)
    made = builder(llamas)
    first, second, third = (loaded(llamas[name].folder).model for name in ("maths", "japanese", "code"))
    model = loaded(llamas["maths"].folder)
    for number, layer in enumerate(model.model.layers):
        beside = third.layers[number].mlp
        beside.down_proj.weight.data *= 0.25
        experts = [first.layers[number].mlp, second.layers[number].mlp]
        layer.mlp = PlainMixture(experts, torch.zeros(2, 16), softmax_of_all, beside)
    got = logits_of(made.write(recipe).model)
    assert float((got - logits_of(model)).abs().max()) < 1e-5
    made.export(recipe, tmp_path / "out", texts={})
    assert torch.equal(logits_of(loaded(tmp_path / "out")), got)


def prototypes(sources: Mapping[str, Source], architecture: str = "mixtral", **changes: Any) -> MixtureRecipe:
    router = {"kind": "prototypes", "rest": 0, "slots": {"maths": 0, "japanese": 1}}
    changes = {"rest": 0, "embedding": 0, "router": router, "calibration": texts().digest} | changes
    return mixture(architecture, sources, **changes)


def given_to_mlps(sources: Mapping[str, Source], slot: str) -> list[Tensor]:
    """The mean over a slot's tokens of what its own mlps are given, in a dense model, float64 [width] a layer."""
    model, mlps = loaded(sources["maths"].folder), loaded(sources[slot].folder)
    tokenizer_ids = [[int(word[1:]) + 3 for word in text.split()] for text in TEXTS[slot]]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, layer in enumerate(model.model.layers):
        layer.mlp = mlps.model.layers[number].mlp
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, given, out, number=number: seen[number].append(out[0, 1:].double())
        )
    with torch.inference_mode():
        for ids in tokenizer_ids:
            model(torch.tensor([ids]))
    return [torch.cat(parts).mean(dim=0) for parts in seen.values()]


def test_prototypes_are_differences_of_what_routers_themselves_are_given(llamas: dict[str, Source]) -> None:
    got = gate_weights(builder(llamas, calibration=texts()).write(prototypes(llamas)))
    means = {slot: given_to_mlps(llamas, slot) for slot in ("maths", "japanese")}
    for layer, weight in enumerate(got):
        one, other = means["maths"][layer], means["japanese"][layer]
        apart = (one - other) / 2
        wanted = torch.stack([apart, -apart]) / apart.square().sum()
        assert float((weight - wanted).abs().max() / wanted.abs().max()) < 1e-5
        logits = weight.double() @ torch.stack([one, other, (one + other) / 2]).T
        assert logits[:, 0] - logits[:, 2] == pytest.approx([1.0, -1.0], abs=1e-4)


def test_what_is_given_on_average_is_as_likely_to_go_to_any_slot(llamas: dict[str, Source]) -> None:
    group = {"layers": 2, "slots": {"maths": 0, "japanese": 1}, "temperature": 0.25}
    live = builder(llamas, calibration=texts()).write(prototypes(llamas, "glm4_moe", groups=[group], top_k=1))
    for layer, one, other in zip(
        live.model.model.layers, given_to_mlps(llamas, "maths"), given_to_mlps(llamas, "japanese"), strict=True
    ):
        gate = layer.mlp.gate
        middle = ((one + other) / 2).float()
        assert (gate.weight @ middle).sigmoid() + gate.e_score_correction_bias == pytest.approx([0.5, 0.5], abs=1e-5)
        for expert, mean_given in enumerate((one, other)):
            assert gate(mean_given.float()[None])[2].item() == expert


def test_texts_of_what_a_slot_is_not_for_are_subtracted(llamas: dict[str, Source]) -> None:
    given = texts({**TEXTS, "not maths": TEXTS["code"]})
    router = {"kind": "prototypes", "rest": 0, "slots": {"maths": 0, "japanese": 1}, "against": ["maths"]}
    made = builder(llamas, calibration=given)
    with_against = gate_weights(made.write(prototypes(llamas, router=router, calibration=given.digest)))
    without = gate_weights(builder(llamas, calibration=texts()).write(prototypes(llamas)))
    cosine = nn.functional.cosine_similarity(with_against[0], without[0])
    assert float(cosine[0]) < 0.99
    assert float(cosine[1]) > 0.9999


class NextTokens:
    """Texts of which a mixture is to say each next token."""

    digest = "of some texts"
    steps = 12
    rate = 0.3

    def passes(self, live: LiveModel, step: int, listening: Listening = no_listener) -> Generator[Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(3, 32, (4, 12))
        with listening(False):
            logits = live.model(ids, use_cache=False).logits
        yield nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def fitted(sources: Mapping[str, Source], architecture: str, kind: str = "fitted", **changes: Any) -> MixtureRecipe:
    router = {"kind": kind, "rest": 2, "slots": {"maths": 0, "japanese": 1}}
    return mixture(architecture, sources, router=router, fit=NextTokens.digest, **changes)


@pytest.mark.parametrize("architecture", ["mixtral", "glm4_moe"])
def test_fitted_routers_say_right_answers_likelier_than_equal_weights(
    llamas: dict[str, Source], architecture: str
) -> None:
    made = builder(llamas, fit=NextTokens())
    live = made.write(fitted(llamas, architecture))
    loss = float(next(NextTokens().passes(live, 0)))
    rows = gate_weights(live)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in live.model.parameters())
    uniform = float(next(NextTokens().passes(made.write(fitted(llamas, architecture, "uniform")), 0)))
    assert loss < uniform - 1e-3
    again = builder(llamas, fit=NextTokens()).write(fitted(llamas, architecture, top_k=1))
    assert all(torch.equal(one, other) for one, other in zip(rows, gate_weights(again), strict=True))


def test_a_recipe_is_read_back(llamas: dict[str, Source]) -> None:
    group = {"layers": 2, "slots": {"maths": 0, "japanese": 1}, "bias": {"maths": 0.5}}
    recipe = prototypes(llamas, "glm4_moe", groups=[group], shared={"blend": 1})
    again = read_recipe(recipe.canonical(), recipe.sources)
    assert again == recipe
    assert again.hash == recipe.hash
    assert recipe.lines()[0] == "glm4_moe of 2 experts, all of them for each token, prototypes router"
    assert mixture("mixtral", llamas).hash != mixture("mixtral", llamas, top_k=1).hash


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 3}, "keeps 3 slots of a token, and group 0 has 2"),
        ({"groups": [{"layers": 2, "slots": {"maths": 0}}], "top_k": 1}, "layers of a mixtral have equally many"),
        ({"groups": [{"layers": 2, "slots": {"maths": 0, "x": 1}}]}, "'x', for which the router has no row"),
        ({"groups": [{"layers": 2, "slots": {"maths": 0, "japanese": 1}, "bias": {"maths": 1.0}}]}, "have none"),
        ({"rest": 7}, "uses blend 7, but there are 3"),
        ({"router": {"kind": "fitted", "rest": 2, "slots": {"maths": 0, "japanese": 1}}}, "does not say on what"),
        ({"router": {"kind": "prototypes", "rest": 2, "slots": {"maths": 0, "japanese": 1}}}, "not name the texts"),
    ],
)
def test_recipes_that_mean_nothing(llamas: dict[str, Source], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        mixture("mixtral", llamas, **changes)


@pytest.mark.parametrize(
    ("kind", "architecture", "changes", "said"),
    [
        ("qwens", "mixtral", {}, "a mixtral cannot be made of models of the type qwen2"),
        ("llamas", "qwen3_moe", {}, "a qwen3_moe cannot be made of models of the type llama"),
        ("llamas", "mixtral", {"normalised": False}, "a mixtral always divides gates by their sum"),
        ("llamas", "mixtral", {"shared": {"blend": 0}}, "a mixtral has no expert that computes every token"),
        ("llamas", "mixtral", {"groups": [{"layers": 3, "slots": {"maths": 0, "japanese": 1}}]}, "are 3 layers"),
    ],
)
def test_mixtures_that_cannot_be_made(
    request: pytest.FixtureRequest, kind: str, architecture: str, changes: dict[str, Any], said: str
) -> None:
    sources: dict[str, Source] = request.getfixturevalue(kind)
    with pytest.raises(InputError, match=said):
        check_recipe(mixture(architecture, sources, **changes), sources)


@pytest.mark.parametrize(
    ("config", "architecture", "said"),
    [
        (DENSE["mistral of a window"], "glm4_moe", "attends to a sliding window"),
        (type(DENSE["llama"])(**{**DENSE["llama"].to_dict(), "mlp_bias": True}), "mixtral", "mlp.*bias, which"),
        (
            type(DENSE["llama"])(**{**DENSE["llama"].to_dict(), "attention_bias": True}),
            "glm4_moe",
            "o_proj.bias, which",
        ),
    ],
)
def test_settings_for_which_there_is_no_place(config: Any, architecture: str, said: str, tmp_path: Path) -> None:
    sources = dense_models(config, tmp_path / "models")
    with pytest.raises(InputError, match=said):
        check_recipe(mixture(architecture, sources), sources)


def test_texts_and_items_that_are_not_there_or_others(llamas: dict[str, Source]) -> None:
    with pytest.raises(InputError, match="made by the calibration texts"):
        builder(llamas).write(prototypes(llamas))
    alike = texts(dict.fromkeys(TEXTS, TEXTS["code"]))
    same = {"kind": "prototypes", "rest": 0, "slots": {"maths": 0, "japanese": 0}}
    with pytest.raises(InputError, match="the same for each of maths, japanese"):
        builder(llamas, calibration=alike).write(prototypes(llamas, router=same, calibration=alike.digest))
    with pytest.raises(InputError, match="fitted to items with the digest of some texts, and there are none here"):
        builder(llamas).write(fitted(llamas, "mixtral"))
    with pytest.raises(InputError, match="a mixture is another"):
        builder(llamas, engine=lambda live: live).write(mixture("mixtral", llamas))


def test_bytes_are_those_of_the_files(llamas: dict[str, Source], tmp_path: Path) -> None:
    recipe = mixture("mixtral", llamas)
    builder(llamas).export(recipe, tmp_path / "out", texts={})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gates = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("gate.weight"))
    total = sum(tensor.nbytes for tensor in stored.values())
    assert needed_bytes(llamas["maths"], len(recipe.slots), shared=False) == total - gates


def test_a_glm4_moe_has_a_head_of_its_own(tmp_path: Path) -> None:
    """vLLM never ties its head, and computed with what was in memory where the files had none."""
    tied = dense_models(DENSE["llama tied"], tmp_path / "models")
    recipe = mixture("glm4_moe", tied)
    builder(tied).export(recipe, tmp_path / "out", texts={})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    routers = sum(tensor.nbytes for name, tensor in stored.items() if ".gate." in name)
    total = sum(tensor.nbytes for tensor in stored.values())
    assert needed_bytes(tied["maths"], len(recipe.slots), shared=True, untied=True) == total - routers
