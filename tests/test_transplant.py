"""Vocabularies of other models: rows that are shared to the bit, and rows that are made."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, edit_tensors, save_model, save_tokenizer, tiny_config
from helpers_miniature import MINIATURES, ROOT, short_search_file
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from evomerge.checkpoints import pursuit
from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.pursuit import pursue
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.token_texts import matched, meanings
from evomerge.checkpoints.transplant import transplanted
from evomerge.checkpoints.vocabulary import align
from evomerge.cli import main
from evomerge.commands.transplant import bits_per_byte, transplant
from evomerge.errors import InputError
from evomerge.vocabulary import Vocabulary


def opened(folder: Path, name: str = "m") -> Source:
    return open_source(name, str(folder), place=f"sources.{name}")


# ---- pursuit ----


def slowly(target: torch.Tensor, atoms: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
    """The textbook's loop in float64, with least squares solved anew each time."""
    target, atoms = target.double(), atoms.double()
    chosen: list[int] = []
    left, shares = target, torch.zeros(0, dtype=torch.float64)
    for _ in range(count):
        fit = (atoms @ left).abs() / atoms.norm(dim=1)
        fit[chosen] = -1.0
        chosen.append(int(fit.argmax()))
        shares = torch.linalg.lstsq(atoms[chosen].T, target).solution
        left = target - shares @ atoms[chosen]
    return chosen, shares


@pytest.mark.parametrize("rough", [True, False])
def test_pursuit_takes_the_atoms_that_the_textbook_takes(monkeypatch: pytest.MonkeyPatch, rough: bool) -> None:
    monkeypatch.setattr(pursuit, "_multiplies_bfloat16", lambda: rough)
    torch.manual_seed(0)
    atoms, targets = torch.randn(60, 24) * torch.rand(60, 1), torch.randn(7, 24)
    chosen, shares = pursue(targets, atoms, 6)
    for number, target in enumerate(targets):
        expected, numbers = slowly(target, atoms, 6)
        assert chosen[number].tolist() == expected
        assert torch.allclose(shares[number].double(), numbers, atol=1e-4)


def test_a_sum_of_few_atoms_is_found_and_nothing_else_is_added() -> None:
    torch.manual_seed(1)
    atoms = torch.randn(40, 32)
    chosen, shares = pursue((2.0 * atoms[3] - atoms[17])[None], atoms, 8)
    made = shares[0] @ atoms[chosen[0]]
    assert torch.allclose(made, 2.0 * atoms[3] - atoms[17], atol=1e-4)
    assert (shares[0].abs() > 1e-4).sum() == 2
    assert pursue(torch.empty(0, 32), atoms, 8)[0].shape == (0, 8)


# ---- tokens ----


