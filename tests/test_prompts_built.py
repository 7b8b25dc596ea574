"""Models behind soft prompts and prefixes: live, exported and in peft they are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, in_own_memory, save_model, tiny_config
from helpers_prompts import prompted, save_encoded_prompt, save_prefix, save_prompt, save_started_prompt
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GraniteConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.inference.decoding import Decoder
from evomerge.inference.generation import Decoding, answer_groups
from evomerge.inference.prefill import log_likelihoods
from evomerge.inference.reading import Reader, encode
from evomerge.inference.requests import Likelihood
from evomerge.merging.building.builders import BuildContext
from evomerge.prompts.builder import PromptsBuilder
from evomerge.prompts.soft import Vocabulary, losing_rows, with_rows
from evomerge.recipes.prompts import PromptForm, PromptRun, PromptsRecipe

TEXT = "w3 w4 w5 w6 w7"
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "untied": tiny_config(max_position_embeddings=64),
    "tied": tiny_config(max_position_embeddings=64, tie_word_embeddings=True),
    "spare rows": tiny_config(max_position_embeddings=64, vocab_size=len(WORDS) + 3, tie_word_embeddings=True),
    "scaled in the embedding": Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=32),
    "scaled behind it": GraniteConfig(**SIZES, embedding_multiplier=3.0, tie_word_embeddings=True),
    "bias of the head": PhiConfig(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    above = tmp_path_factory.mktemp("models")
    made = {}
    for name, config in CONFIGS.items():
        made[name] = save_model(config, above / name, dtype=torch.float32)
        begin_with_bos(made[name])
    return made


@pytest.fixture(scope="module")
def base(bases: Mapping[str, Path]) -> Path:
    return bases["tied"]


def begin_with_bos(folder: Path, **settings: Any) -> None:
    """A tokenizer that puts <s> before every text, as Llama's does."""
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings).save_pretrained(folder)


def opened(base: Path, **prompts: Path) -> dict[str, Source]:
    references = {"base": str(base), **{name: f"{base}+{folder}" for name, folder in prompts.items()}}
    return {name: open_source(name, said, place=f"sources.{name}", prompts=True) for name, said in references.items()}


def recipe_of(sources: Mapping[str, Source], *runs: PromptRun, form: PromptForm = "tokens") -> PromptsRecipe:
    references = {name: source.reference for name, source in sources.items()}
    return PromptsRecipe(sources=references, tokenizer="base", base="base", form=form, runs=runs)


def whole(name: str, rows: int = 4) -> PromptRun:
    return PromptRun(weights={name: 1.0}, first=0, rows=rows)


def builder_of(sources: Mapping[str, Source]) -> PromptsBuilder:
    return PromptsBuilder(BuildContext(sources, "base"))


@torch.inference_mode()
def logits(live: LiveModel, text: str = TEXT) -> torch.Tensor:
    """Of a text alone in its batch: [tokens, vocabulary]."""
    found: torch.Tensor = live.model(torch.tensor([encode(live.tokenizer, text)])).logits[0]
    return found


@torch.inference_mode()
def reference(base: Path, folder: Path, text: str = TEXT) -> torch.Tensor:
    """What peft makes of it: the logits of the text's own tokens."""
    model, ids = prompted(base, folder), AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    in_own_memory(model)
    found: torch.Tensor = model(torch.tensor([ids])).logits[0, -len(ids) :]
    return found


