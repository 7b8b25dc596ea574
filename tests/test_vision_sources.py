"""What is refused of models that read images, and what may be done with them as with models of texts alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, edit_tensors, save_tokenizer
from helpers_vision import save_twin, save_vision
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from evomerge.calibration import Calibration
from evomerge.checkpoints.checks import check_compatible, check_keeps_vision
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.processor import check_processor
from evomerge.checkpoints.sharding import heads_of
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.vocabulary import align
from evomerge.cli import app
from evomerge.errors import InputError
from evomerge.mergekit import to_mergekit
from evomerge.merging.building.builders import BuildContext, check_recipe
from evomerge.merging.building.export import write_model
from evomerge.merging.building.stack_builder import stack_builder
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.vocabulary import Vocabulary

CPU = torch.device("cpu")
PROMPT = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "llava")


def opened(reference: Path | str, name: str = "sees") -> Source:
    return open_source(name, str(reference), place=f"sources.{name}")


def with_plain(folder: Path) -> dict[str, Source]:
    sees = opened(folder)
    return {"sees": sees, "plain": opened(save_twin(sees, folder.parent / "plain", seed=1), "plain")}


def recipe_of(sources: dict[str, Source], blend: Blend, vision: Blend | None = None) -> StackRecipe:
    names = {name: source.reference for name, source in sources.items()}
    return StackRecipe.compose(
        sources=names, tokenizer="sees", embedding=blend, norm=blend, head=blend, vision=vision,
        hops=[(layer, blend, blend, blend) for layer in range(2)],
    )  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# ---- what the files hold ---------------------------------------------------------------------------------------------


def test_a_tensor_that_no_role_explains_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"vision_tower.adapter.weight": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"no part of the model of config.json: vision_tower.adapter.weight"):
        opened(folder)


def test_tables_that_transformers_passes_over_go_along_as_they_are(folder: Path, tmp_path: Path) -> None:
    table = torch.arange(5)[None]
    edit_tensors(folder, lambda tensors: tensors.update({"vision_tower.embeddings.position_ids": table}))
    source = opened(folder)
    assert list(source.carried) == ["vision_tower.embeddings.position_ids"]
    write_model(recipe_of({"sees": source}, Blend.copy_of("sees")), {"sees": source}, tmp_path / "out", texts={})
    assert torch.equal(stored(tmp_path / "out")["vision_tower.embeddings.position_ids"], table)


def test_a_second_copy_of_a_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    folder = save_vision("gemma3", tmp_path / "gemma3")
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    edit_tensors(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    sources = with_plain(folder)
    blend = Blend.weighted_sum({"sees": 0.5, "plain": 0.5})
    write_model(recipe_of(sources, blend), sources, tmp_path / "out", texts={})
    made = stored(tmp_path / "out")
    assert made.keys() == stored(folder).keys()
    assert torch.equal(made[head], made[embedding])
    assert not torch.equal(made[head], stored(folder)[head])


def test_names_of_another_time_stay_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    """Folders on the hub have ``vision_tower.vision_model``, which transformers writes no more."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)

    edit_tensors(folder, rename)
    sources = with_plain(folder)
    write_model(recipe_of(sources, Blend.copy_of("plain")), sources, tmp_path / "out", texts={})
    assert stored(tmp_path / "out").keys() == stored(folder).keys()
    assert any("vision_model" in name for name in stored(folder))
    _, said = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]


