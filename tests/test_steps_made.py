"""Steps on the tensors of models: against plain formulas, live as exported, and what they need run once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import WORDS, in_own_memory, save_model, tiny_config
from helpers_miniature import evomerge, export_of, newest_scored, short_search_file, write_texts
from test_adapters import LINEAR, train
from test_low_rank_rows import opened
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from evomerge.calibration import Calibration
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.merging.adapters.low_rank import NotLowRankError, coefficients, family_of
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured import inputs as inputs_module
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.inputs import Inputs
from evomerge.method import Value
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.store import Store

LINES = ("w1 w2 w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19")
TEXTS = Calibration(lambda: LINES, 12)
CPU = torch.device("cpu")
CONFIGS = {
    "llama": tiny_config(num_hidden_layers=3, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


@pytest.fixture(params=CONFIGS, scope="module")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A base and two other models of its architecture."""
    folder, config = tmp_path_factory.mktemp(request.param), CONFIGS[request.param]
    saved = {
        name: save_model(config, folder / name, seed=seed, dtype=torch.float32)
        for seed, name in enumerate(("base", "one", "two"))
    }
    return {name: open_source(name, str(path), place=name) for name, path in saved.items()}


def step(name: str, **values: Value) -> BlendStep:
    return BlendStep(name=name, parameters=values)


def recipe_of(sources: Mapping[str, Source], *steps: BlendStep, method: str = "ties") -> StackRecipe:
    numbers: dict[str, dict[str, float]] = {"weight": {"one": 0.7, "two": 0.4}}
    if method == "ties":
        numbers["density"] = {"one": 0.5, "two": 0.5}
    return StackRecipe.uniform(
        Blend(method=method, sources=("one", "two"), base="base", parameters={**numbers}, steps=steps),
        sources=dict.fromkeys(sources, "m"),
        tokenizer="base",
        layers=sources["base"].layers,
        dtype="float32",
    ).model_copy(update={"calibration": TEXTS.digest if any(s.name == "activations" for s in steps) else None})


def materialiser(sources: Mapping[str, Source], folder: Path | None = None) -> Materialiser:
    evidence = Evidence(folder, {name: name for name in sources} if folder else None)
    return Materialiser(sources, evidence=evidence, inputs=Inputs(sources, TEXTS, evidence, CPU))


def made(sources: Mapping[str, Source], recipe: StackRecipe) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in materialiser(sources).tensors(recipe)}


def importance(source: Source) -> dict[str, Tensor]:
    """mean |x| by input channel over the largest, of each linear layer's weight by its name, by plain transformers."""
    from transformers.pytorch_utils import Conv1D

    model = in_own_memory(AutoModelForCausalLM.from_pretrained(source.folder))
    tokenizer = load_tokenizer(source)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):

            def keep(module: object, given: tuple[Tensor], out: Tensor, name: str = name) -> None:
                seen.setdefault(f"{name}.weight", []).append(given[0][0].double())

            module.register_forward_hook(keep)
    with torch.no_grad():
        for text in LINES:
            model(torch.tensor([tokenizer(text)["input_ids"][: TEXTS.tokens]]))
    sizes = {name: torch.cat(rows).abs().mean(0) for name, rows in seen.items()}
    return {name: size / size.max() for name, size in sizes.items()}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_activations_relax_the_change_by_input_channels_of_the_base(sources: dict[str, Source], method: str) -> None:
    omega = 0.3
    found = made(sources, recipe_of(sources, step("activations", omega=omega), method=method))
    plain = made(sources, recipe_of(sources, method=method))
    sizes, relaxed = importance(sources["base"]), 0
    transposed = sources["base"].transposed
    for name, tensor in plain.items():
        base = sources["base"].read(name).double()
        wanted = tensor
        tied = name == "lm_head.weight" and sources["base"].roles[name].kind == "embedding"
        module = name if name in sizes else f"transformer.{name}"
        if module in sizes and not tied:
            factor = 1 - sizes[module] * (1 - omega)
            wanted = base + (tensor - base) * (factor[:, None] if name in transposed else factor)
            relaxed += 1
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-6), name
    assert relaxed == len(sizes) - (0 if "lm_head.weight" in plain else 1)


