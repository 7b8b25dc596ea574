from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import edit_json, edit_tensors, save_model, save_tokenizer, tiny_config
from huggingface_hub import errors as hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from evomerge.checkpoints import places
from evomerge.checkpoints.headers import map_file, read_header, view_entry
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    return save_model(tiny_config(), folder, max_shard_size=SHARD_BYTES)


def opened(folder: Path) -> Source:
    return open_source("maths", str(folder), place="sources.maths")


# ---- reading ----


def test_opens_a_folder(plain: Path) -> None:
    source = opened(plain)
    expected = load_file(plain / "model.safetensors")
    assert source.layers == 2
    assert not source.tied
    assert source.dtype == torch.bfloat16
    assert source.warnings == ()
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype
    assert [f.name for f in source.files if f.suffix == ".safetensors"] == ["model.safetensors"]


def test_reading_maps_the_file_and_copies_nothing(plain: Path) -> None:
    source = opened(plain)
    first, again = (source.read("model.norm.weight") for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    whole = source.read("lm_head.weight").untyped_storage()
    assert whole.nbytes() == (plain / "model.safetensors").stat().st_size


def test_a_source_travels_without_its_weights(plain: Path) -> None:
    source = opened(plain)
    expected = source.read("lm_head.weight")
    copy = pickle.loads(raw := pickle.dumps(source))
    assert len(raw) < (plain / "model.safetensors").stat().st_size
    assert copy == source
    assert torch.equal(copy.read("lm_head.weight"), expected)


def test_shards_hold_the_same_model(plain: Path, sharded: Path) -> None:
    one, many = opened(plain), opened(sharded)
    assert len({entry.file for entry in many.tensors.values()}) > 2
    assert list(one.tensors) == list(many.tensors)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_a_relative_reference_is_relative_to_the_root(plain: Path) -> None:
    assert open_source("a", "plain", place="sources.a", root=plain.parent).folder == plain


def test_a_tied_head_has_no_tensor_and_an_equal_copy_is_fine(tmp_path: Path) -> None:
    save_model(tiny_config(tie_word_embeddings=True), tmp_path)
    assert opened(tmp_path).tied
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    source = opened(tmp_path)
    assert "lm_head.weight" not in source.tensors
    assert source.warnings == ()


def test_extra_tensors_and_mixed_dtypes_are_told(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    edit_tensors(tmp_path, lambda t: t.update({"extra": torch.ones(2, dtype=torch.int64)}))
    edit_tensors(tmp_path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    source = opened(tmp_path)
    assert "extra" not in source.tensors
    assert "extra" in source.warnings[0]
    assert "bfloat16" in source.warnings[1]
    assert source.read("model.norm.weight").dtype == torch.float32


def test_a_hub_cache_of_links_is_let_through(plain: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(plain, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert opened(snapshot).layers == 2


# ---- the hub ----


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (hub.GatedRepoError, "gated"),
        (hub.RepositoryNotFoundError, "neither a folder"),
        (hub.RevisionNotFoundError, "no revision 'v2'"),
        (hub.OfflineModeIsEnabled, "cannot be reached"),
        (hub.LocalEntryNotFoundError, "cannot be reached"),
        (hub.HfHubHTTPError, "could not be downloaded"),
        (RuntimeError, "could not be downloaded"),
    ],
)
def test_hub_failures_are_told(monkeypatch: pytest.MonkeyPatch, error: type[Exception], word: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(places, "snapshot_download", fail)
    with pytest.raises(InputError, match=word) as caught:
        open_source("a", "org/name@v2", place="sources.a")
    assert caught.value.place == "sources.a"


def test_a_hub_id_is_downloaded_at_its_revision(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"]))
        return str(plain)

    monkeypatch.setattr(places, "snapshot_download", download)
    assert open_source("a", "org/name@v2", place="sources.a").folder == plain
    assert open_source("a", "org/name", place="sources.a").reference == "org/name"
    assert asked == [("org/name", "v2"), ("org/name", None)]


@pytest.mark.parametrize("reference", ["missing", "./a/b", "/no/such/folder", "a" * 5000, "~nobody-at-all/x", "a/b/c"])
def test_a_missing_folder_is_told(reference: str) -> None:
    with pytest.raises(InputError, match="there is no folder") as caught:
        open_source("a", reference, place="sources.a")
    assert caught.value.place == "sources.a"


def test_a_gguf_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"m\.gguf cannot be read as GGUF"):
        open_source("a", str(tmp_path / "m.gguf"), place="sources.a")


def test_the_hub_is_not_reached_in_these_tests(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        open_source("a", "no-such-org/no-such-model", place="sources.a", root=tmp_path)


# ---- broken and hostile folders ----

Harm = Callable[[Path], object]


def config(**changes: Any) -> Harm:
    return lambda folder: edit_json(folder / "config.json", **changes)


def text(name: str, content: str | bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    return lambda folder: edit_tensors(folder, change)


def cut(keep: Callable[[int], int]) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        os.truncate(file, keep(file.stat().st_size))

    return harm


def both(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_renamed(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def link_out(name: str) -> Harm:
    def harm(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return harm


def header(change: Callable[[dict[str, Any]], object]) -> Harm:
    """Rewrite the header and leave the data alone."""

    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        fields = json.loads(raw[8:end])
        change(fields)
        new = json.dumps(fields).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + raw[end:])

    return harm


def norm(**changes: Any) -> Harm:
    return header(lambda fields: fields["model.norm.weight"].update(changes))


def length(claimed: int) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", claimed) + file.read_bytes()[8:])

    return harm


def twice(folder: Path) -> None:
    """Two entries of one name: safetensors keeps the last without a word."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    entry = json.dumps({"model.norm.weight": json.loads(raw[8:end])["model.norm.weight"]}).encode()
    new = entry[:-1] + b"," + raw[9:end]
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[end:])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
HTML = "<!DOCTYPE html><html><body>Access denied</body></html>" * 9
HEAD = "lm_head.weight"

BAD: dict[str, tuple[Harm, str]] = {
    "no config": (gone("config.json"), "no config.json"),
    "config not JSON": (text("config.json", "{"), "not JSON"),
    "config not text": (text("config.json", b"\xff\xfe\x00"), "not JSON"),
    "config too deep": (text("config.json", '{"a":' * 100_000), "not JSON"),
    "config a list": (text("config.json", "[]"), "not a JSON object"),
    "config a folder": (both(gone("config.json"), lambda f: (f / "config.json").mkdir()), "is a folder"),
    "unknown type": (config(model_type="lama"), "model_type 'lama'"),
    "type not text": (config(model_type=["llama"]), "model_type"),
    "not causal": (config(model_type="clip_vision_model"), "causal language model|no tensors|num_hidden_layers"),
    "wrong type": (config(num_hidden_layers="two"), "num_hidden_layers"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "hundred layers": (config(num_hidden_layers=100), "num_hidden_layers is 100, but"),
    "huge width": (config(hidden_size=10**12), "hidden_size"),
    "negative vocabulary": (config(vocab_size=-1), "vocab_size"),
    "a billion experts": (config(nested={"num_experts": 10**9}), "num_experts"),
    "impossible heads": (config(num_attention_heads=3), "config.json"),
    "auto_map": (config(auto_map={"AutoModelForCausalLM": "x.Y"}), "auto_map"),
    "nested auto_map": (config(text_config={"auto_map": {"AutoConfig": "x.Y"}}), "auto_map"),
    "attention from a hub": (config(_attn_implementation_internal="evil/kernel"), "_attn_implementation_internal"),
    "attention by public name": (config(attn_implementation="evil/kernel"), "attn_implementation"),
    "experts from a hub": (config(_experts_implementation="evil/kernel"), "_experts_implementation"),
    "weights by name": (config(transformers_weights="../x.safetensors"), "transformers_weights"),
    "tokenizer code": (lambda f: edit_json(f / "tokenizer_config.json", auto_map={"A": ["x.Y", None]}), "auto_map"),
    "tokenizer config broken": (text("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    "generation broken": (text("generation_config.json", "no"), "generation_config.json is not JSON"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .gptq, 4 bits"),
    "AWQ": (
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        "quantised .awq, 4 bits",
    ),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised .bitsandbytes, 4 bits",
    ),
    "old bitsandbytes": (config(quantization_config={"load_in_8bit": True}), "quantised .bitsandbytes, 8 bits"),
    "FP8": (config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}), "quantised .fp8"),
    "MXFP4": (config(quantization_config={"quant_method": "mxfp4"}), "quantised .mxfp4"),
    "compressed": (config(compression_config={"quant_method": "compressed-tensors"}), "quantised .compressed-tensors"),
    "nested quantiser": (config(text_config={"quantization_config": {"quant_method": "gptq"}}), "quantised .gptq"),
    "unknown quantiser": (config(quantization_config={"quant_method": "mine"}), "quantised .mine"),
    "quantiser of text": (config(quantization_config="4bit"), "quantised .unknown"),
    "GPTQ beside the model": (text("quantize_config.json", '{"bits": 4}'), "quantised .GPTQ"),
    "AWQ beside the model": (text("quant_config.json", '{"w_bit": 4}'), "quantised .AWQ"),
    "ModelOpt beside the model": (text("hf_quant_config.json", "{}"), "quantised .ModelOpt"),
    "GGUF": (both(gone("model.safetensors"), text("model-q4.gguf", "GGUF")), "holds GGUF .model-q4.gguf"),
    "GGUF alone": (
        both(gone("model.safetensors"), gone("config.json"), text("m.gguf", "GGUF")),
        "holds GGUF .m.gguf",
    ),
    "adapter": (both(gone("config.json"), text("adapter_config.json", "{}")), "is an adapter"),
    "no weights": (gone("model.safetensors"), "no model.safetensors"),
    "pickle only": (pickled, "pickled weights only .pytorch_model.bin"),
    "pickle renamed": (pickle_renamed, "pickled PyTorch file"),
    "empty": (cut(lambda n: 0), "is empty"),
    "seven bytes": (cut(lambda n: 7), "cut short"),
    "header cut": (cut(lambda n: 100), "cut short"),
    "data cut": (cut(lambda n: n - 1), "cut short"),
    "one byte more": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), "1 bytes behind its last tensor"),
    "LFS pointer": (text("model.safetensors", LFS), "Git LFS pointer"),
    "web page": (text("model.safetensors", HTML), "web page"),
    "header of 2^63": (length(2**63), "header of 9,223"),
    "header of nothing": (length(0), "header of 0"),
    "header not JSON": (lambda f: length(40)(f), "cannot be read"),
    "overlap": (
        header(lambda h: h[HEAD].update(data_offsets=[2, 2 + h[HEAD]["data_offsets"][1]])),
        "overlaps another|hole",
    ),
    "two at one place": (norm(data_offsets=[0, 32]), "overlaps another"),
    "hole": (header(lambda h: h.pop("model.layers.0.mlp.up_proj.weight")), "leaves a hole"),
    "overflow": (norm(data_offsets=[2**63, 2**64]), "lies about 'model.norm.weight'"),
    "negative offset": (norm(data_offsets=[-32, 0]), "data_offsets"),
    "offsets swapped": (norm(data_offsets=[32, 0]), "does not fill"),
    "unknown dtype": (norm(dtype="BF15"), "unknown dtype"),
    "shape lies": (norm(shape=[17]), "does not fill"),
    "shape not whole": (norm(shape=[16.0]), "shape"),
    "field missing": (header(lambda h: h["model.norm.weight"].pop("dtype")), "exactly dtype"),
    "a name twice": (twice, "'model.norm.weight' appears twice"),
    "tensor missing": (tensors(lambda t: t.pop("model.norm.weight")), "missing from the files: model.norm.weight"),
    "config one layer more": (config(num_hidden_layers=3), "model.layers.2.* and 6 more"),
    "untied without head": (tensors(lambda t: t.pop(HEAD)), "missing from the files: lm_head.weight"),
    "tied with another head": (config(tie_word_embeddings=True), "but they differ"),
    "other vocabulary": (config(vocab_size=40), "has shape .32, 16."),
    "a tensor twice": (
        tensors(lambda t: t.update({"norm.weight": torch.ones(16)})),
        "model.norm.weight twice",
    ),
    "integers": (tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})), "stored as I8"),
    "eight-bit floats": (tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    "weights linked out": (link_out("model.safetensors"), "model.safetensors is a link"),
    "tokenizer linked out": (link_out("tokenizer.json"), "tokenizer.json is a link"),
    "single file and index": (text(INDEX, '{"weight_map": {}}'), "has both"),
}


def refused(folder: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        opened(folder)
    assert caught.value.place == "sources.maths"
    assert len(str(caught.value)) < 700
    return caught.value


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(plain: Path, tmp_path: Path, case: str) -> None:
    harm, words = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    opened(folder)
    harm(folder)
    refused(folder, words)


def shard_map(change: Callable[[dict[str, str]], object]) -> Harm:
    def harm(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return harm


def elsewhere(reference: Callable[[Path], str]) -> Harm:
    """Put a whole, valid shard outside the folder and let the index name it."""

    def harm(folder: Path) -> None:
        outside = folder.parent / "secret" / "x.safetensors"
        outside.parent.mkdir()
        shutil.move(folder / json.loads((folder / INDEX).read_text())["weight_map"][HEAD], outside)
        shard_map(lambda m: m.update(dict.fromkeys(read_header(outside, "x"), reference(outside))))(folder)

    return harm


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


BAD_INDEX: dict[str, tuple[Harm, str]] = {
    "dots": (elsewhere(lambda _: "../secret/x.safetensors"), "leads outside"),
    "absolute": (elsewhere(str), "leads outside"),
    "dots alone": (shard_map(lambda m: m.update({HEAD: ".."})), "leads outside"),
    "backslash": (shard_map(lambda m: m.update({HEAD: "..\\x.safetensors"})), "leads outside"),
    "null byte": (shard_map(lambda m: m.update({HEAD: "x\0"})), "leads outside"),
    "shard missing": (lambda f: first_shard(f).unlink(), "shard model-00001-.* is missing"),
    "shard cut": (lambda f: os.truncate(first_shard(f), 1000), "model-00001-.* is cut short"),
    "shard linked out": (lambda f: link_out(first_shard(f).name)(f), "is a link"),
    "no index": (gone(INDEX), "no model.safetensors.index.json"),
    "index not JSON": (text(INDEX, "{"), "not JSON"),
    "no weight_map": (text(INDEX, "{}"), "no weight_map"),
    "weight_map of numbers": (text(INDEX, '{"weight_map": {"a": 1}}'), "no weight_map"),
    "empty weight_map": (text(INDEX, '{"weight_map": {}}'), "config.json"),
    "tensor unlisted": (shard_map(lambda m: m.pop(HEAD)), "lm_head.weight|disagrees"),
    "tensor in another shard": (
        shard_map(lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})), "disagrees"
    ),
    "tensor invented": (shard_map(lambda m: m.update({"x": m[HEAD]})), "disagrees .* 'x': the shard lacks it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_indices_are_refused(sharded: Path, tmp_path: Path, case: str) -> None:
    harm, words = BAD_INDEX[case]
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    harm(folder)
    refused(folder, words)


def test_harmless_private_keys_of_older_configs_are_let_through(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    config(_name_or_path="/home/x/y", _attn_implementation_autoset=True, quantization_config=None)(tmp_path)
    assert opened(tmp_path).layers == 2


def test_names_without_the_prefix_of_the_model_are_found(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    edit_tensors(tmp_path, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    source = opened(tmp_path)
    other = opened(plain)
    assert list(source.tensors) == list(other.tensors)
    assert all(torch.equal(source.read(name), other.read(name)) for name in other.tensors)


def test_a_tokenizer_is_not_needed_to_read_weights(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    assert opened(tmp_path).layers == 2
    save_tokenizer(tmp_path)
    assert tmp_path / "tokenizer.json" in opened(tmp_path).files


# ---- headers against the reference implementation ----

SMALL = save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.zeros(0, 5)})


@settings(max_examples=2 * settings().max_examples, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_never_laxer_than_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(raw) - 1))
        what = data.draw(st.sampled_from([*b'0123456789[]{}:,"BF', 0, 255]))
        if data.draw(st.booleans()):
            raw[where] = what
        else:
            raw.insert(where, what)
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    try:
        reference = load_file(file)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        reference = None
    try:
        ours = read_header(file, "x")
    except InputError:
        return
    if reference is None:
        pytest.fail(f"safetensors refuses what was let through: {bytes(raw)!r}")
    assert reference.keys() == ours.keys()
    for name, tensor in reference.items():
        assert list(tensor.shape) == list(ours[name].shape)
        if ours[name].dtype in ("F32", "BF16"):
            view = view_entry(ours[name], map_file(file))
            assert torch.equal(view.view(torch.uint8), tensor.view(torch.uint8))


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.float16)}, file)
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    file.write_bytes(struct.pack("<Q", end - 7) + raw[8:end] + b" " + raw[end:])
    entries = read_header(file, "x")
    assert entries["a"].begin % 4
    assert torch.equal(view_entry(entries["a"], map_file(file)), torch.arange(4.0))


def test_released_weights_are_read_again(tmp_path: Path) -> None:
    """Also where a tensor is not aligned in its file, and is read as a copy."""
    folder = save_model(tiny_config(), tmp_path / "model")
    expected = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for padding in (b"", b"  ", b"   "):
        text = raw[8 : 8 + length] + padding
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        source = open_source("a", str(folder), place="a")
        for _ in range(2):
            for name in source.tensors:
                assert torch.equal(source.read(name), expected[name])
                source.release(name)
            source.release_files()


def test_a_file_beyond_the_memory_that_may_be_addressed_is_told(tmp_path: Path) -> None:
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(2**43)  # takes no room on the disk
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**42, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be mapped into memory") as caught:
            map_file(tmp_path / "large.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert caught.value.place.endswith("large.safetensors")