# ---- soft prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_live_export_and_peft_compute_the_same(bases: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    base = bases[name]
    sources = opened(base, one=save_encoded_prompt(base, tmp_path / "one"))
    recipe, builder = recipe_of(sources, whole("one")), builder_of(sources)
    builder.export(recipe, tmp_path / "out", texts={"README.md": "made"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert ids == [*range(32, 36), 1, 6, 7, 8, 9, 10]
    with torch.inference_mode():
        exported = in_own_memory(plain)(torch.tensor([ids])).logits[0]
    live = logits(builder.write(recipe))
    assert torch.equal(live, exported)
    expected = reference(base, tmp_path / "one")
    ours = exported[4:, :32]
    if name == "scaled in the embedding":  # rows are divided by what multiplies them again, which rounds
        torch.testing.assert_close(ours, expected[:, :32], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, expected[:, :32])
    assert not torch.allclose(expected, reference_alone(base), atol=1e-2)  # the prompt says something
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == ids[:4]


@torch.inference_mode()
def reference_alone(base: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    found: torch.Tensor = model(torch.tensor([AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]])).logits[0]
    return found


def test_nothing_before_a_text_changes_nothing(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_prompt(base, tmp_path / "one"), prefix=save_prefix(base, tmp_path / "prefix"))
    builder = builder_of(sources)
    alone = reference_alone(base)
    for form in ("tokens", "prefix"):
        assert torch.equal(logits(builder.write(recipe_of(sources, form=form))), alone)
        builder.write(recipe_of(sources, whole("one" if form == "tokens" else "prefix"), form=form))
    assert torch.equal(logits(builder.write(recipe_of(sources))), alone)  # and what stood there is gone
    builder.export(recipe_of(sources), tmp_path / "out", texts={})
    assert torch.equal(logits(builder.reload(tmp_path / "out")), alone)


@pytest.mark.parametrize("seed", range(4))
def test_new_tokens_lose_whatever_the_hidden_state_is(seed: int) -> None:
    """Also where all other logits are below zero, or the head's rows are nearly one."""
    made = torch.Generator().manual_seed(seed)
    own = Vocabulary(
        torch.randn(40, 8, generator=made),
        torch.randn(8, generator=made) * (seed % 2) * 10 + torch.randn(40, 8, generator=made) * 10.0 ** -(seed // 2),
        None if seed < 2 else torch.randn(40, generator=made) - 50,
    )
    longer = with_rows(own, torch.randn(6, 8, generator=made), 40, losing_rows(own, 40))
    states = torch.randn(2000, 8, generator=made)
    found = states @ longer.head.T + (0 if longer.bias is None else longer.bias)
    assert found.shape == (2000, 46)
    assert int(found.argmax(dim=1).max()) < 40
    torch.testing.assert_close(
        found[:, 40:], found[:, :40].mean(dim=1, keepdim=True).expand(-1, 6), rtol=1e-3, atol=1e-3
    )


def test_new_tokens_are_never_said(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_prompt(base, tmp_path / "one"))
    live = builder_of(sources).write(recipe_of(sources, whole("one")))
    prompts = [encode(live.tokenizer, f"w{i % 29} w{i // 29} w{i * 7 % 29}") for i in range(500)]
    decoder = Decoder(live.model, prompts, 8, frozenset(), lambda answers: [False] * len(answers))
    decoder.run(256)
    said = {token for answer in decoder.answers for token in answer}
    assert len(said) > 3
    assert max(said) < len(WORDS)
    assert all(len(answer) == 8 for answer in decoder.answers)


def test_concatenation_is_what_stands_one_after_the_other(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_prompt(base, tmp_path / "one"), two=save_prompt(base, tmp_path / "two", seed=1))
    part = PromptRun(weights={"two": 1.0}, first=1, rows=2)
    live = builder_of(sources).write(recipe_of(sources, whole("one"), part))
    rows = torch.cat([sources["one"].prompt.read(), sources["two"].prompt.read()[1:3]])  # type: ignore[union-attr]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    with torch.inference_mode():
        embedded = torch.cat([rows, model.get_input_embeddings()(torch.tensor(ids))])[None]
        expected = model(inputs_embeds=embedded).logits[0]
    assert torch.equal(logits(live)[:, :32], expected)
    assert not torch.allclose(logits(live)[6:, :32], reference(base, tmp_path / "one"), atol=1e-3)


def test_rows_are_mixed_from_where_they_began(base: Path, tmp_path: Path) -> None:
    folders = {
        name: save_started_prompt(base, tmp_path / name, rows=5, seed=seed, text="w1 w2 w3")
        for seed, name in enumerate(("one", "two"))
    }
    sources = opened(base, **folders)
    weights = {"one": 0.7, "two": -0.2}
    live = builder_of(sources).write(recipe_of(sources, PromptRun(weights=weights, first=1, rows=3)))
    table = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach()
    # Of <s> w1 w2 w3 <s>, the second to the fourth.
    start = table[[WORDS.index(word) for word in ("w1", "w2", "w3")]]
    one, two = (sources[name].prompt.read()[1:4] for name in ("one", "two"))  # type: ignore[union-attr]
    expected = start + 0.7 * (one - start) - 0.2 * (two - start)
    stored = live.model.get_input_embeddings().weight[32:35]
    torch.testing.assert_close(stored.detach(), expected, rtol=1e-6, atol=1e-6)
    mean = builder_of(sources).write(recipe_of(sources, PromptRun(weights={"one": 0.5, "two": 0.5}, first=1, rows=3)))
    stored = mean.model.get_input_embeddings().weight[32:35]
    torch.testing.assert_close(stored.detach(), (one + two) / 2, rtol=1e-6, atol=1e-6)


def test_where_a_prompt_began_is_where_peft_begins_it(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_started_prompt(base, tmp_path / "one", rows=6, text="w1 w2 w3"))
    import peft

    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, prompt_tuning_init="TEXT", prompt_tuning_init_text="w1 w2 w3",
        tokenizer_name_or_path=str(base),
    )  # fmt: skip
    fresh = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = fresh.get_prompt(1)[0].detach()
    assert torch.equal(builder_of(sources)._started("w1 w2 w3", 6), expected)


# ---- prefixes --------------------------------------------------------------------------------------------------------

PREFIXED = ("untied", "tied", "scaled in the embedding", "scaled behind it", "bias of the head")


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_is_what_peft_makes_of_it(bases: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    base = bases[name]
    sources = opened(base, one=save_prefix(base, tmp_path / "one"))
    recipe, builder = recipe_of(sources, whole("one"), form="prefix"), builder_of(sources)
    live = logits(builder.write(recipe))
    expected = reference(base, tmp_path / "one")
    assert torch.equal(live[4:], expected)
    assert not live[:4].any()
    assert not torch.allclose(expected, reference_alone(base), atol=1e-3)
    builder.export(recipe, tmp_path / "out", texts={"README.md": "made"})
    assert torch.equal(reference(base, tmp_path / "out"), expected)
    assert recipe.rounds_on_export


def test_the_order_of_a_prefix_is_nothing(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_prefix(base, tmp_path / "one"), two=save_prefix(base, tmp_path / "two", seed=1))
    builder = builder_of(sources)
    rows = [PromptRun(weights={name: 1.0}, first=n, rows=1) for name in ("one", "two") for n in range(4)]
    there = logits(builder.write(recipe_of(sources, *rows, form="prefix")))
    back = logits(builder.write(recipe_of(sources, *reversed(rows), form="prefix")))
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6)
    alone = logits(builder.write(recipe_of(sources, *rows[:4], form="prefix")))
    assert not torch.allclose(there[8:], alone[4:], atol=1e-3)


def test_an_exported_prefix_answers_in_peft_as_it_did(base: Path, tmp_path: Path) -> None:
    sources = opened(base, one=save_prefix(base, tmp_path / "one"))
    recipe, builder = recipe_of(sources, whole("one"), form="prefix"), builder_of(sources)
    live = builder.write(recipe)
    builder.export(recipe, tmp_path / "out", texts={})
    again = builder.reload(tmp_path / "out")
    texts = [f"w{i} w{i + 3} w{i + 5}"[: 5 + 3 * (i % 2)] for i in range(12)]
    assert answers(live, texts) == answers(again, texts)
    torch.testing.assert_close(likely(live, texts), likely(again, texts), rtol=1e-5, atol=1e-5)


# ---- both ------------------------------------------------------------------------------------------------------------


def answers(live: LiveModel, texts: list[str]) -> list[str]:
    prompts = [encode(live.tokenizer, text) for text in texts]
    return answer_groups(live, [prompts], Decoding(6), lambda rows: None)[0]


def likely(live: LiveModel, texts: list[str]) -> torch.Tensor:
    reader = Reader.of(live)
    pairs = [reader.pair(text, " w9 w10", "item") for text in texts]
    return torch.tensor([found.log for found in log_likelihoods(live, [Likelihood(pair) for pair in pairs])])


@torch.inference_mode()
def one_by_one(live: LiveModel, text: str) -> tuple[str, float]:
    """The greedy answer and log p of an answer, without padding, a batch or a cache."""
    ids = encode(live.tokenizer, text)
    for _ in range(6):
        token = int(live.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == 2:
            break
    said = live.tokenizer.decode(ids[len(encode(live.tokenizer, text)) :], skip_special_tokens=True)
    pair = encode(live.tokenizer, f"{text} w9 w10")
    logs = live.model(torch.tensor([pair])).logits[0].float().log_softmax(-1)
    return said, float(logs[-3, pair[-2]] + logs[-2, pair[-1]])


@pytest.mark.parametrize("form", ["tokens", "prefix"])
def test_padding_batches_and_the_cache_change_nothing(base: Path, tmp_path: Path, form: PromptForm) -> None:
    save = save_prompt if form == "tokens" else save_prefix
    sources = opened(base, one=save(base, tmp_path / "one"))
    live = builder_of(sources).write(recipe_of(sources, whole("one"), form=form))
    texts = [" ".join(f"w{(i * k) % 29}" for k in range(1, 2 + i % 5)) for i in range(1, 11)]
    alone = [one_by_one(live, text) for text in texts]
    assert answers(live, texts) == [said for said, _ in alone]
    torch.testing.assert_close(likely(live, texts), torch.tensor([log for _, log in alone]), rtol=1e-5, atol=1e-5)
    # And in transformers' own loop, which pads on the left and counts positions by the mask.
    rows = [encode(live.tokenizer, text) for text in texts]
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    said = live.model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    texts_said = [live.tokenizer.decode(ids, skip_special_tokens=True) for ids in said[:, width:].tolist()]
    assert texts_said == [said for said, _ in alone]


def test_texts_of_chats_begin_with_the_prompt_once(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    turns = [{"role": "user", "content": "w3 w4"}]
    for said, begins in (("{{ bos_token }} ", [1]), ("", [1])):
        save_model(CONFIGS["tied"], folder, dtype=torch.float32)
        begin_with_bos(folder, chat_template=said + "{% for m in messages %}w9 {{ m.content }}{% endfor %}")
        sources = opened(folder, one=save_prompt(folder, tmp_path / "one"))
        builder = builder_of(sources)
        live = builder.write(recipe_of(sources, whole("one")))
        text = live.tokenizer.apply_chat_template(turns, tokenize=False)
        wanted = [32, 33, 34, 35, *begins, 12, 6, 7]
        assert encode(live.tokenizer, text) == wanted
        assert live.tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"] == wanted
        assert live.tokenizer.decode(wanted, skip_special_tokens=True) == "w9 w3 w4"


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(), "sequence", "bert"])
def test_whatever_a_tokenizer_puts_before_texts(tmp_path: Path, processor: Any) -> None:
    base = save_model(CONFIGS["tied"], tmp_path / "base", dtype=torch.float32)
    backend: Tokenizer = AutoTokenizer.from_pretrained(base).backend_tokenizer
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    kinds: dict[Any, Any] = {
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
        "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    }
    backend.post_processor = kinds.get(processor, processor) if processor is not None else None  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(base)
    sources = opened(base, one=save_prompt(base, tmp_path / "one"))
    if processor == "bert":
        with pytest.raises(InputError, match="BertProcessing"):
            builder_of(sources).write(recipe_of(sources, whole("one")))
        return
    live = builder_of(sources).write(recipe_of(sources, whole("one")))
    begins = [1] if processor == "sequence" else []
    assert encode(live.tokenizer, "w3 w4") == [32, 33, 34, 35, *begins, 6, 7]


def test_recipes_that_cannot_be_are_refused(base: Path, bases: Mapping[str, Path], tmp_path: Path) -> None:
    other = save_prompt(bases["untied"], tmp_path / "other")
    sources = opened(base, one=save_prompt(base, tmp_path / "one"), prefix=save_prefix(base, tmp_path / "prefix"))
    sources |= {"started": opened(base, started=save_started_prompt(base, tmp_path / "started"))["started"]}
    sources["other"] = open_source("other", f"{bases['untied']}+{other}", place="sources.other", prompts=True)
    check = PromptsBuilder.check
    wrong: dict[str, PromptsRecipe] = {
        "which has no prompt": recipe_of(sources, whole("base")),
        "is of tokens, and prefix is": recipe_of(sources, whole("prefix")),
        "is a prompt of": recipe_of(sources, whole("other")),
        "takes 5 rows of one, which has 4": recipe_of(sources, whole("one", 5)),
        "did not begin as one text": recipe_of(
            sources, PromptRun(weights={"one": 0.5, "started": 0.5}, first=0, rows=4)
        ),
        "has 36 rows": recipe_of(sources, *[whole("one")] * 9),
    }
    for words, recipe in wrong.items():
        with pytest.raises(InputError, match=words) as caught:
            check(recipe, sources)
        assert caught.value.place.startswith("recipe.")
    with pytest.raises(ValueError, match="mixes rows of prefixes"):
        recipe_of(sources, PromptRun(weights={"prefix": 0.5}, first=0, rows=4), form="prefix")
    with pytest.raises(InputError, match="Take `engine: transformers`"):
        PromptsBuilder(BuildContext(sources, "base", engine=lambda live: None)).start()  # type: ignore[arg-type, return-value]


def test_runs_that_go_on_are_one() -> None:
    runs = [PromptRun(weights={"one": 1.0}, first=n, rows=2) for n in (0, 2, 6)]
    assert PromptsRecipe.joined(tuple(runs)) == (whole("one", 4), runs[2])