@pytest.mark.parametrize("steps", [("scale",), ("activations",), ("scale", "activations", "scale")])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_live_model_holds_what_is_exported(sources: dict[str, Source], steps: tuple[str, ...], method: str) -> None:
    values: dict[str, dict[str, Value]] = {"scale": {"factor": 0.8}, "activations": {"omega": 0.3}}
    recipe = recipe_of(sources, *(step(name, **values[name]) for name in steps), method=method)
    writer = materialiser(sources)
    written = live_model(sources["base"], CPU)
    writer.write(recipe, written)
    held = {**written.outside, **dict(written.model.named_parameters())}
    exported = dict(writer.tensors(recipe))
    for name, tensor in exported.items():
        found = next(held[key] for key in (name, f"transformer.{name}") if key in held)
        assert torch.equal(found, tensor), name


def test_only_the_base_is_run_and_only_once(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    run = inputs_module._channel_sizes
    monkeypatch.setattr(inputs_module, "_channel_sizes", lambda *given: runs.append(given[2].name) or run(*given))
    monkeypatch.setattr(inputs_module, "observed", lambda *given: pytest.fail("Gram matrices are not needed"))
    for omega in (0.1, 0.9):
        found = materialiser(sources, tmp_path)
        assert len(list(found.tensors(recipe_of(sources, step("activations", omega=omega))))) > 0
    assert runs == ["base"]


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("adapters")
    base = save_model(tiny_config(), folder / "base", dtype=torch.float32)
    one, two = (train(base, folder / name, seed=n, r=3, target_modules=LINEAR) for n, name in enumerate(("one", "two")))
    return opened(base, one=one, two=two)


def test_scaled_adapters_are_mixed_together_by_scaled_numbers(adapters: dict[str, Source]) -> None:
    family = family_of(adapters)
    plain, scaled = (
        coefficients(recipe_of(adapters, *steps, method="task_arithmetic"), adapters, family)
        for steps in ((), (step("scale", factor=0.6),))
    )
    assert torch.allclose(scaled, 0.6 * plain, rtol=1e-6)
    with pytest.raises(NotLowRankError, match="planned by what layers are given"):
        coefficients(recipe_of(adapters, step("activations"), method="task_arithmetic"), adapters, family)


def test_steps_follow_a_merge_in_core_space(adapters: dict[str, Source]) -> None:
    """Of a sum, which is the same in core space."""
    recipe = recipe_of(adapters, step("scale", factor=0.6), step("activations", omega=0.2), method="task_arithmetic")
    core = recipe.model_copy(update={"blends": (recipe.blends[0].model_copy(update={"basis": "core"}),)})
    wanted, found = made(adapters, recipe), made(adapters, core)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


# ---- searched --------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # half a minute: a whole search, resumed and exported
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("profile", "done"),
    [("lines", ["activations", "scale", "scale"]), ({"cosines": 3}, ["activations", "scale"])],
    ids=["lines", "cosines"],
)
def test_steps_and_a_profile_are_searched_resumed_and_exported(
    tmp_path: Path, profile: object, done: list[str]
) -> None:
    write_texts(tmp_path / "texts.jsonl", slice(6))
    file = short_search_file(
        tmp_path,
        space={"method": "ties", "steps": {"activations": {}, "scale": {"fixed": {"factor": 1.2}}}, "profile": profile},
        calibration={"file": "texts.jsonl", "prompts": 6, "tokens": 64},
    )
    search = tmp_path / "search"
    assert evomerge("search", file, "--dir", search) == 0
    assert evomerge("resume", search, "--set", "budget.candidates=12") == 0
    row = newest_scored(search)
    with Store.open(search / "search.db") as store:
        runs = [event.payload["sources"] for event in store.events(kinds=["calibrated"])]
    assert runs == [["base"]] * 2  # of the search and of its resumption, which found what was recorded
    names = [given["name"] for given in json.loads(row.recipe)["blends"][0]["steps"]]
    assert names == done
    assert export_of(row, search, tmp_path / "out") == 0