def test_configurations_as_the_hub_has_them_are_read(folder: Path, tmp_path: Path) -> None:
    """Qwen2-VL's has the text model's settings beside all others; others leave out what is at its default."""
    qwen = save_vision("qwen2_vl", tmp_path / "qwen")
    config = json.loads((qwen / "config.json").read_text())
    text = config.pop("text_config")
    flat = {**config, **{key: value for key, value in text.items() if key != "model_type"}}
    (qwen / "config.json").write_text(json.dumps(flat))
    source = opened(qwen)
    assert (source.layers, source.described["vocab_size"]) == (2, text["vocab_size"])
    config = json.loads((folder / "config.json").read_text())
    for key in ("vocab_size", "num_attention_heads", "head_dim"):
        config["text_config"].pop(key, None)
    source = replace(opened(folder), config=config)
    assert source.described["text_config"]["vocab_size"] == 36
    assert heads_of(source.described).attention == 4


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_shape_of_text_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_vision("gemma3", tmp_path / "gemma3")
    sources = {"sees": opened(folder), "other": opened(save_twin(opened(other), tmp_path / "text"), "other")}
    with pytest.raises(
        InputError, match="differ in their text models: it is a gemma3_text, and sees a llama"
    ) as refused:
        check_compatible(sources)
    assert refused.value.place == "sources.other"


def test_a_merge_that_would_drop_what_reads_images_is_refused(folder: Path) -> None:
    sources = with_plain(folder)
    with pytest.raises(InputError, match="the vision parts of sees would be dropped") as refused:
        check_keeps_vision(sources, "plain")
    assert "`tokenizer: sees`" in refused.value.hint
    check_keeps_vision(sources, "sees")


def test_a_model_of_texts_alone_gives_nothing_to_what_reads_images(folder: Path) -> None:
    sources = with_plain(folder)
    recipe = recipe_of(sources, Blend.copy_of("plain"), vision=Blend.copy_of("plain"))
    with pytest.raises(InputError, match="plain is a text model"):
        check_recipe(recipe, sources)


def test_towers_that_make_other_numbers_of_tokens_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    edit_json(other / "config.json", vision_feature_select_strategy="full")
    assert config["vision_feature_select_strategy"] == "default"
    sources = {"sees": opened(folder), "other": opened(other, "other")}
    check_compatible(sources)
    mixed = Blend.weighted_sum({"sees": 0.5, "other": 0.5})
    check_recipe(recipe_of(sources, mixed), sources)
    with pytest.raises(InputError, match="differ in vision_feature_select_strategy"):
        check_recipe(recipe_of(sources, mixed, vision=mixed), sources)


def test_text_models_that_compute_otherwise_by_equal_weights_are_refused(folder: Path) -> None:
    """Granite has Llama's tensors; its settings can make it Llama, or multiply the embedding."""
    sources = with_plain(folder)
    plain = sources["plain"].folder
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_multiplier": 4**-0.5}
    edit_json(plain / "config.json", **granite)
    check_compatible({"sees": sources["sees"], "plain": opened(plain, "plain")})
    edit_json(plain / "config.json", embedding_multiplier=12.0)
    with pytest.raises(InputError, match="with equal weights they compute otherwise"):
        check_compatible({"sees": sources["sees"], "plain": opened(plain, "plain")})


def test_stages_and_other_kinds_of_recipe_are_for_models_of_texts(folder: Path, tmp_path: Path) -> None:
    with_plain(folder)
    stage = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]}
    last = {**stage, "name": "two", "models": [{"model": "one", "parameters": {"weight": 1.0}}]}
    (tmp_path / "m.yaml").write_text(json.dumps({**stage, "name": "one"}) + "\n---\n" + json.dumps(last))
    ran = CliRunner().invoke(app, ["merge", str(tmp_path / "m.yaml"), str(tmp_path / "out")])
    assert "stage one: llava reads images, and stages are made of text-only models" in str(ran.exception)
    assert not (tmp_path / "out").exists()


def test_a_processor_that_is_missing_or_not_wanted_is_named(folder: Path) -> None:
    sources = with_plain(folder)
    with pytest.raises(InputError, match="a text model, and is asked about images"):
        check_processor(sources["plain"])
    with pytest.raises(InputError, match="has no processor for images"):
        check_processor(sources["sees"])
    (folder / "preprocessor_config.json").write_text('{"image_processor": {"auto_map": {"AutoImageProcessor": "x.Y"}}}')
    with pytest.raises(InputError, match="auto_map asks for code"):
        check_processor(sources["sees"])


# ---- as models of texts alone ----------------------------------------------------------------------------------------


