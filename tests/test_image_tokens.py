"""Image tokens: computed once an item, with the same answers as by transformers alone, and never of another tower."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES
from helpers_tiers import nightly_but
from helpers_vision import COMMIT, VISION, image_inputs, save_vision
from helpers_vision import IMAGE as IMAGE_ID
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from evaluators.lm_eval import LmEvalSettings
from evaluators.scoring import score
from evaluators.tasks import miniatures
from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.inference import image_tokens as image_token_module
from evomerge.inference.generation import GREEDY
from evomerge.inference.image_tokens import ImageTokens, image_tokens
from evomerge.inference.media import Media
from evomerge.inference.nested import flat, joined, unflat
from evomerge.inference.pictures import held_media
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import Generate, Likelihood, LogLikelihood, Text, respond_to
from evomerge.inference.tower import fingerprint
from evomerge.inference.transformers_engine import TransformersEngine
from evomerge.merging.measured.evidence import Evidence

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NEW_TOKENS = 6
TEXTS = ("w1 <image> w2 w3", "w4 w5 w6 <image> w7", "w1 <image> w2", "<image> w9 w8", "w1 w2 w3")


class Processor:
    """What the processor of a family gives, with values that follow the picture's colour."""

    image_token = "<image>"

    def __init__(self, family: str, model: Any, tokenizer: Any) -> None:
        self._made, self._tokenizer = image_inputs(family, model), tokenizer
        self._asks_kinds = "token_type_ids" if family in ("gemma3", "paligemma") else "mm_token_type_ids"
        self._prefix = int(family == "paligemma")  # whose prompts are of one kind, and answers of another
        self._has_kinds = self._asks_kinds == "token_type_ids" or "mm_token_type_ids" in self._made

    def __call__(self, text: Sequence[str], images: Sequence[Sequence[Image.Image]], **_: Any) -> dict[str, Any]:
        ((image,),), before, after = images, *text[0].split("<image>")
        tokens = int((self._made["input_ids"] == IMAGE_ID).sum())
        encoded = [self._tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
        ids = torch.tensor([[*encoded[0], *[IMAGE_ID] * tokens, *encoded[1]]])
        shown = (ids == IMAGE_ID).int() * (1 - self._prefix)
        kinds = {self._asks_kinds: shown} if self._has_kinds else {}
        others = {n: v for n, v in self._made.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        others["pixel_values"] = others["pixel_values"] * (image.getpixel((0, 0))[0] / 100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **others}


@pytest.fixture(params=nightly_but(COMMIT, VISION))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def live(family: str, tmp_path: Path) -> LiveModel:
    source = open_source("sees", str(save_vision(family, tmp_path / family)), place="sources.sees")
    live = live_model(source, CPU)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    file = str(source.folder / "tokenizer.json")  # some families' own classes make another one of it
    live.tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", **names)
    processor = Processor(family, live.model, live.tokenizer)
    live.processor_of = lambda: processor
    return live


def prompts_of(live: LiveModel, texts: Sequence[str] = TEXTS, answer: str = "") -> list[Prompt]:
    """Prompts about pictures of one colour each; a text without a picture is one of text alone."""
    reader, prompts = Reader.of(live), []
    for number, text in enumerate(texts):
        media = (held_media(Image.new("RGB", (4, 4), (40 + 50 * number, 0, 0))),) if "<image>" in text else ()
        asked = reader.pair(text, answer, text, media) if answer else reader.prompt(text, NEW_TOKENS, text, media)
        prompts.append(asked)
    return prompts


def by_transformers(live: LiveModel, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What transformers is given of one prompt: pixels and all."""
    if not prompt.media:
        ids = torch.tensor([list(prompt.ids)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = live.processor_of()(text=[prompt.text], images=[[prompt.media[0].held]])  # type: ignore[misc]
    kind = int(live.model.config.model_type == "paligemma")
    more = torch.full((1, len(prompt.ids) - made["input_ids"].shape[1]), kind)  # of an answer
    return {name: torch.cat([v, more], 1) if "type" in name else v for name, v in made.items()}


def test_answers_are_those_of_transformers(live: LiveModel) -> None:
    prompts = prompts_of(live)
    found = respond_to(TransformersEngine(live), [Generate(prompt, NEW_TOKENS, batch_size=3) for prompt in prompts])
    for prompt, answer in zip(prompts, found, strict=True):
        inputs = by_transformers(live, prompt)
        with torch.inference_mode():
            tokens = live.model.generate(**inputs, max_new_tokens=NEW_TOKENS, pad_token_id=2, **GREEDY)[0]
        wanted = live.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == Text(wanted)
    colours = [Generate(p, NEW_TOKENS) for n in range(3) for p in prompts_of(live, ["w3"] * n + ["w1 <image> w2"])[n:]]
    logs = respond_to(TransformersEngine(live), [Likelihood(_with_answer(live, one.prompt)) for one in colours])
    assert len({log.log for log in logs if isinstance(log, LogLikelihood)}) == 3  # it looks


def _with_answer(live: LiveModel, prompt: Prompt) -> Prompt:
    return Reader.of(live).pair(prompt.text, " w5 w6", prompt.place, prompt.media)


def test_likelihoods_are_those_of_transformers(family: str, live: LiveModel) -> None:
    # PaliGemma has a text without pictures see itself whole where there is no padding, and not where there is.
    prompts = prompts_of(live, TEXTS[:-1] if family == "paligemma" else TEXTS, answer=" w5 w6")
    found = respond_to(TransformersEngine(live), [Likelihood(prompt) for prompt in prompts])
    for prompt, answer in zip(prompts, found, strict=True):
        inputs = by_transformers(live, prompt)
        inputs["input_ids"] = torch.tensor([list(prompt.ids)])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logs = live.model(**inputs, use_cache=False).logits[0, -3:-1].log_softmax(-1)
        wanted = logs.gather(1, torch.tensor(prompt.ids[-2:])[:, None]).sum().item()
        assert isinstance(answer, LogLikelihood)
        assert answer.log == pytest.approx(wanted, abs=2e-5)


def test_a_tower_runs_once_an_item(live: LiveModel) -> None:
    prompts = prompts_of(live)
    asked = [Generate(prompt, NEW_TOKENS) for prompt in prompts]
    tokens = image_tokens(live, None)
    first, again = (respond_to(TransformersEngine(live), asked) for _ in range(2))
    assert tokens.computed == 4
    assert first == again
    live.model.get_output_embeddings().weight.mul_(1.01)  # what a merge of language models writes
    respond_to(TransformersEngine(live), asked)
    assert tokens.computed == 4


# ---- the miniature ---------------------------------------------------------------------------------------------------


@cache
def miniature() -> LiveModel:
    source = open_source("vision", str(MINIATURES / "vision"), place="sources.vision")
    live = live_model(source, CPU, torch.float32)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    return live


@cache
def tasks(language: str) -> Any:
    return LmEvalSettings(task=f"mini_picture_{language}", batch_size=20).build()


def test_the_miniature_reads_pictures_and_answers_in_english() -> None:
    english = score(tasks("en"), miniature(), "held_out", range(30)).scores
    assert english["acc"].mean() > 0.9
    japanese = score(tasks("ja"), miniature(), "held_out", range(30)).scores
    assert japanese["acc"].mean() > 0.8
    assert japanese["acc_ja"].mean() == 0


def weights_of(live: LiveModel) -> Mapping[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in live.model.state_dict().items()}


def test_image_tokens_are_not_kept_for_another_tower() -> None:
    """One element of tower or projector is enough; a module that computes beside its weights is never trusted."""
    live, before = miniature(), weights_of(miniature())
    engine, tokens = TransformersEngine(live), image_tokens(miniature(), None)
    asked = tasks("en").requests(Reader.of(live), "search", range(3))
    told = fingerprint(live.model)
    respond_to(engine, asked)
    count = tokens.computed
    try:
        for name in ("model.vision_tower.encoder.layers.2.mlp.fc1.weight", "model.multi_modal_projector.linear_1.bias"):
            tensor = live.model.state_dict()[name].view(-1)
            tensor[5] += 1e-3
            assert fingerprint(live.model) != told
            respond_to(engine, asked)
            count += 3
            assert tokens.computed == count, name
            tensor[5] = before[name].view(-1)[5]
        assert fingerprint(live.model) == told
        hook = live.model.model.multi_modal_projector.linear_2.register_forward_hook(lambda module, given, out: out + 1)
        assert fingerprint(live.model) is None
        for _ in range(2):
            respond_to(engine, asked)
            count += 3
            assert tokens.computed == count
        hook.remove()
    finally:
        live.model.load_state_dict(before)


def test_pictures_that_nobody_has_looked_at_are_read_anew(tmp_path: Path) -> None:
    """A plug-in may name a file without a hash; two such files are not one picture."""
    live, prompts = miniature(), []
    tokens = image_tokens(live, None)
    for number, doc in enumerate(tasks("en")._items["search"].docs[:2]):
        miniatures.shown(doc)[0].save(tmp_path / f"{number}.png")
        media = (Media("image", tmp_path / f"{number}.png"),)
        prompts.append(Reader.of(live).prompt("Q:<image>\nA:", 24, "here", media))
    before = tokens.computed
    found = respond_to(TransformersEngine(live), [Generate(prompt, 24, ("\n",)) for prompt in prompts])
    assert found[0] != found[1]
    assert tokens.computed == before + 2


def test_elements_that_change_places_are_another_tower() -> None:
    live = miniature()
    weight = live.model.model.multi_modal_projector.linear_1.weight
    told, kept = fingerprint(live.model), weight.detach().clone()
    with torch.no_grad():
        weight[[3, 4]] = weight[[4, 3]]
        assert fingerprint(live.model) != told
        weight.copy_(kept)
    assert fingerprint(live.model) == told


def test_scores_are_the_same_with_and_without_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    live, items = miniature(), range(40)
    kept = score(tasks("ja"), live, "search", items)
    monkeypatch.setattr(ImageTokens, "of", ImageTokens._compute)
    anew = score(tasks("ja"), live, "search", items)
    assert anew.answers == kept.answers
    for metric, values in anew.scores.items():
        np.testing.assert_array_equal(values, kept.scores[metric])


def test_what_memory_has_no_room_for_goes_to_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = miniature()
    asked = tasks("en").requests(Reader.of(live), "search", range(4))
    wanted = respond_to(TransformersEngine(live), asked)
    monkeypatch.setattr(image_token_module, "MAX_BYTES", 1)
    monkeypatch.setattr(image_token_module, "_tokens", weakref.WeakKeyDictionary())
    evidence = Evidence(tmp_path, {"vision": "1"})
    engine, tokens = TransformersEngine(live, kept=evidence), image_tokens(live, evidence)
    for _ in range(3):
        assert respond_to(engine, asked) == wanted
    assert tokens.computed == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the first fits into what there is
    monkeypatch.setattr(image_token_module, "_tokens", weakref.WeakKeyDictionary())
    others = Evidence(tmp_path, {"vision": "1"})
    image_tokens(live, others)
    assert respond_to(TransformersEngine(live, kept=others), asked) == wanted
    assert image_tokens(live, others).computed == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [("Q: what?", "says <image> 0 times, and has 1 pictures"), ("<image> <image>", "says <image> 2 times")],
)
def test_pictures_that_the_text_does_not_name_are_refused(text: str, said: str) -> None:
    media = (held_media(Image.new("RGB", (60, 60))),)
    with pytest.raises(InputError, match=f"line 3: its prompt {said}"):
        Reader.of(miniature()).prompt(text, 8, "line 3", media)


def test_a_prompt_is_never_cut_into_its_picture() -> None:
    media = (held_media(Image.new("RGB", (60, 60))),)
    with pytest.raises(InputError, match="line 3: has 231 tokens with its pictures, and there is room for 226"):
        Reader.of(miniature()).prompt("<image>" + "Q:" * 102 + "?", 30, "line 3", media)


def test_beams_and_a_penalty_are_those_of_transformers() -> None:
    """The original work's decoding, with fewer beams."""
    live, task = miniature(), tasks("en")
    plain = AutoModelForImageTextToText.from_pretrained(MINIATURES / "vision", dtype=torch.float32).eval()
    processor = live.processor_of()  # type: ignore[misc]
    asked = [Generate(r.prompt, 20, ("\n",), 4, 3, 1.5) for r in task.requests(Reader.of(live), "search", range(4))]
    for request, answer in zip(asked, respond_to(TransformersEngine(live), asked), strict=True):
        text, picture = "<bos>" + request.prompt.text, request.prompt.media[0].held
        inputs = processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
        how = {"max_new_tokens": 20, "num_beams": 3, "repetition_penalty": 1.5, "do_sample": False}
        tokens = plain.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        assert isinstance(answer, Text)
        assert answer.text == live.tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]


def test_nested_lists_come_back_as_they_were() -> None:
    def parts(rows: int) -> Any:
        return {
            "a": [torch.ones(rows, 2), torch.zeros(1, 2)],
            "b": [[torch.ones(rows)], [torch.ones(2)]],
            "c": torch.ones(1, 3),
        }

    again = unflat(dict(flat(parts(3))))
    assert [t.shape for _, t in flat(again)] == [t.shape for _, t in flat(parts(3))]
    both = {name: joined([parts(1)[name], parts(2)[name]]) for name in "abc"}
    assert [len(both["a"]), len(both["b"]), [len(layer) for layer in both["b"]]] == [4, 2, [2, 2]]
    assert both["c"].shape == (2, 3)
