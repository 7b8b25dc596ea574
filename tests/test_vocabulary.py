from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_checkpoints import edit_json, save_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PreTrainedTokenizerFast

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.live import live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tokenizer_files import open_tokenizer, tokenizer_folder
from evomerge.checkpoints.vocabulary import align
from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.preparing.prepare import build_space, open_sources
from evomerge.search.settings.search_file import parse_search_file
from evomerge.vocabulary import Vocabulary

SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = {"base": ["a", "b", "c"], "chat": ["b", "a", "d"], "other": ["c", "d", "e"]}
ADDED = {"chat": ["<|im|>"]}
ROWS = {"base": 8, "chat": 7, "other": 6}  # two rows of base have no token
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_words(folder: Path, words: Sequence[str], added: Sequence[str] = (), **more: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **more}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    made.save_pretrained(folder)


def make(root: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    for seed, name in enumerate(TOKENS):
        folder = save_model(tiny_config(vocab_size=ROWS[name], **changes), root / name, seed=seed, dtype=dtype)
        save_words(folder, [*SPECIAL, *TOKENS[name]], ADDED.get(name, ()))


def opened(root: Path, *names: str) -> dict[str, Source]:
    return {name: open_source(name, str(root / name), place=f"sources.{name}") for name in names or TOKENS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, Source]:
    return opened(root)


def ids_of(source: Source) -> dict[str, int]:
    found: dict[str, int] = open_tokenizer(source).get_vocab()
    return found


# ---- rows ----

RULES = {
    "b": {"source": {"kind": "zero"}},
    "c": {"source": {"kind": "model_token", "model": "chat", "token": "d"}, "force": True},
    "e": {"source": "other", "force": True},
    "new": {"source": {"kind": "model_token", "model": "base", "token_id": 7}},
}
# The row of every token, as mergekit 0.1.5 gave it for these models: "chat5+other4" is the mean of two rows.
GOLDEN: dict[str, tuple[str, dict[str, Any], str, dict[str, str]]] = {
    "union": (
        "base", {"kind": "union", "base": "base"}, "<unk> <s> </s> a b c d e <|im|>",
        {
            "base": "base0 base1 base2 base3 base4 base5 chat5+other4 other5 chat6",
            "chat": "chat0 chat1 chat2 chat4 chat3 base5 chat5 other5 chat6",
            "other": "other0 other1 other2 base3 base4 other3 other4 other5 chat6",
        },
    ),
    "tokenizer": (
        "chat", {"kind": "tokenizer", "base": "base"}, "<unk> <s> </s> b a d <|im|>",
        {
            "base": "base0 base1 base2 base4 base3 chat5+other4 chat6",
            "chat": "chat0 chat1 chat2 chat3 chat4 chat5 chat6",
            "other": "other0 other1 other2 base4 base3 other4 chat6",
        },
    ),
    "no base": (
        "other", {"kind": "tokenizer"}, "<unk> <s> </s> c d e",
        {
            "base": "base0 base1 base2 base5 chat5+other4 other5",
            "chat": "chat0 chat1 chat2 base5+other3 chat5 other5",
            "other": "other0 other1 other2 other3 other4 other5",
        },
    ),
    "rules": (
        "base", {"kind": "union", "base": "base", "tokens": RULES}, "<unk> <s> </s> a b c d e <|im|> new",
        {
            "base": "base0 base1 base2 base3 base4 chat5 chat5+other4 other5 chat6 base7",
            "chat": "chat0 chat1 chat2 chat4 chat3 chat5 chat5 other5 chat6 base7",
            "other": "other0 other1 other2 base3 zero chat5 other4 other5 chat6 base7",
        },
    ),
    "padding": (
        "base", {"kind": "tokenizer", "base": "base", "pad_to_multiple_of": 4}, "<unk> <s> </s> a b c",
        {
            "base": "base0 base1 base2 base3 base4 base5 mean mean",
            "chat": "chat0 chat1 chat2 chat4 chat3 base5 mean mean",
            "other": "other0 other1 other2 base3 base4 other3 mean mean",
        },
    ),
}  # fmt: skip


def rows_said(text: str, sources: Mapping[str, Source], name: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for item in text.split():
        if item == "zero":
            found.append(torch.zeros(16))
        elif item == "mean":
            found.append(torch.stack(found[:6]).mean(0))
        else:
            parts = [sources[part[:-1]].read(name)[int(part[-1])] for part in item.split("+")]
            found.append(torch.stack(parts).mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_are_those_that_mergekit_gives(sources: dict[str, Source], case: str, name: str) -> None:
    tokenizer, asked, tokens, rows = GOLDEN[case]
    aligned = align(sources, tokenizer, Vocabulary(**asked))
    assert ids_of(aligned[tokenizer]) == {token: number for number, token in enumerate(tokens.split())}
    for source, text in rows.items():
        torch.testing.assert_close(aligned[source].read(name), rows_said(text, sources, name), rtol=1e-6, atol=1e-7)
        size = len(text.split())
        assert aligned[source].tensors[name].shape == (size, 16)
        assert aligned[source].config["vocab_size"] == size


def vocabularies() -> st.SearchStrategy[dict[str, list[str]]]:
    words = st.lists(st.sampled_from([f"w{i}" for i in range(8)]), unique=True, min_size=1, max_size=8)
    return st.fixed_dictionaries({"base": words, "chat": words, "other": words})


@given(
    words=vocabularies(),
    kind=st.sampled_from(["tokenizer", "union"]),
    tokenizer=st.sampled_from(list(TOKENS)),
    base=st.sampled_from([None, *TOKENS]),
    step=st.sampled_from([None, 1, 5]),
)
@settings(max_examples=settings().max_examples // 4)
def test_rows_agree_with_a_loop_over_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    words: dict[str, list[str]],
    kind: str,
    tokenizer: str,
    base: str | None,
    step: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("random")
    config = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    for seed, name in enumerate(words):  # Phi has a bias on its head
        save_model(PhiConfig(vocab_size=3 + len(words[name]), **config), folder / name, seed=seed, dtype=torch.float32)
        save_words(folder / name, [*SPECIAL, *words[name]])
    sources = opened(folder)
    aligned = align(
        sources, tokenizer, Vocabulary.model_validate({"kind": kind, "base": base, "pad_to_multiple_of": step})
    )
    ids = ids_of(aligned[tokenizer])
    assert {token: ids[token] for token in words[tokenizer]} == {w: i + 3 for i, w in enumerate(words[tokenizer])}
    everyone = {*SPECIAL, *words[tokenizer], *(w for own in words.values() for w in own if kind == "union")}
    assert set(ids) == everyone
    step = step or 1
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        for source in words:
            found = aligned[source].read(name)
            assert len(found) == (len(ids) + step - 1) // step * step
            for token, number in ids.items():
                having = {
                    n: sources[n].read(name)[[*SPECIAL, *words[n]].index(token)]
                    for n in words
                    if token in [*SPECIAL, *words[n]]
                }
                wanted = having.get(source, having.get(base or ""))
                if wanted is None:
                    wanted = sum(having.values(), start=torch.zeros(())) / len(having)
                if len(having) == 1:
                    wanted = next(iter(having.values()))
                torch.testing.assert_close(found[number], wanted)
            for padding in found[len(ids) :]:
                torch.testing.assert_close(padding, found[: len(ids)].mean(0))


@pytest.mark.parametrize("tied", [False, True])
def test_an_aligned_source_computes_what_it_did(tmp_path: Path, tied: bool) -> None:
    make(tmp_path, tie_word_embeddings=tied)
    sources = opened(tmp_path)
    aligned = align(sources, "base", Vocabulary(kind="union", base="base"))
    check_compatible(aligned, same_tokens=False)
    live = live_model(aligned["base"], torch.device("cpu"))
    new, text = ids_of(aligned["base"]), ["<s>", "b", "a", "d", "<|im|>", "a", "</s>"]
    for name, known in (("chat", text), ("other", ["<s>", "c", "e", "d"])):
        load_weights(live, ((tensor, aligned[name].read(tensor)) for tensor in aligned[name].tensors))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        old = {token: number for token, number in ids_of(sources[name]).items() if number < ROWS[name]}
        shared = sorted(old)
        with torch.inference_mode():
            mine = live.model(torch.tensor([[new[token] for token in known]])).logits[..., [new[t] for t in shared]]
            theirs = plain(torch.tensor([[old[token] for token in known]])).logits[..., [old[t] for t in shared]]
        torch.testing.assert_close(mine, theirs)


def test_nothing_asked_for_changes_nothing(sources: dict[str, Source]) -> None:
    aligned = align(sources, "base", Vocabulary())
    assert all(aligned[name] is source for name, source in sources.items())


def test_rows_that_stay_are_views_of_the_file(sources: dict[str, Source]) -> None:
    aligned = align(sources, "base", Vocabulary(kind="tokenizer"))
    assert aligned["base"].read(EMBEDDING).data_ptr() == sources["base"].read(EMBEDDING).data_ptr()
    assert aligned["base"].read(EMBEDDING).shape == (6, 16)
    name = "model.layers.0.mlp.up_proj.weight"
    assert aligned["chat"].read(name).data_ptr() == sources["chat"].read(name).data_ptr()


def test_gathered_rows_are_kept_but_not_sent_to_other_processes(sources: dict[str, Source]) -> None:
    chat = align(sources, "base", Vocabulary(kind="union"))["chat"]
    kept = chat.read(EMBEDDING)
    assert chat.read(EMBEDDING) is kept
    sent = pickle.dumps(chat)
    assert len(sent) < 100_000
    assert torch.equal(pickle.loads(sent).read(EMBEDDING), kept)


def test_a_row_taken_from_a_wider_source_is_that_row_exactly(tmp_path: Path) -> None:
    make(tmp_path, dtype=torch.bfloat16)
    save_model(tiny_config(vocab_size=ROWS["base"]), tmp_path / "base", dtype=torch.float32)
    save_words(tmp_path / "base", [*SPECIAL, *TOKENS["base"]])
    sources = opened(tmp_path)
    aligned = align(sources, "base", Vocabulary(kind="union", base="base"))
    assert torch.equal(aligned["chat"].read(EMBEDDING)[5], sources["base"].read(EMBEDDING)[5])
    assert torch.equal(aligned["chat"].read(EMBEDDING)[3], sources["chat"].read(EMBEDDING)[4].float())
    assert aligned["chat"].tensors[EMBEDDING].dtype == "BF16"  # which is what an export stores


def test_a_token_beyond_the_rows_is_one_that_the_source_lacks(root: Path, tmp_path: Path) -> None:
    save_model(tiny_config(vocab_size=5), tmp_path / "short", dtype=torch.float32)
    save_words(tmp_path / "short", [*SPECIAL, *TOKENS["base"]])
    sources = {**opened(root, "base"), **opened(tmp_path, "short")}
    aligned = align(sources, "short", Vocabulary(kind="tokenizer"))
    assert torch.equal(aligned["short"].read(EMBEDDING)[5], sources["base"].read(EMBEDDING)[5])


def test_configurations_speak_of_the_new_ids(tmp_path: Path) -> None:
    make(tmp_path)
    edit_json(tmp_path / "base" / "config.json", pad_token_id=7, eos_token_id=[2, 3])
    edit_json(tmp_path / "chat" / "config.json", pad_token_id=6, eos_token_id=5)
    aligned = align(opened(tmp_path), "base", Vocabulary(kind="tokenizer"))
    for source in aligned.values():
        config = source.config
        assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, [2, 3], 6)
        assert config["pad_token_id"] is None  # row 7 is gone


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "base": ({"kind": "union", "base": "bse"}, "no source 'bse'", "Did you mean 'base'"),
    "donor": ({"tokens": {"a": {"source": "chta"}}}, "no source 'chta'", "'chat'"),
    "donor lacks it": ({"tokens": {"e": {"source": "chat"}}}, "row of 'e' of chat", ""),
    "no such token": (
        {"tokens": {"a": {"source": {"kind": "model_token", "model": "chat", "token": "zzz"}}}}, "row of 'zzz'", "",
    ),
    "no such row": (
        {"tokens": {"a": {"source": {"kind": "model_token", "model": "chat", "token_id": 7}}}}, "has 7", "",
    ),
    "template": ({"chat_template": "chatlm"}, "no chat template 'chatlm'", "'chatml'"),
    "broken template": ({"chat_template": "{% for x in %}"}, "not a Jinja template", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(sources: dict[str, Source], case: str) -> None:
    asked, problem, hint = WRONG[case]
    with pytest.raises(InputError, match=problem) as caught:
        align(sources, "base", Vocabulary.model_validate(asked))
    assert caught.value.place.startswith("vocabulary")
    assert hint in caught.value.hint


# ---- tokenizers ----

TEXT = "the wanderer reads this text in the dark forest and the forest reads the wanderer"
OTHER_TEXT = "der Wanderer im dunklen Wald liest den Text und der Text liest den Wanderer"


def save_bpe(folder: Path, text: str, size: int, added: Sequence[str], **more: Any) -> None:
    made = Tokenizer(models.BPE(ignore_merges=more.pop("ignore_merges", False)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", **more)


def save_unigram(folder: Path, text: str, size: int, added: Sequence[str]) -> None:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save_pretrained(folder)


def save_pieces(kind: str, folder: Path, text: str, size: int, added: Sequence[str]) -> None:
    if kind == "unigram":
        save_unigram(folder, text, size, added)
    else:
        classes = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
        more: dict[str, Any] = {"tokenizer_class": classes[kind]} if kind in classes else {}
        save_bpe(folder, text, size, added, **more)


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "qwen2", "unigram"])
def test_the_united_tokenizer_cuts_texts_as_before(tmp_path: Path, kind: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, text, added in ((one, TEXT, ["<|a|>"]), (two, OTHER_TEXT, ["<|b|>", "<|a|>"])):
        save_model(tiny_config(vocab_size=400), folder)
        for file in folder.glob("*token*"):
            file.unlink()
        save_pieces(kind, folder, text, 290 if kind != "unigram" else 40, added)
    sources = opened(tmp_path, "one", "two")
    aligned = align(sources, "one", Vocabulary(kind="union"))
    before, other = (open_tokenizer(source) for source in sources.values())
    with tokenizer_folder(aligned["one"]) as folder:
        after = AutoTokenizer.from_pretrained(folder)
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert type(after) is type(before)
    assert set(after.get_vocab()) == set(before.get_vocab()) | set(other.get_vocab())
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert sorted(after.get_vocab().values()) == list(range(len(after.get_vocab())))
    assert raw.get_vocab() == after.get_vocab()
    for text in (TEXT, "reads <|a|> the", "wander!"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    assert after.convert_ids_to_tokens(after("the<|b|>dark")["input_ids"]).count("<|b|>") == 1
    assert after.decode([after.get_vocab()["<|b|>"]], skip_special_tokens=True) == ""
    assert len(aligned["one"].read(EMBEDDING)) == len(after.get_vocab()) == aligned["one"].config["vocab_size"]


def test_settings_of_added_tokens_stand_in_both_files(root: Path, tmp_path: Path) -> None:
    """Older versions of transformers take them from tokenizer_config.json."""
    save_model(tiny_config(vocab_size=8), tmp_path / "base", dtype=torch.float32)
    save_words(tmp_path / "base", [*SPECIAL, *TOKENS["base"]])
    first = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit_json(tmp_path / "base" / "tokenizer_config.json", added_tokens_decoder={"1": {**first, "special": True}})
    sources = {**opened(tmp_path, "base"), **opened(root, "chat")}
    texts = align(sources, "base", Vocabulary(kind="union"))["base"].tokenizer_texts
    decoder = json.loads(texts["tokenizer_config.json"])["added_tokens_decoder"]
    assert set(decoder) == {"1", "7"}
    assert decoder["7"] == {**first, "content": "<|im|>", "special": True}
    stored = json.loads(texts["tokenizer.json"])["added_tokens"]
    assert {"id": 7, **decoder["7"]} in stored


def test_a_piece_that_another_source_cuts_out_first_keeps_its_id(root: Path, tmp_path: Path) -> None:
    save_model(tiny_config(vocab_size=7), tmp_path / "base", dtype=torch.float32)
    save_words(tmp_path / "base", [*SPECIAL, "a", "<|im|>", "b", "c"])
    sources = {**opened(tmp_path, "base"), **opened(root, "chat")}
    aligned = align(sources, "base", Vocabulary(kind="union"))
    tokenizer = open_tokenizer(aligned["base"])
    assert tokenizer("a<|im|>b")["input_ids"] == [3, 4, 5]
    assert open_tokenizer(sources["base"])("a<|im|>b")["input_ids"] == [0]


def test_ids_that_a_tokenizer_leaves_out_are_left_out(root: Path, tmp_path: Path) -> None:
    folder = save_model(tiny_config(vocab_size=12), tmp_path / "base", dtype=torch.float32)
    save_words(folder, [*SPECIAL, *TOKENS["base"]])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 9
    (folder / "tokenizer.json").write_text(json.dumps(content))
    sources = {**opened(tmp_path, "base"), **opened(root, "chat")}
    aligned = align(sources, "base", Vocabulary(kind="union"))
    assert ids_of(aligned["base"]) == {
        **{token: number for number, token in enumerate([*SPECIAL, *TOKENS["base"]])}, "far": 9, "d": 10, "<|im|>": 11,
    }  # fmt: skip
    found = aligned["base"].read(EMBEDDING)
    named = found[[0, 1, 2, 3, 4, 5, 9, 10, 11]]
    assert torch.equal(found[9], sources["base"].read(EMBEDDING)[9])
    torch.testing.assert_close(found[6:9], named.mean(0).expand(3, -1))


def test_word_pieces_are_not_united(root: Path, tmp_path: Path) -> None:
    folder = save_model(tiny_config(vocab_size=6), tmp_path / "base", dtype=torch.float32)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *TOKENS["base"]])}
    content["model"] = {
        "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    }  # fmt: skip
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    sources = {**opened(tmp_path, "base"), **opened(root, "chat")}
    with pytest.raises(InputError, match="WordPiece") as caught:
        align(sources, "base", Vocabulary(kind="union"))
    assert caught.value.place == "sources.base"
    assert len(align(sources, "base", Vocabulary(kind="tokenizer"))["chat"].read(EMBEDDING)) == 6


# ---- chat templates ----

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
TALK = [*CHAT, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
# As their makers publish them: Meta, Mistral, LG, OpenAI's ChatML and Stanford's Alpaca.
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\nHi [/INST]",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
}
TALKED = {
    "mistral": "<s> [INST] Be kind.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
}


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("kind", ["same", "union"])
def test_chat_templates_by_name(sources: dict[str, Source], name: str, kind: str) -> None:
    aligned = align(sources, "base", Vocabulary.model_validate({"kind": kind, "chat_template": name}))
    tokenizer = open_tokenizer(aligned["base"])
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    if name in TALKED:
        assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == TALKED[name]
    if kind == "same":
        assert aligned["chat"] is sources["chat"]
        assert ids_of(aligned["base"]) == ids_of(sources["base"])
        assert tokenizer("a b c </s>")["input_ids"] == [3, 4, 5, 2]


def test_the_chat_template_that_most_sources_have(tmp_path: Path) -> None:
    make(tmp_path)
    common = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    edit_json(tmp_path / "base" / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    edit_json(tmp_path / "chat" / "tokenizer_config.json", chat_template=common)
    (tmp_path / "other" / "chat_template.jinja").write_text(common)
    asked = Vocabulary(chat_template="auto")
    tokenizer = open_tokenizer(align(opened(tmp_path), "base", asked)["base"])
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "[Be kind.][Hi]"
    tie = opened(tmp_path, "chat", "base")
    assert open_tokenizer(align(tie, "base", asked)["base"]).chat_template == "{{ messages[0].content }}"
    united = align(opened(tmp_path), "chat", Vocabulary(kind="union"))["chat"]
    assert open_tokenizer(united).chat_template == common


def test_no_source_has_a_chat_template(sources: dict[str, Source]) -> None:
    assert open_tokenizer(align(sources, "base", Vocabulary(chat_template="auto"))["base"]).chat_template is None


# ---- checks ----


def test_different_tokens_are_refused_unless_something_is_asked_for(sources: dict[str, Source]) -> None:
    with pytest.raises(InputError, match="differ in vocab_size: 7 and 8") as caught:
        check_compatible(sources)
    assert "vocabulary: {kind: union}" in caught.value.hint
    assert "tokenizer_source" in caught.value.hint
    asked = Vocabulary(kind="tokenizer")
    check_compatible(align(sources, "base", asked), same_tokens=False)
    rounded = align(sources, "base", Vocabulary(pad_to_multiple_of=8))  # of the same size, and other tokens
    with pytest.raises(InputError, match="differ in the tokenizer's vocabulary"):
        check_compatible(rounded)


def test_equal_tokens_padded_otherwise_are_the_same(root: Path, tmp_path: Path) -> None:
    save_model(tiny_config(vocab_size=16), tmp_path / "wide", dtype=torch.float32)
    save_words(tmp_path / "wide", [*SPECIAL, *TOKENS["base"]])
    sources = {**opened(root, "base"), **opened(tmp_path, "wide")}
    with pytest.raises(InputError, match="vocab_size: 16 and 8"):
        check_compatible(sources)
    aligned = align(sources, "base", Vocabulary(pad_to_multiple_of=8))
    check_compatible(aligned)
    assert torch.equal(aligned["wide"].read(HEAD)[:6], sources["wide"].read(HEAD)[:6])


def test_another_end_token_is_fine_once_a_tokenizer_is_chosen(root: Path, tmp_path: Path) -> None:
    for name, end in (("tuned", "c"), ("strange", "<end>")):
        save_model(tiny_config(vocab_size=8), tmp_path / name, dtype=torch.float32)
        save_words(tmp_path / name, [*SPECIAL, *TOKENS["base"]])
        edit_json(tmp_path / name / "tokenizer_config.json", eos_token=end)
    tuned = {**opened(root, "base"), **opened(tmp_path, "tuned")}
    with pytest.raises(InputError, match="differ in eos_token: c and </s>") as caught:
        check_compatible(tuned)
    assert "tokenizer: NAME" in caught.value.hint
    check_compatible(tuned, same_special=False)
    with pytest.raises(InputError, match="differ in eos_token: <end> and </s>"):
        check_compatible({**opened(root, "base"), **opened(tmp_path, "strange")}, same_special=False)


# ---- recipes ----


def recipe(**vocabulary: Any) -> StackRecipe:
    blend = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 0.5}})
    return StackRecipe.uniform(
        blend, sources={"a": "x/a", "b": "x/b"}, tokenizer="a", layers=2, vocabulary=Vocabulary(**vocabulary)
    )


def test_a_recipe_that_says_nothing_of_it_is_as_before() -> None:
    assert "vocabulary" not in recipe().canonical()
    assert recipe().vocabulary == Vocabulary()


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "union", "base": "a", "pad_to_multiple_of": 64},
        {"chat_template": "chatml"},
        {"tokens": {"x": {"source": "b"}, "a": {"source": {"kind": "zero"}, "force": True}}},
    ],
)
def test_recipes_hold_the_vocabulary(asked: dict[str, Any]) -> None:
    made = recipe(**asked)
    assert read_recipe(made.canonical(), made.sources) == made
    assert StackRecipe.model_validate(made.model_dump(mode="json", exclude_none=True)) == made
    assert made.hash != recipe().hash