def test_families_with_one_text_model_are_mixed_with_each_other(folder: Path, tmp_path: Path) -> None:
    sources = {"sees": opened(folder), "other": opened(save_vision("smolvlm", tmp_path / "other"), "other")}
    check_compatible(sources)
    blend = Blend.weighted_sum({"sees": 0.5, "other": 0.5})
    with pytest.raises(InputError, match="differ in model_type"):
        check_recipe(recipe_of(sources, blend, vision=blend), sources)
    recipe = recipe_of(sources, blend)
    made = dict(Materialiser(sources).tensors(recipe))
    assert made.keys() == sources["sees"].tensors.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(made[name], sum(0.5 * source.read(name) for source in sources.values()))


def test_what_a_recipe_says_of_what_reads_images_is_told(folder: Path, tmp_path: Path) -> None:
    sources = {"sees": opened(folder), "other": opened(save_vision("llava", tmp_path / "other", seed=3), "other")}
    recipe = recipe_of(sources, Blend.copy_of("sees"), vision=Blend.copy_of("other"))
    assert [line.partition(":")[0] for line in recipe.lines()][-1] == "what reads images"
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    assert "vision" not in recipe_of(sources, Blend.copy_of("other"), vision=Blend.copy_of("sees")).canonical()
    with pytest.raises(InputError, match="mergekit cannot express"):
        to_mergekit(recipe, lambda reference: sources["sees"].roles)


def test_two_towers_are_mixed_where_a_recipe_says_so(folder: Path, tmp_path: Path) -> None:
    sources = {"sees": opened(folder), "other": opened(save_vision("llava", tmp_path / "other", seed=3), "other")}
    mixed = Blend.weighted_sum({"sees": 0.25, "other": 0.75})
    made = dict(Materialiser(sources).tensors(recipe_of(sources, Blend.copy_of("sees"), vision=mixed)))
    for name, role in sources["sees"].roles.items():
        mine, theirs = (source.read(name) for source in sources.values())
        expected = 0.25 * mine + 0.75 * theirs if role.kind == "vision" else mine
        assert torch.allclose(made[name], expected), name


