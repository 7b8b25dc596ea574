"""What layers are given on calibration texts: against plain transformers, kept once, and refused where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, edit_tensors, in_own_memory, save_model, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from evomerge.blends import observed
from evomerge.calibration import Calibration, calibration_from, check_all_have_texts, read_texts
from evomerge.checkpoints import live
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.commands.merge import calibration_of
from evomerge.errors import InputError
from evomerge.merging.measured import inputs as inputs_module
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.inputs import Inputs, token_ids
from evomerge.merging.path import merged_tensors, site_of
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.search.preparing.texts import text_warnings

LINES = ("w1 w2 w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19")
TEXTS = Calibration(lambda: LINES, 12)
CPU = torch.device("cpu")
MIXTRAL = MixtralConfig(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    config = tiny_config(num_hidden_layers=3)
    return opened(config, tmp_path_factory.mktemp("llama"))


def opened(config: Any, folder: Path) -> Source:
    return open_source("a", str(save_model(config, folder / "a", dtype=torch.float32)), place="a")


def inputs(source: Source, folder: Path | None = None, texts: Calibration = TEXTS) -> Inputs:
    return Inputs({"a": source}, texts, Evidence(folder, {"a": "digest"} if folder else None), CPU)


def tokens_of(source: Source) -> Iterator[torch.Tensor]:
    tokenizer = load_tokenizer(source)
    for text in TEXTS.texts_of("a"):
        yield torch.tensor([tokenizer(text)["input_ids"][: TEXTS.tokens]])


def test_inputs_are_those_of_plain_transformers(llama: Source, tmp_path: Path) -> None:
    """What the norm before the attention of layer 1 gives, from hidden states; and what stands before the head."""
    model = in_own_memory(AutoModelForCausalLM.from_pretrained(llama.folder))
    found = inputs(llama, tmp_path)
    rows, last = [], []
    with torch.no_grad():
        for tokens in tokens_of(llama):
            hidden = model(tokens, output_hidden_states=True).hidden_states
            rows.append(model.model.layers[1].input_layernorm(hidden[1])[0])
            last.append(hidden[-1][0])
    for stored, wanted in (("model.layers.1.self_attn.q_proj.weight", rows), ("lm_head.weight", last)):
        given = found.of(("a", stored))
        x = torch.cat(wanted)
        assert len(x) <= 2 * TEXTS.tokens
        assert torch.allclose(given.gram, x.T @ x / len(x), atol=1e-5)
        assert torch.allclose(given.size, x.abs().mean(0), atol=1e-5)
        assert given.axis == 1


def test_layers_that_are_given_the_same_share_an_entry(llama: Source, tmp_path: Path) -> None:
    found = inputs(llama, tmp_path)
    layer = "model.layers.0"
    q, k, v, o = (found.of(("a", f"{layer}.self_attn.{p}_proj.weight")).gram for p in "qkvo")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert not torch.equal(q, o)
    file = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert file.stat().st_size < 4 * (3 * 16**2 + 24**2) + 4000  # q, k, v; o; gate, up; down


def test_they_are_recorded_once_for_all(llama: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = inputs(llama, tmp_path)
    first.record("a")
    monkeypatch.setattr(live, "live_model", lambda *a, **k: pytest.fail("ran again"))
    again = inputs(llama, tmp_path).of(("a", "model.layers.2.mlp.down_proj.weight"))
    assert torch.equal(again.gram, first.of(("a", "model.layers.2.mlp.down_proj.weight")).gram)


def test_a_damaged_file_is_made_anew(llama: Source, tmp_path: Path) -> None:
    stored = "model.layers.2.mlp.down_proj.weight"
    wanted = inputs(llama, tmp_path).of(("a", stored)).gram.clone()
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    assert torch.equal(inputs(llama, tmp_path).of(("a", stored)).gram, wanted)


@pytest.mark.parametrize("kept", [True, False])
def test_how_many_layers_are_recorded_at_a_time_changes_nothing(
    llama: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    stored = "model.layers.1.mlp.up_proj.weight"
    wanted = inputs(llama, tmp_path / "whole").of(("a", stored)).gram
    monkeypatch.setattr(inputs_module, "_MAX_BYTES", 1)
    assert torch.equal(inputs(llama, tmp_path / "parts" if kept else None).of(("a", stored)).gram, wanted)


def test_texts_and_how_much_of_them_are_told_apart(llama: Source, tmp_path: Path) -> None:
    stored = "model.layers.1.mlp.up_proj.weight"
    found = [inputs(llama, tmp_path, Calibration(lambda: LINES, tokens)).of(("a", stored)).gram for tokens in (4, 12)]
    assert not torch.allclose(found[0], found[1])
    assert Calibration(lambda: ("a", "b"), 3).digest != Calibration(lambda: ("ab",), 3).digest


def test_weights_that_stand_the_other_way_say_so(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    source = opened(config, tmp_path)
    stored = next(name for name in source.roles if name.endswith("h.1.mlp.c_fc.weight"))
    given = inputs(source, tmp_path / "kept").of(("a", stored))
    assert (given.axis, given.gram.shape) == (0, (16, 16))
    assert source.tensors[stored].shape[0] == 16


def test_methods_are_told_the_side_of_the_input_without_texts(llama: Source, tmp_path: Path) -> None:
    """By the site of every matrix as texts show it: a method that works on weights alone need not run a model."""
    gpt2 = opened(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64), tmp_path)
    for source, axes in ((llama, {1}), (gpt2, {0})):
        found, seen = inputs(source), set()
        blend = Blend(method="linear", sources=("a",), parameters={"weight": 1.0})
        recipe = StackRecipe.uniform(blend, sources={"a": ""}, tokenizer="a", layers=source.layers)
        for merged in merged_tensors(recipe, {"a": source}):
            site = site_of(merged, recipe, blend, {"a": source})
            if site.is_matrix and site.role.layer == 0:
                assert site.input_axis == found.of(site.refs["a"]).axis
                seen.add(site.input_axis)
        assert seen == axes


def test_experts_that_are_computed_as_one_are_refused_by_name(tmp_path: Path) -> None:
    source = opened(MIXTRAL, tmp_path)
    stored = next(name for name in source.roles if "experts" in name and source.roles[name].kind == "mlp")
    found = inputs(source, tmp_path / "kept")
    assert found.of(("a", "model.layers.0.self_attn.q_proj.weight")).gram.shape == (16, 16)
    with pytest.raises(InputError, match="cannot be observed") as refused:
        found.of(("a", stored))
    assert stored in str(refused.value)


@pytest.mark.parametrize(
    ("methods", "steps", "needs"),
    [
        (["regmean"], [], {"a": {"calibration"}, "b": {"calibration"}}),
        (["task_arithmetic"], ["activations"], {"base": {"channels"}}),
        (["regmean"], ["activations"], {"base": {"channels"}, "a": {"calibration"}, "b": {"calibration"}}),
        (["task_arithmetic", "regmean_plus_plus"], [], {"a": {"merged_inputs"}, "b": {"merged_inputs"}}),
        (["task_arithmetic"], [], {}),
    ],
)
def test_methods_need_the_sources_that_they_mix_and_steps_the_base(
    methods: list[str], steps: list[str], needs: dict[str, set[str]]
) -> None:
    blends = [
        Blend(method=method, sources=("a", "b"), base="base", steps=tuple(BlendStep(name=name) for name in steps))
        for method in methods
    ]
    recipe = StackRecipe.compose(
        sources=dict.fromkeys(("base", "a", "b", "idle"), ""), tokenizer="base", calibration="0" * 16,
        embedding=blends[0], hops=[(0, blends[0], blends[-1], blends[0])], norm=blends[0], head=blends[0],
    )  # fmt: skip
    assert observed([recipe], recipe.sources) == needs


def test_experts_that_are_computed_as_one_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    source = opened(MIXTRAL, tmp_path)
    tokenizer = load_tokenizer(source)
    for need in ("calibration", "merged_inputs"):
        with pytest.raises(
            InputError, match=r"a: the input of model\.layers\.0\.block_sparse_moe\S+ cannot be observed"
        ):
            list(text_warnings(TEXTS, {"a": source}, "a", tokenizer, {"a": {need}}))
    assert list(text_warnings(TEXTS, {"a": source}, "a", tokenizer, {"a": {"channels"}})) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("no.jsonl", None, "no such file: .*no.jsonl"),
        ("t.jsonl", '{"text": "long enough to calibrate"}\nnot json\n', "line 2: is not JSON"),
        ("t.jsonl", '{"texts": "long enough to calibrate"}\n', "line 1.* has no `text`"),
        ("t.jsonl", '{"text": "short"}\n', "line 1.* has 5 characters"),
        ("t.txt", "a line that is long enough\n\n", "holds 1 of the 2 texts"),
        ("t.txt", "", "holds no texts"),
    ],
)
def test_files_without_texts_are_refused(tmp_path: Path, name: str, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=problem) as refused:
        read_texts(tmp_path / name, 2, "calibration.file")
    assert refused.value.place.startswith("calibration.file")


def test_a_file_is_read_up_to_the_texts_that_count(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "long enough to calibrate", "more": 1}\n' * 2 + "no json\n")
    assert read_texts(tmp_path / "t.jsonl", 2, "calibration.file") == ["long enough to calibrate"] * 2


def test_a_text_may_hold_what_other_readers_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "long enough\u2028to calibrate"}\n', encoding="utf-8-sig")
    (tmp_path / "t.txt").write_text("long enough\x0cto calibrate\n", encoding="utf-8-sig")
    for name, mark in (("t.jsonl", "\u2028"), ("t.txt", "\x0c")):
        assert read_texts(tmp_path / name, 1, "calibration.file") == [f"long enough{mark}to calibrate"]


def test_texts_whose_digest_is_known_are_read_when_they_are_needed_and_must_have_it(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    known = calibration_from(file, 1, 16, "calibration.file", "0123456789abcdef")
    assert known.digest == "0123456789abcdef"
    with pytest.raises(InputError, match="no such file"):
        known.texts_of("a")
    file.write_text("a line that is long enough\n")
    with pytest.raises(InputError, match="not the texts with the digest 0123456789abcdef"):
        known.texts_of("a")
    digest = calibration_from(file, 1, 16, "calibration.file").digest
    assert calibration_from(file, 1, 16, "calibration.file", digest).texts_of("a") == ("a line that is long enough",)


# ---- texts of single sources -----------------------------------------------------------------------------------------

MORE = ("w20 w21 w22 w23 w24 w25 w3",)


def test_the_digest_of_texts_for_all_is_what_it_always_was() -> None:
    """Recipes and searches hold it: this one is of a program that knew of no others."""
    assert Calibration(lambda: LINES, 12).digest == "d3e49ded264d921c"


def test_the_digest_tells_whose_texts_are_which() -> None:
    def digest(shared: tuple[str, ...] | None, **own: tuple[str, ...]) -> str:
        return Calibration(shared and (lambda: shared), 12, own={n: lambda t=t: t for n, t in own.items()}).digest  # type: ignore[misc]

    digests = [digest(LINES), digest(LINES, a=MORE), digest(MORE, a=LINES), digest(LINES, b=MORE), digest(None, a=MORE)]
    assert len(set(digests)) == len(digests)
    assert digest(LINES, a=MORE, b=LINES) == digest(LINES, b=LINES, a=MORE)


def test_a_source_is_run_over_its_own_texts_also_where_another_holds_the_same(llama: Source, tmp_path: Path) -> None:
    stored = "model.layers.1.mlp.up_proj.weight"
    texts = Calibration(lambda: LINES, 12, own={"b": lambda: MORE})
    evidence = Evidence(tmp_path, {"a": "one", "b": "one"})
    found = Inputs({"a": llama, "b": llama}, texts, evidence, CPU)
    assert torch.equal(found.of(("a", stored)).gram, inputs(llama).of(("a", stored)).gram)
    alone = inputs(llama, texts=Calibration(lambda: MORE, 12)).of(("a", stored)).gram
    assert torch.equal(found.of(("b", stored)).gram, alone)


@pytest.mark.parametrize(
    ("own", "shared", "place", "problem"),
    [
        ({"c": "calibration.sources.c"}, True, "calibration.sources.c", "no source 'c'"),
        ({"a": "calibration.sources.a"}, False, "calibration", "no texts for b"),
    ],
)
def test_texts_must_be_of_sources_and_sources_have_texts(
    own: dict[str, str], shared: bool, place: str, problem: str
) -> None:
    check_all_have_texts({"a": "calibration.sources.a"}, True, ["a", "b"])
    with pytest.raises(InputError, match=problem) as refused:
        check_all_have_texts(own, shared, ["a", "b"])
    assert refused.value.place == place


def test_the_command_line_names_texts_for_all_and_of_single_sources(tmp_path: Path) -> None:
    for name in ("all.txt", "a=b.txt", "maths.txt"):
        (tmp_path / name).write_text(f"a line that is long enough of {name}\n")
    texts = calibration_of([f"{tmp_path}/a=b.txt", f"maths={tmp_path}/maths.txt"], 1, 8)
    assert texts is not None
    assert texts.texts_of("other") == ("a line that is long enough of a=b.txt",)
    assert texts.texts_of("maths") == ("a line that is long enough of maths.txt",)
    assert calibration_of([], 1, 8) is None
    with pytest.raises(InputError, match="twice for maths"):
        calibration_of(["maths=one.txt", "maths=two.txt"], 1, 8)


@pytest.mark.parametrize("asked", ["gram", "channels"])
def test_a_source_that_computes_infinities_is_refused_by_its_name(asked: str, tmp_path: Path) -> None:
    save_model(tiny_config(), tmp_path / "a", dtype=torch.float16)
    edit_tensors(tmp_path / "a", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(6e4))
    found = inputs(open_source("a", str(tmp_path / "a"), place="sources.a"))
    ref = ("a", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(InputError, match=r"computes NaN or Inf .* on the calibration texts") as refused:
        found.of(ref) if asked == "gram" else found.channels(ref)
    assert refused.value.place == "sources.a"


def test_a_text_without_tokens_is_refused_by_its_number() -> None:
    texts = Calibration(lambda: ("w1", "w2 w3"), 4)
    nothing = lambda text: {"input_ids": [1] if text == "w1" else []}  # noqa: E731
    with pytest.raises(InputError, match="text 2 of a has no tokens"):
        token_ids(nothing, texts, "a")


def test_texts_shorter_than_the_widest_layer_are_told_of(llama: Source) -> None:
    texts = Calibration(lambda: (" ".join(["w3"] * 40),), 40, own={"b": lambda: MORE})
    tokenizer, sources = load_tokenizer(llama), {"a": llama, "b": llama}
    (warning,) = text_warnings(texts, sources, "a", tokenizer, {name: {"calibration"} for name in sources})
    assert list(text_warnings(texts, sources, "a", tokenizer, {"b": {"channels"}})) == []  # of no Gram matrix
    assert "texts of b have 7 tokens" in warning
    assert "24 inputs" in warning