def test_a_recipe_names_sources_that_exist() -> None:
    for asked in ({"base": "z"}, {"tokens": {"x": {"source": {"kind": "model_token", "model": "z", "token": "y"}}}}):
        with pytest.raises(ValidationError, match="unknown source 'z'"):
            recipe(**asked)
    for source in (
        {"kind": "model_token", "model": "a"},
        {"kind": "model_token", "model": "a", "token": "x", "token_id": 1},
    ):
        with pytest.raises(ValidationError, match="either token or token_id"):
            recipe(tokens={"x": {"source": source}})


# ---- merged models ----

UNION = """
merge_method: linear
base_model: base
models:
  - {model: base, parameters: {weight: 0.5}}
  - {model: chat, parameters: {weight: 0.3}}
  - {model: other, parameters: {weight: 0.2}}
tokenizer_source: union
chat_template: chatml
dtype: float32
"""


def test_a_mergekit_configuration_unites_vocabularies(root: Path, tmp_path: Path, sources: dict[str, Source]) -> None:
    for name in TOKENS:
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "union.yaml").write_text(UNION)
    merge(tmp_path / "union.yaml", tmp_path / "out")
    model, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    _, _, tokens, rows = GOLDEN["union"]
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(tokens.split())}
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED["chatml"]
    weights = {"base": 0.5, "chat": 0.3, "other": 0.2}
    for name in (EMBEDDING, HEAD):
        wanted = sum(weights[s] * rows_said(text, sources, name) for s, text in rows.items())
        torch.testing.assert_close(model.state_dict()[name], wanted)
    assert model.config.vocab_size == 9
    again = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert again["vocabulary"] == {"kind": "union", "base": "base", "tokens": {}, "chat_template": "chatml"}


