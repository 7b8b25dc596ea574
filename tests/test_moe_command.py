"""The command moe: mergekit-moe's configurations, and fewer experts of a mixture that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_mixture import DENSE, TEXTS, alone, builder, dense_models, loaded, logits_of, mixture, texts
from safetensors.torch import load_file

from evomerge.checkpoints.source import Source, open_source
from evomerge.commands.moe import assemble_or_prune
from evomerge.errors import InputError
from evomerge.mergekit.moe import mixture_of, read_moe
from evomerge.mixture.pruning import Use, kept_experts, use_of_experts
from evomerge.recipes.mixture import MixtureRecipe

SLOTS = {"maths": 0, "japanese": 1, "code": 2}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return dense_models(DENSE["llama"], tmp_path_factory.mktemp("llamas") / "models")


def configuration(**changes: Any) -> dict[str, Any]:
    experts = [
        {"source_model": "maths", "positive_prompts": TEXTS["maths"], "negative_prompts": TEXTS["code"]},
        {"source_model": {"model": {"path": "japanese"}}, "positive_prompts": TEXTS["japanese"]},
    ]
    return {"base_model": "code", "gate_mode": "hidden", "dtype": "float32", "experts": experts} | changes


def read(kind: str = "llama", **changes: Any) -> MixtureRecipe:
    return mixture_of(read_moe(configuration(**changes), "moe.yaml"), lambda reference: (kind, 2), "moe.yaml").recipe


def test_a_configuration_is_a_mixture_on_its_base(llamas: dict[str, Source], tmp_path: Path) -> None:
    import yaml

    file = llamas["maths"].folder.parent / "moe.yaml"
    file.write_text(yaml.safe_dump(configuration()))
    assemble_or_prune(str(file), tmp_path / "out", None, None, None, merged=True)
    model, stored = loaded(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    base, maths = (load_file(llamas[name].folder / "model.safetensors") for name in ("code", "maths"))
    assert model.config.num_experts_per_tok == 2
    experts = "model.layers.1.block_sparse_moe.experts.0"
    for classic, dense in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        assert torch.equal(stored[f"{experts}.{classic}.weight"], maths[f"model.layers.1.mlp.{dense}.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(stored[name], base[name])
    given = texts({"maths": TEXTS["maths"], "not maths": TEXTS["code"], "japanese": TEXTS["japanese"]}, tokens=4096)
    slots = {"maths": 0, "japanese": 1}
    recipe = mixture(
        "mixtral", llamas, tokenizer="code", rest=2, embedding=2, groups=[{"layers": 2, "slots": slots}],
        router={"kind": "prototypes", "rest": 2, "slots": slots, "against": ["maths"]},
        blends=[*mixture("mixtral", llamas).blends[:2], alone("code")], calibration=given.digest,
    )  # fmt: skip
    made = builder(llamas, calibration=given).write(recipe)
    assert torch.equal(logits_of(made.model), logits_of(model))


@pytest.mark.parametrize(
    ("kind", "changes", "architecture"),
    [
        ("llama", {}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("llama", {"shared_experts": [{"source_model": "code", "residual_scale": 0.1}]}, "qwen2_moe"),
        ("llama", {"architecture": "qwen"}, "qwen2_moe"),
    ],
)
def test_the_architecture_is_that_of_the_models_or_the_one_that_is_said(
    kind: str, changes: dict[str, Any], architecture: str
) -> None:
    recipe = read(kind, **changes)
    assert recipe.architecture == architecture
    assert (recipe.shared is not None) == ("shared_experts" in changes)
    assert recipe.shared is None or recipe.shared.scale == 0.1


def test_two_experts_of_one_model_are_two_slots_with_their_own_prompts() -> None:
    experts = [{"source_model": "maths", "positive_prompts": [text]} for text in TEXTS["code"]]
    made = mixture_of(read_moe(configuration(experts=experts), "moe.yaml"), lambda reference: ("llama", 2), "moe.yaml")
    assert made.recipe.slots == ("maths-1", "maths-2")
    assert made.texts is not None
    assert [made.texts.texts_of(slot) for slot in made.recipe.slots] == [(text,) for text in TEXTS["code"]]


def test_random_gates_need_no_prompts() -> None:
    recipe = read(gate_mode="random", experts=[{"source_model": name} for name in ("maths", "japanese")])
    assert recipe.router.kind == "random"
    assert recipe.calibration is None


def one_expert(**changes: Any) -> list[dict[str, Any]]:
    first, second = configuration()["experts"]
    return [{**first, **changes}, second]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate_mod": "hidden"}, "gate_mod: is not a known key"),
        ({"gate_mode": "hiden"}, "gate_mode"),
        ({"experts_per_token": 3}, "is 3, and there are 2 experts"),
        ({"experts": one_expert(noise_scale=0.1)}, "experts.0.noise_scale: cannot be taken"),
        ({"experts": one_expert(residual_scale=0.1)}, "experts.0.residual_scale: cannot be taken"),
        ({"experts": one_expert(positive_prompts=[])}, "experts.0.positive_prompts: is empty"),
        ({"shared_experts": [{"source_model": "code"}] * 2}, "shared_experts: are 2"),
        ({"shared_experts": [{"source_model": "code", "positive_prompts": ["x"]}]}, "computes every token alike"),
        ({"architecture": "deepseek"}, "deepseek is not supported here"),
    ],
)
def test_configurations_that_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(**changes)


def exported(llamas: dict[str, Source], out: Path, architecture: str, **changes: Any) -> Path:
    """A mixture of three experts."""
    blends = [*mixture("mixtral", llamas).blends[:2], alone("code")]
    router = {"kind": "random", "rest": 0, "slots": SLOTS}
    group = {"layers": 2, "slots": SLOTS, **changes.pop("group", {})}
    recipe = mixture(
        architecture, llamas, blends=blends, rest=0, embedding=0, groups=[group], router=router, **changes
    )  # fmt: skip
    builder(llamas).export(recipe, out, texts={})
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[Path, int, int]:
    file = tmp_path / "texts.txt"
    file.write_text("w1 w2 w3 w4 w5 w6 w7 w8\nw20 w21 w22 w23 w24 w25 w26\nw9 w10 w11 w12 w13 w14 w15\n")
    return file, 3, 32


@pytest.mark.parametrize("merged", [True, False])
def test_an_expert_that_no_token_goes_to_is_not_missed(
    llamas: dict[str, Source], tmp_path: Path, prompts: tuple[Path, int, int], merged: bool
) -> None:
    folder = exported(llamas, tmp_path / "whole", "glm4_moe", top_k=1, group={"bias": {"japanese": -5.0}})
    assemble_or_prune(str(folder), tmp_path / "out", None, 2, prompts, merged=merged)
    pruned = loaded(tmp_path / "out")
    assert pruned.config.n_routed_experts == 2
    assert float((logits_of(pruned) - logits_of(loaded(folder))).abs().max()) < 1e-6
    whole, fewer = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    name = "model.layers.1.mlp.{}"
    assert torch.equal(fewer[name.format("gate.weight")], whole[name.format("gate.weight")][[0, 2]])
    last = "experts.{}.down_proj.weight"
    assert torch.equal(fewer[name.format(last.format(1))], whole[name.format(last.format(2))])


def test_use_is_the_sum_of_the_gates(llamas: dict[str, Source], tmp_path: Path, prompts: tuple[Path, int, int]) -> None:
    folder = exported(llamas, tmp_path / "whole", "mixtral", top_k=2)
    given = texts({"model": prompts[0].read_text().splitlines()})
    found = use_of_experts(open_source("model", str(folder), place=str(folder)), given, torch.device("cpu"))
    model = loaded(folder)
    for layer in range(2):
        gates, logits = torch.zeros(3), []
        for text in given.texts_of("model"):
            ids = torch.tensor([[int(word[1:]) + 3 for word in text.split()]])
            with torch.inference_mode():
                routed = model(ids, output_router_logits=True).router_logits[layer]
            best, indices = routed.softmax(-1).topk(2)
            gates.index_add_(0, indices.flatten(), (best / best.sum(-1, keepdim=True)).flatten())
            logits.append(routed)
        assert found[layer].gates.float() == pytest.approx(gates, rel=1e-5)
        assert found[layer].alike.float() == pytest.approx(torch.corrcoef(torch.cat(logits).T), abs=1e-4)


def test_what_goes_is_merged_by_use_into_what_it_is_like() -> None:
    alike = torch.eye(4, dtype=torch.float64)
    alike[0, 1] = alike[1, 0] = 0.9
    alike[2, 3] = alike[3, 2] = 0.5
    use = Use(torch.tensor([1.0, 3.0, 0.0, 6.0], dtype=torch.float64), alike)
    assert kept_experts(use, 2, merged=True) == {1: {1: 0.75, 0: 0.25}, 3: {3: 1.0}}
    assert kept_experts(use, 2, merged=False) == {1: {1: 1.0}, 3: {3: 1.0}}


def test_merged_experts_are_means_weighted_by_use(
    llamas: dict[str, Source], tmp_path: Path, prompts: tuple[Path, int, int]
) -> None:
    folder = exported(llamas, tmp_path / "whole", "mixtral", top_k=2)
    given = texts({"model": prompts[0].read_text().splitlines()})
    use = use_of_experts(open_source("model", str(folder), place=str(folder)), given, torch.device("cpu"))[1]
    assemble_or_prune(str(folder), tmp_path / "out", None, 1, prompts, merged=True)
    whole, fewer = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    wanted = sum(share * whole[name.format(e)].double() for e, share in enumerate(use.gates / use.gates.sum()))
    assert float((fewer[name.format(0)] - wanted).abs().max()) < 1e-6
    assert loaded(tmp_path / "out").config.num_experts_per_tok == 1


def test_what_cannot_be_pruned(llamas: dict[str, Source], tmp_path: Path, prompts: tuple[Path, int, int]) -> None:
    dense, folder = str(llamas["maths"].folder), str(exported(llamas, tmp_path / "whole", "mixtral"))
    for model, keep, given, said in (
        (dense, 1, prompts, "is a llama, whose experts cannot be pruned"),
        (folder, 3, prompts, "is 3; of 3 experts, 1 to 2 can be kept"),
        (folder, 2, None, "texts are needed to see which experts are used"),
    ):
        with pytest.raises(InputError, match=said):
            assemble_or_prune(model, tmp_path / "out", None, keep, given, merged=True)
    with pytest.raises(InputError, match="there is no architecture of mixtures 'mixtrl'"):
        assemble_or_prune("moe.yaml", tmp_path / "out", "mixtrl", None, None, merged=True)
