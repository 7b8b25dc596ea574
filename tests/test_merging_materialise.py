"""Recipes made into tensors: part by part, in the live model as in the export, and what is refused first."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from safetensors.torch import load_file, save_file
from test_adapters import train
from torch import Tensor

from evomerge.checkpoints.adapters import fold
from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.jobs import TensorJob
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.materialise import Materialiser, check_stack
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Weights
from evomerge.method import default_parameters, own_methods
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.testing import methods

METHODS = {name: method for name, method in own_methods().items() if not method.needs}
LAYERS = 2
NAMES = ("maths", "ja")
MIXED = {name: NAMES[: method.max_sources] for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_model(tiny_config(), root / name, seed=i) for i, name in enumerate(("base", *NAMES))}
    return {name: open_source(name, str(folder), place=f"sources.{name}") for name, folder in folders.items()}


def blend(method: str, sources: tuple[str, ...] = NAMES, **numbers: Any) -> Blend:
    spec = METHODS[method]
    parameters = default_parameters(spec, sources) | numbers
    return Blend(method=method, sources=sources, base="base" if spec.needs_base else None, parameters=parameters)


def recipe_of(mix: Blend, sources: Mapping[str, Source], **more: Any) -> StackRecipe:
    references = {name: source.reference for name, source in sources.items()}
    return StackRecipe.uniform(mix, sources=references, tokenizer="base", layers=LAYERS, **more)


def stored(source: Source) -> dict[str, Tensor]:
    return load_file(source.folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_what_its_method_makes_of_it(
    method: str, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = blend(method, MIXED[method])
    made = dict(Materialiser(sources).tensors(recipe_of(mix, sources, seed=9)))
    files = {name: stored(source) for name, source in sources.items()}
    assert made.keys() == files["base"].keys()
    for name, tensor in made.items():
        base = files["base"][name] if mix.base else None
        monkeypatch.setattr(methods, "SEED", 9)
        monkeypatch.setattr(methods, "TENSOR", name)
        monkeypatch.setattr(methods, "ROLE", sources["base"].roles[name])
        read = [files[each][name] for each in mix.sources]
        expected = methods.merge(METHODS[method], base, read, mix, models=files)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected.bfloat16())


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, which names no source
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_source_is_refused_whatever_the_method(
    method: str, value: float, sources: dict[str, Source], tmp_path: Path
) -> None:
    """Also where a mask would leave the element out, or a decomposition end without a word of whose it is."""
    tensors = stored(sources["maths"])
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, shutil.copytree(sources["maths"].folder, tmp_path / "maths") / "model.safetensors")
    broken = sources | {"maths": open_source("maths", str(tmp_path / "maths"), place="sources.maths")}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN|NaN.*layers\.1\.mlp\.up_proj\.weight"):
        dict(Materialiser(broken).tensors(recipe_of(blend(method, MIXED[method]), broken)))


def test_every_part_is_made_by_its_own_blend(sources: dict[str, Source]) -> None:
    maths, ja, base = (blend("linear", (name,)) for name in ("maths", "ja", "base"))
    recipe = StackRecipe.compose(
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        embedding=maths,
        hops=[(0, ja, base, maths), (1, base, maths, ja)],
        norm=base,
        head=ja,
    )
    expected = {
        "model.embed_tokens": "maths",
        "model.layers.0.self_attn": "ja", "model.layers.0.mlp": "base",
        "model.layers.0.input_layernorm": "maths", "model.layers.0.post_attention_layernorm": "maths",
        "model.layers.1.self_attn": "base", "model.layers.1.mlp": "maths",
        "model.layers.1.input_layernorm": "ja", "model.layers.1.post_attention_layernorm": "ja",
        "model.norm": "base", "lm_head": "ja",
    }  # fmt: skip
    seen = set()
    for name, tensor in Materialiser(sources).tensors(recipe):
        (part,) = (part for part in expected if name.startswith(part + "."))
        seen.add(part)
        assert torch.equal(tensor, stored(sources[expected[part]])[name]), name
    assert seen == expected.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_live_model_holds_what_is_exported(method: str, sources: dict[str, Source]) -> None:
    live = live_model(sources["base"], torch.device("cpu"))
    materialiser = Materialiser(sources)
    where = {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()}
    materialiser.write(recipe_of(blend("linear"), sources), live)  # what an earlier candidate left must not show
    recipe = recipe_of(blend(method, MIXED[method]), sources, seed=3)
    materialiser.write(recipe, live)
    state = live.model.state_dict()
    for name, tensor in Materialiser(sources).tensors(recipe):
        assert torch.equal(state.pop(name), tensor), name
    assert not state
    assert {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()} == where


def test_a_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    tied = {}
    for i, name in enumerate(("base", *NAMES)):
        folder = save_model(tiny_config(tie_word_embeddings=True), tmp_path / name, seed=i)
        tied[name] = open_source(name, str(folder), place=name)
    live = live_model(tied["base"], torch.device("cpu"))
    recipe = recipe_of(blend("task_arithmetic"), tied)
    Materialiser(tied).write(recipe, live)
    made = dict(Materialiser(tied).tensors(recipe))
    assert "lm_head.weight" not in made
    assert torch.equal(live.model.get_output_embeddings().weight, made["model.embed_tokens.weight"])


def test_sources_are_left_as_they_were(sources: dict[str, Source]) -> None:
    before = {name: stored(source) for name, source in sources.items()}
    for method in METHODS:
        for _ in Materialiser(sources).tensors(recipe_of(blend(method, MIXED[method]), sources)):
            pass
    for name, source in sources.items():
        for tensor in source.tensors:
            assert torch.equal(source.read(tensor), before[name][tensor])


def test_dtype_is_the_recipes_or_else_that_of_the_tokenizers_source(tmp_path: Path, sources: dict[str, Source]) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        made = Materialiser(sources).tensors(recipe_of(blend("linear"), sources, dtype=dtype))
        assert {tensor.dtype for _, tensor in made} == {getattr(torch, dtype)}
    folder = save_model(tiny_config(), tmp_path / "wide", seed=5, dtype=torch.float32)
    mixed = {**sources, "maths": open_source("maths", str(folder), place="maths")}
    recipe = recipe_of(blend("linear"), mixed)
    for tokenizer, dtype in (("base", torch.bfloat16), ("maths", torch.float32)):
        made = Materialiser(mixed).tensors(recipe.model_copy(update={"tokenizer": tokenizer}))
        assert {tensor.dtype for _, tensor in made} == {dtype}


def test_the_seed_draws_the_drops(sources: dict[str, Source]) -> None:
    def make(seed: int) -> Tensor:
        recipe = recipe_of(blend("dare_ties"), sources, seed=seed)
        return dict(Materialiser(sources).tensors(recipe))["lm_head.weight"]

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))


def test_tensors_are_made_one_at_a_time(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Source.read
    monkeypatch.setattr(Source, "read", lambda self, name: read.append(name) or original(self, name))
    made = Materialiser(sources).tensors(recipe_of(blend("ties"), sources))
    assert read == []
    name, _ = next(made)
    assert set(read) == {name}


def test_only_what_changed_is_written_again(sources: dict[str, Source]) -> None:
    live = live_model(sources["base"], torch.device("cpu"))
    materialiser = Materialiser(sources)
    halves, thirds = blend("linear"), blend("linear", weight={"maths": 1 / 3, "ja": 2 / 3})
    references = {name: source.reference for name, source in sources.items()}

    def recipe(second: Blend) -> StackRecipe:
        hops = [(0, halves, halves, halves), (1, halves, second, halves)]
        return StackRecipe.compose(
            sources=references, tokenizer="base", embedding=halves, hops=hops, norm=halves, head=halves
        )

    materialiser.write(recipe(halves), live)
    for tensor in live.tensors.values():
        tensor.fill_(7)
    materialiser.write(recipe(thirds), live)
    left = {name for name, tensor in live.tensors.items() if (tensor == 7).all()}
    assert live.tensors.keys() - left == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    fresh = live_model(sources["base"], torch.device("cpu"))  # another model was never written to
    materialiser.write(recipe(thirds), fresh)
    assert not any((tensor == 7).all() for tensor in fresh.tensors.values())


def test_after_a_failure_half_way_everything_that_it_touched_is_written_again(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model(sources["base"], torch.device("cpu"))
    materialiser = Materialiser(sources)
    materialiser.write(recipe_of(blend("linear"), sources), live)
    expected = {name: tensor.clone() for name, tensor in live.tensors.items()}
    original, calls = TensorJob.run, iter(range(100))

    def fail_soon(job: TensorJob, piece: tuple[int, int]) -> None:
        if next(calls) == 5:
            raise MemoryError
        original(job, piece)

    with monkeypatch.context() as patch:
        patch.setattr(TensorJob, "run", fail_soon)
        with pytest.raises(MemoryError):
            materialiser.write(recipe_of(blend("ties"), sources), live)
    materialiser.write(recipe_of(blend("linear"), sources), live)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in live.tensors.items())


def test_what_one_computed_of_the_sources_is_read_by_the_next(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe_of(blend(method, MIXED[method]), sources) for method in ("slerp", "ties", "della", "model_stock")]
    live = live_model(sources["base"], torch.device("cpu"))
    contents = {name: content_digest(fingerprint(source)) for name, source in sources.items()}
    made = []
    for _ in range(2):
        materialiser = Materialiser(sources, evidence=Evidence(tmp_path / "kept", contents))
        for recipe in recipes:
            materialiser.write(recipe, live)
            made.append({name: tensor.clone() for name, tensor in live.tensors.items()})
        monkeypatch.setattr(Weights, "scan", lambda *a: pytest.fail("read the weights again"))
    for first, second in zip(made[: len(recipes)], made[len(recipes) :], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def change(recipe: StackRecipe, **fields: Any) -> StackRecipe:
    return recipe.model_copy(update=fields)


def test_what_cannot_be_made_is_refused_before_anything_is_read(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read a tensor"))
    live = live_model(sources["base"], torch.device("cpu"))
    recipe = recipe_of(blend("ties"), sources)
    check_stack(recipe, sources)
    halves = {"maths": 0.5, "ja": 0.5}
    cases = [
        (recipe_of(blend("ties", weight=0.5).model_copy(update={"method": "tise"}), sources), "Did you mean 'ties'"),
        (recipe_of(blend("ties", densty=halves), sources), r"recipe.blends\[0\].densty: is not a parameter of ties"),
        (
            recipe_of(blend("ties", density={"maths": 1.5, "ja": 1}), sources),
            r"density: is 1.5; it must be from 0 to 1",
        ),
        (recipe_of(blend("dare_ties", density=-0.1), sources), r"density: is -0.1; it must be from 0 to 1"),
        (recipe_of(blend("slerp", t=2.0), sources), r"blends\[0\].t: is 2; it must be from 0 to 1"),
        (
            change(recipe, hops=(recipe.hops[0], recipe.hops[1].model_copy(update={"layer": 2}))),
            r"recipe.hops\[1\]: takes layer 2 of .*, which has 2 layers",
        ),
        (
            change(
                recipe,
                hops=(*recipe.hops, recipe.hops[0].model_copy(update={"layer": {"base": 0, "maths": 0, "ja": 1}})),
            ),
            "recipe.hops: is made of 3 different layers; the live model holds 2",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            Materialiser(sources).write(wrong, live)
    with pytest.raises(InputError, match=r"recipe.sources.ja: is not among the opened sources"):
        Materialiser({name: sources[name] for name in ("base", "maths")}).write(recipe, live)


MADE_OF_EVIDENCE = {"tsv", "wudi", "ace"}
"""Methods of whose sources all is kept that a candidate is made of."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_folded_into_a_tensor_once_to_plan_and_once_to_make(
    method: str, sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what the folded weights give, which lie in files."""
    base = sources["base"]
    adapted, in_files = {"base": base}, {"base": base}
    for seed, name in enumerate(NAMES):
        adapter = train(base.folder, tmp_path / f"{name}-lora", seed=seed, r=2, target_modules=["q_proj", "up_proj"])
        adapted[name] = open_source(name, f"{base.folder}+{adapter}", place=name)
        folder = save_model(tiny_config(), tmp_path / name, dtype=torch.float32)
        tensors = {tensor: adapted[name].read(tensor).clone() for tensor in adapted[name].tensors}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        in_files[name] = open_source(name, str(folder), place=name)
    folds: Counter[Any] = Counter()

    def counted(stored: Tensor, changes: Any, view: Any) -> Tensor:
        folds[changes] += 1
        return fold(stored, changes, view)

    live = live_model(base, torch.device("cpu"))
    materialiser = Materialiser(adapted)
    materialiser.write(recipe_of(blend(method, MIXED[method]), adapted), live)  # computes what candidates share
    recipe = recipe_of(blend(method, MIXED[method]), adapted, seed=1)
    monkeypatch.setattr("evomerge.checkpoints.source.fold", counted)
    Materialiser(adapted, evidence=materialiser._evidence).write(recipe, live)
    assert bool(folds) == (method not in MADE_OF_EVIDENCE)
    assert max(folds.values(), default=0) <= 2
    for name, tensor in Materialiser(in_files).tensors(recipe_of(blend(method, MIXED[method]), in_files, seed=1)):
        assert torch.equal(live.tensors[name], tensor), name


def mapped_bytes(file: Path) -> int:
    """Of a mapped file, what counts as memory of this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        for header in lines
        if header.endswith(f" {file}")
    )


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_pages_of_sources_are_let_go_of_when_a_model_is_made(method: str, tmp_path: Path) -> None:
    """Else a worker would seem to hold all of its sources; what is read again is the same."""
    folders = {
        n: save_model(tiny_config(vocab_size=4096), tmp_path / n, seed=i) for i, n in enumerate(("base", *NAMES))
    }
    sources = {name: open_source(name, str(folder), place=name) for name, folder in folders.items()}
    recipe = recipe_of(blend(method), sources)
    builder = StackBuilder(BuildContext(sources, "base"))
    files = [source.folder / "model.safetensors" for source in sources.values()]
    sources["maths"].read("model.embed_tokens.weight").sum()
    assert mapped_bytes(files[1]) > files[1].stat().st_size // 4  # what is measured is there
    live = builder.write(recipe)
    first = {name: tensor.clone() for name, tensor in live.tensors.items()}
    assert sum(map(mapped_bytes, files)) < files[0].stat().st_size // 4
    builder.write(recipe_of(blend("ties" if method == "linear" else "linear"), sources))
    builder.write(recipe)
    assert all(torch.equal(tensor, first[name]) for name, tensor in live.tensors.items())