def test_a_search_file_unites_vocabularies(root: Path) -> None:
    """What every worker opens, and what every candidate is made of."""
    content = {
        "name": "united",
        "sources": {name: str(root / name) for name in TOKENS},
        "base": "base",
        "vocabulary": {"kind": "union"},
        "space": {"kind": "parameter_space", "method": "task_arithmetic"},
        "objectives": {"maths": {"task": "mini_math_ja", "metric": "exact_match"}},
        "budget": {"candidates": 10},
    }
    file = parse_search_file(content, place="s.yaml", root=root)
    opened = open_sources(file)
    space = build_space(file, opened)
    materialiser, live = Materialiser(opened), live_model(opened["base"], torch.device("cpu"))
    for baseline in space.baselines():
        assert baseline.recipe.vocabulary == Vocabulary(kind="union", base="base")
        materialiser.write(baseline.recipe, live)
        if baseline.kind == "source":
            assert torch.equal(live.tensors[EMBEDDING], opened[baseline.label].read(EMBEDDING))
    with pytest.raises(InputError, match="there is no source 'z'"):
        parse_search_file({**content, "vocabulary": {"kind": "union", "base": "z"}}, place="s.yaml", root=root)
    with pytest.raises(InputError, match="differ in vocab_size"):
        open_sources(parse_search_file({**content, "vocabulary": {}}, place="s.yaml", root=root))