def byte_level(tokens: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentence_piece(tokens: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_tokens_of_two_kinds_match_by_their_bytes() -> None:
    """GPT-2's letters for bytes against SentencePiece's space and its tokens for bytes; ends by what they do."""
    ours = byte_level(["a", "Ġa", "Ċ", "æĹ¥", "ã", "x"])  # æĹ¥ is 日, ã the byte 0xE3
    theirs = sentence_piece(["▁a", "a", "日", "<0x0A>", "<0xE3>", "q"])
    assert meanings(ours)[1] == b" a"
    assert meanings(theirs)[4] == b"\xe3"
    pairs = {
        theirs.convert_ids_to_tokens(to): ours.convert_ids_to_tokens(of) for to, of in matched(ours, theirs).items()
    }
    assert pairs == {
        "▁a": "Ġa", "a": "a", "日": "æĹ¥", "<0x0A>": "Ċ", "<0xE3>": "ã", "<s>": "<|begin|>", "</s>": "<|end|>",
    }  # fmt: skip


# ---- models ----


@pytest.mark.parametrize("tied", [False, True])
def test_onto_itself_it_is_the_same_to_the_bit(tmp_path: Path, tied: bool) -> None:
    """Also rows behind the last token, which many models have."""
    model = save_model(tiny_config(vocab_size=len(WORDS) + 5, tie_word_embeddings=tied), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    transplant(str(model), str(model), tmp_path / "out", "omp", 8, None)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out")]
    assert configs[0] == configs[1]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_text() == (model / file).read_text()


def test_rows_are_sums_of_the_models_own(tmp_path: Path) -> None:
    """By hand: the donor's new word is twice one shared word minus another, and so is what the model gets."""
    model = save_model(tiny_config(), tmp_path / "model", dtype=torch.float32)
    words = [*WORDS[:10], "new", *WORDS[12:]]
    donor = save_model(tiny_config(vocab_size=len(words)), tmp_path / "donor", seed=1, dtype=torch.float32)
    save_tokenizer(donor, words)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name][10] = 2 * tensors[name][5] - tensors[name][20]

    edit_tensors(donor, mix)
    made = transplanted(opened(model), opened(donor), "omp", 4)
    assert made.plan is not None
    assert made.plan.lacking.tolist() == [10]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = opened(model).read(name)
        table = made.read(name)
        assert table.shape[0] == len(words)
        assert torch.equal(table[3:10], own[3:10])
        assert torch.equal(table[11:], own[12:])  # by word, not by number
        other = own[WORDS.index(words[20])]
        assert torch.allclose(table[10], 2 * own[5] - other, atol=1e-3)
    for method, expected in (("mean", None), ("subword", opened(model).read("lm_head.weight")[0])):
        row = transplanted(opened(model), opened(donor), method, 4).read("lm_head.weight")[10]  # type: ignore[arg-type]
        own = opened(model).read("lm_head.weight")
        shared = own[[i for i, word in enumerate(WORDS) if word in words]].mean(0)
        assert torch.allclose(row, shared if expected is None else expected, atol=1e-6)


def test_special_tokens_settings_and_chats_are_the_donors(tmp_path: Path) -> None:
    model = save_model(tiny_config(), tmp_path / "model")
    words = ["<bos>", "<eos>", "<unk>", *WORDS[3:], "<|im_end|>"]
    donor = save_model(tiny_config(vocab_size=len(words), bos_token_id=0, eos_token_id=1), tmp_path / "donor", seed=1)
    save_tokenizer(donor, words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    (donor / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    edit_json(donor / "generation_config.json", eos_token_id=[1, 32])
    edit_json(model / "generation_config.json", temperature=0.5, eos_token_id=2)
    transplant(str(model), str(donor), tmp_path / "out", "omp", 8, None)
    own, table = (load_file(f / "model.safetensors")["lm_head.weight"] for f in (model, tmp_path / "out"))
    assert torch.equal(table[:3], own[[1, 2, 0]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.vocab_size) == (0, 1, 33)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (settings["temperature"], settings["eos_token_id"]) == (0.5, [1, 32])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)


def test_the_donor_may_be_of_another_architecture_and_width(tmp_path: Path) -> None:
    model = save_model(tiny_config(), tmp_path / "model")
    words = [*WORDS, *(f"v{i}" for i in range(6))]
    config = GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=24, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    donor = save_model(config, tmp_path / "donor", seed=1)  # whose head is its embedding
    save_tokenizer(donor, words)
    transplant(str(model), str(donor), tmp_path / "out", "omp", 8, None)
    table = load_file(tmp_path / "out" / "model.safetensors")
    assert table["model.embed_tokens.weight"].shape == table["lm_head.weight"].shape == (len(words), 16)
    assert table["lm_head.weight"].isfinite().all()
    assert table["lm_head.weight"][-6:].norm() > 0


def forgetful(folder: Path) -> Path:
    """A miniature whose tokenizer has lost every third token of several letters."""
    shutil.copytree(MINIATURES / "base", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, added = content["model"]["vocab"], {token["content"] for token in content["added_tokens"]}
    several = [t for t in sorted(vocabulary, key=lambda t: vocabulary[t]) if len(t) > 1 and t not in added]
    lost = set(several[::3])
    pairs = [(merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in content["model"]["merges"]]
    content["model"]["merges"] = [m for m, pair in pairs if "".join(pair) not in lost and not lost & {*pair}]
    content["model"]["vocab"] = {f"<lost {i}>" if t in lost else t: i for t, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_made_rows_predict_a_text_clearly_better_than_means(tmp_path: Path) -> None:
    model, donor = forgetful(tmp_path / "model"), MINIATURES / "maths"
    lines = (ROOT / "evaluators/tasks/data/mini_math_ja.search.jsonl").read_text("utf-8").splitlines()[:60]
    text = "\n".join(item["prompt"] + item["answer"] for item in map(json.loads, lines))
    (tmp_path / "text.txt").write_text(text)
    needed = {}
    for method in ("omp", "mean"):
        transplant(str(model), str(donor), tmp_path / method, method, 32, tmp_path / "text.txt")
        needed[method] = bits_per_byte(opened(tmp_path / method), text)
    assert needed["omp"] < 0.9 * needed["mean"]


def test_sources_of_one_backbone_merge_over_their_tokenizers(tmp_path: Path) -> None:
    model = forgetful(tmp_path / "model")
    sources = {"maths": opened(MINIATURES / "maths", "maths"), "other": opened(model, "other")}
    aligned = align(sources, "maths", Vocabulary(kind="transplant"))
    assert aligned["maths"] is sources["maths"]
    check_compatible(aligned, same_tokens=False)
    table = aligned["other"].read("model.embed_tokens.weight")
    kept = (table == sources["other"].read("model.embed_tokens.weight")).all(1)
    assert 0.7 < kept.float().mean() < 1.0
    copy = pickle.loads(pickle.dumps(aligned["other"]))
    assert torch.equal(copy.read("model.embed_tokens.weight"), table)
    with pytest.raises(ValueError, match="no tokens, base, padding"):
        Vocabulary(kind="transplant", pad_to_multiple_of=8)


@pytest.mark.nightly
def test_a_search_over_models_of_different_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = forgetful(tmp_path / "model")
    sources = {"maths": str(MINIATURES / "maths"), "japanese": str(MINIATURES / "japanese"), "base": str(model)}
    file = short_search_file(tmp_path, sources=sources, tokenizer="maths", vocabulary={"kind": "transplant"})
    for arguments in (
        ["search", str(file), "--dir", str(tmp_path / "s")],
        ["export", str(tmp_path / "s"), str(tmp_path / "out"), "--candidate", "c0006"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
    assert "score exactly as recorded" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (MINIATURES / "maths" / "tokenizer.json").read_text()


# ---- what cannot be ----


def test_what_cannot_be_transplanted_is_refused(tmp_path: Path) -> None:
    model = save_model(tiny_config(), tmp_path / "model")
    other = save_model(tiny_config(), tmp_path / "other")
    save_tokenizer(other, ["<unk>", "<s>", "</s>", *(f"o{i}" for i in range(29))])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")

    def refused(words: str, donor: Path, method: str = "omp", text: Path | None = None, out: str = "out") -> None:
        before = set(tmp_path.iterdir())
        with pytest.raises(InputError, match=words):
            transplant(str(model), str(donor), tmp_path / out, method, 8, text)
        assert set(tmp_path.iterdir()) == before

    refused("share 3 tokens", other)
    refused("--method", other, method="ompp")
    refused("--text: has no text to predict", model, text=empty)
    refused("DONOR: there is neither a folder|DONOR: there is no folder", tmp_path / "nowhere")
    refused("exists and is not empty", model, out="other")
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    refused("tokenizer", broken)
    edit_tensors(other, lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    model = other
    refused("has NaN or Inf", other)
