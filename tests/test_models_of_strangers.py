"""Models, adapters and tokenizers made to do harm, or merely odd: refused clearly and soon, and nothing valid is."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import edit_json, edit_tensors, save_model, tiny_config
from helpers_miniature import MINIATURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.checks import check_finite
from evomerge.checkpoints.fingerprints import fingerprint
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.structure import empty_model, parse_config
from evomerge.checkpoints.tokenizer_files import open_tokenizer
from evomerge.errors import InputError
from evomerge.merging.building.export import write_model
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.inspection import inspect_models

pytestmark = pytest.mark.timeout(120)

Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path | str) -> Source:
    return open_source("maths", str(folder), place="sources.maths")


def refused(folder: Path | str, words: str = ".") -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match=words) as raised:
        opened(folder)
    assert raised.value.place == "sources.maths"
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()
    assert time.process_time() - begun < 10


def config(**changes: Any) -> Harm:
    return lambda folder: edit_json(folder / "config.json", **changes)


# ---- headers ---------------------------------------------------------------------------------------------------------


def write_header(folder: Path, text: bytes) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def header(folder: Path) -> dict[str, Any]:
    raw = (folder / "model.safetensors").read_bytes()
    content: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return content


def added(entry: str) -> Harm:
    """Put more entries into the header, as text."""
    return lambda folder: write_header(folder, (json.dumps(header(folder))[:-1] + f",{entry}}}").encode())


EMPTY = '{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}'


def shaped(shape: str) -> str:
    return f'"x":{{"dtype":"BF16","shape":{shape},"data_offsets":[0,0]}}'


HEADERS: dict[str, tuple[Harm, str]] = {
    "a name twice among many": (
        added(",".join(f'"n{i}":{EMPTY}' for i in [*range(50_000), 49_999])),
        "'n49999' appears twice",
    ),
    "sizes of thousands of digits": (added(shaped(f"[{','.join(['9' * 4000] * 3000)}]")), "digits"),
    "thousands of large sizes": (added(shaped(f"[{','.join(['4294967296'] * 50_000)}]")), "shape of 50,000 numbers"),
    "millions of sizes": (added(shaped(f"[{','.join(['1'] * 6_000_000)}]")), "more than"),
    "a size beyond 63 bits": (added(shaped("[0, 9223372036854775808]")), "shape"),
    "a name without an end": (added(f'"{"x" * 20_000_000}":{EMPTY}'), "name has 20,000,000 characters"),
    "half of a surrogate pair": (added(f'"x\\ud800":{EMPTY}'), "surrogate"),
    "a name that fakes a line": (added(f'"a\\nerror: b\\u001b[2J":{{"dtype":"{"y" * 9_000}"}}'), "lies about"),
    "nested deeply": (added(f'"x":{"[" * 100_000}{"]" * 100_000}'), "nested"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_take_for_ever_are_refused(folder: Path, case: str) -> None:
    harm, words = HEADERS[case]
    harm(folder)
    refused(folder, words)


@pytest.mark.parametrize(
    "length",
    [
        0x3C20,  # " <", as a web page begins
        0x3C0A + 0x10000,  # newline, "<"
        0x023C,  # "<" first
        0x0280 + 0x10000,  # as pickles begin
        0x4B50 + 0x10000,  # "PK", as archives begin
    ],
)
def test_a_header_of_any_length_is_read(folder: Path, length: int) -> None:
    text = json.dumps(header(folder), separators=(",", ":")).encode()
    length += 0 if length > len(text) else 0x10000
    write_header(folder, text + b" " * (length - len(text)))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert set(opened(folder).tensors) == names


# ---- configurations --------------------------------------------------------------------------------------------------


def names_alone(count: int) -> Harm:
    """Tensors without an element, which cost a stranger nothing."""
    return added(",".join(f'"junk{i}":{EMPTY}' for i in range(count)))


def all_of(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


SIZES: dict[str, Harm] = {
    "labels": config(num_labels=10**9),
    "labels in a part": config(text_config={"num_labels": 10**9}),
    "labels in a list": config(parts=[{"num_labels": 10**8}]),
    "layers of names alone": all_of(names_alone(1100), config(num_hidden_layers=1000)),
    "experts": all_of(
        names_alone(1100), config(model_type="jamba", architectures=None, num_experts=10_000, num_hidden_layers=2)
    ),
    "an encoder": config(model_type="bart", architectures=None, encoder_layers=9_999, decoder_layers=9_999),
    "a part that sees": config(model_type="git", architectures=None, vision_config={"num_hidden_layers": 9_999}),
    "codebooks": config(model_type="moshi", architectures=None, num_codebooks=10**5),
    "a method": config(to_dict="x"),
    "a method of Python": config(__class__="x"),
    "a million ends": config(eos_token_id=list(range(10**6))),
    "a list of tokens": config(suppress_tokens=[0] * 20_000),
    "a list in a part": config(text_config={"layer_types": ["full_attention"] * 20_000}),
    "a million ends of answers": lambda f: edit_json(f / "generation_config.json", eos_token_id=[2] * 10**6),
    "nested deeply": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().rstrip()[:-1] + ',"x":' + '{"a":' * 500 + "1" + "}" * 501
    ),
    "half of a surrogate pair": config(note="\ud800"),
    "a type without an end": config(model_type="l" * 1_000_000),
    "a key that fakes a line": config(**{"_x_implementation_\n": "a/b", "auto_map": "\x1b[2J" * 1000}),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_small_configuration_cannot_ask_for_much(folder: Path, case: str) -> None:
    SIZES[case](folder)
    refused(folder)


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": None}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_building_stops_at_the_tensors_that_there_are() -> None:
    asked = {**SMALL, **HEADS, "model_type": "llama", "num_hidden_layers": 900}
    with pytest.raises(InputError, match="more than 50 tensors"):
        empty_model(parse_config(asked, "here"), "here", most_tensors=50)
    assert torch.nn.Linear(2, 2).weight.shape == (2, 2)  # others may build what they like again


def test_private_keys_that_run_nothing_are_let_through(folder: Path) -> None:
    config(
        _model_name_or_path="Tiny 135M 8k Mix1", _source={"by": "someone"}, _note=["a"], _attn_implementation="eager"
    )(folder)
    assert opened(folder).layers == 2


@pytest.mark.parametrize("key", ["_auto_map", "__attn_implementation", "_moe_implementation_internal", "use_kernels"])
def test_keys_that_run_code_are_refused_under_any_underscore(folder: Path, key: str) -> None:
    config(**{key: True if key == "use_kernels" else "evil/kernel"})(folder)
    refused(folder, f"{key} can make transformers run code")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bamba", {**HEADS, **MAMBA, "attn_layer_indices": [1]}),
        ("mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
        ("llama", {**HEADS, "some_limit": math.inf, "others": [-math.inf, {"a": math.inf}]}),
    ],
)
def test_an_infinity_as_transformers_writes_it(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    wanted = CONFIG_MAPPING[kind](**{**SMALL, **settings})
    save_model(wanted, tmp_path / "model", dtype=torch.float32)
    assert "__float__" in (tmp_path / "model" / "config.json").read_text()
    source = opened(tmp_path / "model")
    write_model(_alone(source), {"maths": source}, tmp_path / "out", texts={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    drop = ("_name_or_path", "transformers_version")
    assert {k: v for k, v in again.to_dict().items() if k not in drop} == {
        k: v for k, v in written.to_dict().items() if k not in drop
    }


def _alone(source: Source) -> StackRecipe:
    copy = Blend(method="passthrough", sources=("maths",), parameters={"scale": {"maths": 1.0}})
    return StackRecipe.compose(
        sources={"maths": source.reference}, tokenizer="maths", embedding=copy, norm=copy, head=copy,
        hops=[(layer, copy, copy, copy) for layer in range(source.layers)],
    )  # fmt: skip


# ---- files that are none, and files elsewhere ------------------------------------------------------------------------

NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "model.safetensors", "README.md", "chat_template.jinja", "additional_chat_templates/default.jinja", "merges.txt",
    "spiece.model",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_in_the_place_of_any_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, "is a named pipe")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret" / Path(name).name
    secret.parent.mkdir()
    secret.write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    refused(folder, f"{name} is a link that leaves the folder")


def test_a_folder_of_templates_elsewhere_is_refused(folder: Path) -> None:
    (folder.parent / "secret").mkdir()
    (folder / "additional_chat_templates").symlink_to("../secret")
    refused(folder, "additional_chat_templates is a link that leaves the folder")


def test_a_link_that_leads_back_is_refused(folder: Path) -> None:
    (folder / "x").symlink_to("x")
    refused(folder, "leads back to itself")


def test_a_folder_of_more_files_than_a_model_has_is_refused(folder: Path) -> None:
    for number in range(5_000):
        os.mknod(folder / f"{number}.json")
    refused(folder, "holds more than 5,000 files")


def test_a_variant_of_a_model_made_of_links_is_opened(plain: Path, tmp_path: Path) -> None:
    """As people lay them out to change one file; the links may go through a hub cache."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    shutil.copytree(plain, blobs)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        (blobs / file.name).rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    (tmp_path / "variant").mkdir()
    for file in plain.iterdir():
        (tmp_path / "variant" / file.name).symlink_to(snapshot / file.name)
    (tmp_path / "variant" / "config.json").unlink()
    shutil.copy(plain / "config.json", tmp_path / "variant")
    (tmp_path / "variant" / "data").symlink_to("/usr")  # a folder, which no loader looks into
    source = opened(tmp_path / "variant")
    assert "links to files of another folder: generation_config.json" in source.warnings[0]
    assert torch.equal(source.read("lm_head.weight"), opened(plain).read("lm_head.weight"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fast_tokenizer_files", ["../secret/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["/etc/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", "tokenizer.9.0.0.json"),
        ("vocab", "../secret/vocab.json"),
        ("merges", "/etc/passwd"),
        ("init_inputs", ["/etc/passwd"]),
        ("some_table", "/etc/passwd"),
        ("sp_model_kwargs", {"model_file": "/etc/passwd"}),
    ],
)
def test_a_tokenizer_reads_no_file_elsewhere(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "tokenizer_config.json", **{key: value})
    refused(folder, f"tokenizer_config.json: {key}")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "wide", "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
        ("num_attention_heads", -3, "validate_architecture': ValueError: The hidden size .* attention heads"),
    ],
)
def test_what_transformers_says_of_a_setting_is_told_with_its_cause(
    folder: Path, key: str, value: Any, words: str
) -> None:
    edit_json(folder / "config.json", **{key: value})
    refused(folder, words)