def test_an_adapter_of_the_text_model_lies_on_it_by_either_name(folder: Path, tmp_path: Path) -> None:
    """Trained on the model that sees, or on the plain one: the same change of the same tensors."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    target = r".*language_model.*q_proj"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    own = opened(f"{folder}+{tmp_path / 'adapter'}")
    assert set(own.changes) == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    live = live_model(own, CPU)
    Materialiser({"sees": own}).write(recipe_of({"sees": own}, Blend.copy_of("sees")), live)
    with torch.inference_mode():
        expected = adapted.merge_and_unload().eval()(PROMPT, use_cache=False).logits
        assert torch.allclose(live.model(PROMPT, use_cache=False).logits, expected, atol=1e-5)


def test_an_adapter_that_changes_the_tower_is_told_of(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    source = opened(f"{folder}+{tmp_path / 'adapter'}")
    (warning,) = source.warnings
    assert "changes 2 tensors of what reads images" in warning


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
def test_methods_that_look_at_what_layers_are_given_make_the_same_live_and_exported(
    method: str, folder: Path, tmp_path: Path
) -> None:
    sources = with_plain(folder)
    texts = Calibration(lambda: [" ".join(WORDS[3:20])], tokens=16)
    numbers = {"weight": {"sees": 1.0, "plain": 1.0}, "off_diagonal": 0.9}
    recipe = recipe_of(sources, Blend(method=method, sources=("sees", "plain"), parameters=numbers))
    recipe = recipe.model_copy(update={"calibration": texts.digest})
    evidence = Evidence(tmp_path / "evidence", {name: name for name in sources})
    context = BuildContext(sources, "sees", evidence, calibration=texts)
    builder = stack_builder(context)
    for name in sources:
        builder.calibrate(recipe, name)
    live = builder.write(recipe)
    with torch.inference_mode():
        ours = live.model(PROMPT, use_cache=False).logits.clone()
    builder.export(recipe, tmp_path / "out", texts={})
    with torch.inference_mode():
        assert torch.allclose(builder.reload(tmp_path / "out").model(PROMPT, use_cache=False).logits, ours, atol=1e-5)


def test_a_path_of_its_layers_is_exported_and_runs_live(folder: Path, tmp_path: Path) -> None:
    sources = with_plain(folder)
    copies = {name: Blend.copy_of(name) for name in sources}
    hops = [(0, copies["sees"]), (1, copies["plain"]), (0, copies["plain"]), (1, copies["sees"])]
    recipe = StackRecipe.compose(
        sources={name: source.reference for name, source in sources.items()}, tokenizer="sees",
        embedding=copies["sees"], norm=copies["sees"], head=copies["sees"],
        hops=[(dict.fromkeys(blend.sources, layer), blend, blend, blend) for layer, blend in hops],
        scales=[1.0, 1.0, 0.5, 1.0],
    )  # fmt: skip
    write_model(recipe, sources, tmp_path / "out", texts={})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 4
    assert "language_model.model.layers.3.self_attn.q_proj.weight" in stored(tmp_path / "out")
    live = live_model(sources["sees"], CPU, layer_buffers=4)
    Materialiser(sources).write(recipe, live)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        expected = plain(PROMPT, use_cache=False).logits
        assert torch.allclose(live.model(PROMPT, use_cache=False).logits, expected, atol=1e-5)


def test_words_that_the_plain_model_lacks_keep_their_rows(folder: Path, tmp_path: Path) -> None:
    """The image's token and rows that pad the embedding, of a model whose tokenizer knows fewer words."""
    sources = with_plain(folder)
    plain = sources["plain"].folder
    save_tokenizer(plain, WORDS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensors(plain, lambda tensors, name=name: tensors.update({name: tensors[name][: len(WORDS)].clone()}))
    edit_json(plain / "config.json", vocab_size=len(WORDS))
    save_tokenizer(folder, [*WORDS, "<image>"])  # three rows without a word
    sources = {"sees": opened(folder), "plain": opened(plain, "plain")}
    with pytest.raises(InputError, match="differ in vocab_size"):
        check_compatible(sources)
    aligned = align(sources, "sees", Vocabulary(kind="tokenizer"))
    check_compatible(aligned, same_tokens=False)
    recipe = recipe_of(aligned, Blend.weighted_sum({"sees": 0.0, "plain": 1.0}))
    made = dict(Materialiser(aligned).tensors(recipe))
    rows, own = made["model.embed_tokens.weight"], sources["sees"].read("model.embed_tokens.weight")
    assert rows.shape == own.shape
    assert torch.equal(rows[len(WORDS) :], own[len(WORDS) :])
    assert torch.equal(rows[: len(WORDS)], sources["plain"].read("model.embed_tokens.weight"))


def test_a_mergekit_configuration_merges_and_counts_its_tensors(folder: Path, tmp_path: Path) -> None:
    with_plain(folder)
    text = {
        "merge_method": "ties", "base_model": str(folder),
        "models": [{"model": str(folder.parent / "plain"), "parameters": {"weight": 1.0, "density": 0.5}}],
    }  # fmt: skip
    (tmp_path / "merge.yaml").write_text(json.dumps(text))
    ran = CliRunner().invoke(app, ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    count = len(stored(folder))
    assert f"{count} of llava" in ran.output
    assert f"wrote {count} tensors" in ran.output
    assert stored(tmp_path / "out").keys() == stored(folder).keys()


def test_what_a_processor_needs_goes_along(folder: Path, tmp_path: Path) -> None:
    names = [
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    ]
    for name in [*names, "chat_template.jinja"]:
        (folder / name).write_text("{}")
    source = opened(folder)
    assert {file.name for file in source.files} >= {*names, "chat_template.jinja"}
    write_model(recipe_of({"sees": source}, Blend.copy_of("sees")), {"sees": source}, tmp_path / "out", texts={})
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {*names, "chat_template.jinja"}