def test_a_template_whose_name_is_no_text_is_refused(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / os.fsdecode(b"x\xff.jinja")).write_text("{{ messages }}")
    refused(folder, "cannot be written down")


def test_keys_that_old_tokenizers_have_are_let_through(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        special_tokens_map_file="/elsewhere/special_tokens_map.json", name_or_path="/models/old",
        tokenizer_file=None, vocab_file="/etc/passwd", init_inputs=[], sp_model_kwargs={}, model_max_length=10**30,
        fast_tokenizer_files=["tokenizer.json"],
    )  # fmt: skip
    assert len(open_tokenizer(opened(folder))) == 32


def test_all_that_is_loaded_is_fingerprinted_and_exported(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    source = opened(folder)
    assert "additional_chat_templates/tools.jinja" in fingerprint(source)
    write_model(_alone(source), {"maths": source}, folder.parent / "out", texts={})
    wanted, found = (AutoTokenizer.from_pretrained(where).chat_template for where in (folder, folder.parent / "out"))
    assert found == wanted
    assert set(found) == {"default", "tools"}


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer(**changes: Any) -> Harm:
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


GROWS = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12
TOKENIZERS: dict[str, Harm] = {
    "a pattern that takes for ever": tokenizer(pre_tokenizer=split("(a|aa)+$"), normalizer=None),
    "another": tokenizer(pre_tokenizer=split(r"(\w+\s?)+\.$"), normalizer=None),
    "texts that grow": tokenizer(normalizer={"type": "Sequence", "normalizers": GROWS}),
    "padding": tokenizer(
        padding={
            "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>",
        }
    ),
    "a post-processor that floods": tokenizer(
        post_processor={
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 200_000,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    ),
    "a broken file": lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'),
    "a template without an end": lambda folder: (folder / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    ),
    "a template that makes gigabytes": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ '%999999999d' % 5 }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    folder: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("evomerge.checkpoints.tokenizer_trial._CPU_SECONDS", 1)
    source = opened(folder)
    TOKENIZERS[case](folder)
    with pytest.raises(InputError, match="its tokenizer cannot be") as raised:
        open_tokenizer(source)
    assert raised.value.place == "sources.maths"
    assert not list((tmp_path / "evomerge").rglob("tokenizers/*"))  # which would say that it works


def test_a_tokenizer_is_tried_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_tokenizer(opened(folder))
    monkeypatch.setattr("evomerge.checkpoints.tokenizer_trial._run", lambda _: "tried again")
    open_tokenizer(opened(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="tried again"):
        open_tokenizer(opened(folder))


# ---- adapters --------------------------------------------------------------------------------------------------------

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{QUERY}.lora_A.weight": torch.ones(4, 16), f"{QUERY}.lora_B.weight": torch.ones(16, 4)}


def adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> str:
    """A reference to the model with an adapter of these tensors and settings."""
    beside = folder.parent / "adapter"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, **settings}
    (beside / "adapter_config.json").write_text(json.dumps(content))
    save_file(PAIR if tensors is None else tensors, beside / "adapter_model.safetensors")
    return f"{folder}+{beside}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"(a|aa)+": 4}}, "too long to match"),
        ({"alpha_pattern": {"(aa|a|aaa)+": 4}}, "too long to match"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "broken pattern"),
        ({"rank_pattern": {"(" * 500 + "q" + ")" * 500: 4}}, "broken pattern"),
        ({"rank_pattern": {"(\x1b[2J": 4}}, "broken pattern"),
        ({"lora_alpha": 1e308}, "lora_alpha is 1e"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_alpha": 10**39}, "lora_alpha is 1000"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"base_model_name_or_path": "\ud800"}, "surrogate"),
    ],
)
def test_settings_of_adapters_are_refused(
    folder: Path, settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.checkpoints.adapter_settings._PATTERN_SECONDS", 0.3)
    module = f"{'a' * 80}!"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 16), f"{module}.lora_B.weight": torch.ones(16, 4)}
    refused(adapter(folder, tensors if words == "too long to match" else None, **settings), words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({**PAIR, **{n.removeprefix("base_model.model."): t.clone() for n, t in PAIR.items()}}, "under two names"),
        (
            {n.replace("weight", f"{a}.weight"): t.clone() for n, t in PAIR.items() for a in ("one", "two")},
            "several adapters: one, two",
        ),
        (
            {**PAIR, "lm_head.weight": torch.ones(32, 16), "lm_head.modules_to_save.weight": torch.zeros(32, 16)},
            "lm_head.weight twice, and they differ",
        ),
    ],
    ids=range(4),
)
def test_tensors_of_adapters_are_refused(folder: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    refused(adapter(folder, tensors), words)


@pytest.mark.parametrize("name", ["default", "mine", "weighty"])
def test_an_adapter_saved_under_its_name_is_the_same(folder: Path, name: str) -> None:
    head = torch.randn(32, 16)
    plain = opened(adapter(folder, {**PAIR, "base_model.model.lm_head.weight": head}))
    query = "model.layers.0.self_attn.q_proj.weight"
    plain_query, plain_head = plain.read(query).clone(), plain.read("lm_head.weight").clone()
    named = {key.replace("weight", f"{name}.weight"): tensor for key, tensor in PAIR.items()}
    named[f"base_model.model.lm_head.modules_to_save.{name}.weight"] = head
    named["base_model.model.lm_head.original_module.weight"] = torch.zeros(32, 16)
    source = opened(adapter(folder, named))
    assert torch.equal(source.read(query), plain_query)
    assert torch.equal(source.read("lm_head.weight"), plain_head)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_refused(folder: Path, kind: str, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in PAIR.items()}
    tensors[f"{QUERY}.{kind}.weight"][0, 0] = value
    reference = adapter(folder, tensors)
    with pytest.raises(InputError, match=r"q_proj.weight .* has NaN or Inf"):
        check_finite(opened(reference))
    with pytest.raises(InputError, match="has NaN or Inf"):
        inspect_models([reference], None)


# ---- references and warnings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["a\0b", "a\ud800", "x" * 5000, "+".join(["/none"] * 900), "../" * 3000, "~\0"])
def test_references_that_no_file_can_have_are_refused(reference: str) -> None:
    refused(reference)


def test_warnings_are_printable_and_short(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"!\x1b[2J\nerror: " + "x" * 900: torch.ones(2)}))
    reference = adapter(folder, base_model_name_or_path="x/\x1b]0;title\x07\u202e" + "y" * 5000)
    for warning in opened(reference).warnings:
        assert warning.isprintable()
        assert len(warning) < 500


def test_the_miniatures_are_opened_without_a_word() -> None:
    for name in ("base", "maths", "japanese"):
        assert opened(MINIATURES / name).warnings == ()
        assert load_file(MINIATURES / name / "model.safetensors")
