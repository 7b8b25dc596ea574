"""From an item to token ids, for every evaluator: special tokens, chat templates, worked examples, and what fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_lm_eval import write_lines, write_task
from helpers_miniature import MINIATURES, evomerge, search_file
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from evaluators import evaluator_settings
from evaluators.base import Evaluator, prompts_of
from evaluators.lm_eval_model import ResidentLM
from evaluators.prompts import Example, Examples, PromptSettings, chat_text, render
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.decoding import Decoder
from evomerge.inference.reading import Reader, encode, encode_whole
from evomerge.testing.models import byte_tokenizer, tiny_live

START, END = 1, 2
CHAT = (
    "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}me:{% endif %}"
)


def live_with(post: str | None, template: str | None = None) -> LiveModel:
    """A tiny model whose tokenizer puts special tokens around every text."""
    live = tiny_live()
    if post is not None:
        special = [("<s>", START), ("</s>", END), ("<pad>", 0)]
        live.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=post, pair=f"{post} $B", special_tokens=special
        )
    live.tokenizer.chat_template = template
    return live


def plain(live: LiveModel, text: str) -> list[int]:
    ids: list[int] = live.tokenizer.encode(text, add_special_tokens=False)
    return ids


POSTS = [(None, []), ("<s> $A", [START]), ("<s> $A </s>", [START]), ("<pad> <s> $A", [0, START]), ("$A </s>", [])]


@pytest.mark.parametrize(("post", "start"), POSTS)
def test_a_text_begins_once_and_does_not_end(post: str | None, start: list[int]) -> None:
    tokenizer = live_with(post).tokenizer
    body = tokenizer.encode("what?", add_special_tokens=False)
    assert encode(tokenizer, "what?") == start + body
    if start:  # a rendered chat prompt says its start itself
        assert encode(tokenizer, tokenizer.decode(start) + "what?") == start + body
    assert encode(tokenizer, "") == start
    assert encode(tokenizer, "what?</s>") == [*start, *body, END]  # what a text spells stays


def test_a_whole_text_ends_once() -> None:
    tokenizer = live_with("<s> $A </s>").tokenizer
    body = tokenizer.encode("what?", add_special_tokens=False)
    for text in ("what?", "<s>what?", "what?</s>", "<s>what?</s>"):
        assert encode_whole(tokenizer, text) == [START, *body, END]


# ---- every evaluator -------------------------------------------------------------------------------------------------

ITEMS = [
    {
        "prompt": f"what is {n} + {n * n}?", "question": f"what is {n} + {n * n}?", "answer": f"{n + n * n}",
        "choices": [f"{n + n * n}", f"{n + n * n + 1}", "none"],
    }
    for n in range(24)
]  # fmt: skip

FUNCTION = "def score(items, generate):\n    return [len(a) for a in generate([i['prompt'] for i in items], 4)]\n"

TASK = """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["!"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

KEYS: Mapping[str, Mapping[str, Any]] = {
    "likelihood": {"file": "items.jsonl", "answer": " {answer}"},
    "multiple_choice": {"file": "items.jsonl"},
    "rouge": {"file": "items.jsonl", "max_new_tokens": 4},
    "language": {"file": "items.jsonl", "language": "ja", "max_new_tokens": 4},
    "mgsm": {"file": "items.jsonl", "language": "en", "max_new_tokens": 4, "prompt": "{question}"},
    "python": {"items_file": "items.jsonl", "file": "f.py", "metrics": {"s": "maximize"}, "allow_task_code": True},
    "lm_eval": {"task": "sums", "search": "validation", "held_out": "test", "allow_task_code": True},
}


def evaluator_of(kind: str, folder: Path, **more: Any) -> Evaluator:
    """An evaluator of a kind on the items; paths are in the folder."""
    write_lines(folder / "items.jsonl", ITEMS)
    (folder / "f.py").write_text(FUNCTION)
    write_task(folder / "tasks", "sums", TASK, validation=ITEMS[:12], test=ITEMS[12:])
    keys: dict[str, Any] = {**KEYS[kind], **more}
    keys |= {key: folder / keys[key] for key in ("file", "items_file", "held_out_file") if key in keys}
    if kind == "lm_eval":
        keys["task_folders"] = (folder / "tasks",)
    return evaluator_settings(kind, "test").model_validate(keys).build()


def asked_tokens(evaluator: Evaluator, live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """All rows of tokens that a model sees in the first four items, without what it writes itself."""
    rows: list[list[int]] = []
    prompts: list[list[int]] = []
    forward, answering = live.model.forward, Decoder.__init__

    def seen(*args: Any, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs.get("attention_mask")
        for row, kept in zip(ids, torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :], strict=True):
            rows.append(row[kept.bool()].tolist())
        return forward(*args, **kwargs)

    def decoded(self: Decoder, model: Any, given: Any, *more: Any) -> None:
        prompts.extend(list(prompt) for prompt in given)
        answering(self, model, given, *more)

    monkeypatch.setattr(Decoder, "__init__", decoded)
    live.model.forward = seen
    score(evaluator, live, "search", range(4))
    return prompts or rows


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("chat", [False, True])
def test_no_evaluator_begins_twice_or_ends(
    kind: str, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_with("<s> $A </s>", CHAT)
    rows = asked_tokens(evaluator_of(kind, tmp_path, apply_chat_template=chat), live, monkeypatch)
    assert rows
    for row in rows:
        if chat:
            assert live.tokenizer.decode(row).startswith("<s>user: what is")
        assert row[0] == START
        assert START not in row[1:]
        assert row.count(END) == int(chat)  # that of the template


@pytest.mark.parametrize("kind", [kind for kind in KEYS if kind != "python"])
def test_system_instruction_examples_and_room(kind: str, tmp_path: Path) -> None:
    reader = Reader.of(live_with("<s> $A", CHAT))
    evaluator = evaluator_of(kind, tmp_path)
    (before, *_) = prompts_of(evaluator, reader, "search", 0)
    said = evaluator_of(kind, tmp_path, system_instruction="Be brief.")
    assert prompts_of(said, reader, "search", 0)[0].text.startswith("Be brief.")
    assert said.version != evaluator.version
    said = evaluator_of(kind, tmp_path, system_instruction="Be brief.", apply_chat_template=True)
    text = prompts_of(said, reader, "search", 0)[0].text
    assert text == f"<s>system: Be brief.</s>\nuser: {before.text}</s>\nme:"
    for chat in (False, True):
        shots = evaluator_of(kind, tmp_path, num_fewshot=2, apply_chat_template=chat)
        text = prompts_of(shots, reader, "search", 0)[0].text
        assert text.count("what is") == 3
        assert text.count(before.text) == 1
        assert text.count("</s>\nme:" if chat else "\n\n") == (1 if chat else 2)
    cut = prompts_of(evaluator_of(kind, tmp_path, max_length=12), reader, "search", 0)[0]
    assert cut.lost == len(cut.ids) - (13 if cut.scored else 8)
    assert cut.lost > 0


@pytest.mark.parametrize("kind", [kind for kind in KEYS if kind not in ("python", "lm_eval")])
def test_a_template_that_cannot_be_used_is_refused(kind: str, tmp_path: Path) -> None:
    for template, said in (
        (None, "has no chat template"),
        ("{{ raise_exception('no \x1b[2J system') }}", "no \\x1b[2J system"),
        ("{{ messages[7].content.x }}", "UndefinedError"),
    ):
        evaluator = evaluator_of(kind, tmp_path, apply_chat_template=True)
        with pytest.raises(InputError) as caught:
            score(evaluator, live_with("<s> $A", template), "search", [0])
        assert said in str(caught.value)


def test_answers_after_a_chat_are_as_likely_as_lm_eval_has_them(tmp_path: Path) -> None:
    live = live_with("<s> $A", CHAT)
    lm = ResidentLM(live.model, live.tokenizer, 1, None)
    evaluator = evaluator_of("likelihood", tmp_path, apply_chat_template=True, system_instruction="Add.")
    found = score(evaluator, live, "search", range(4)).scores["log_likelihood"]
    for index in range(4):
        question, answer = evaluator.items("search")[index].question, evaluator.items("search")[index].answer
        turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": question}]
        prompt = live.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        request = Instance("loglikelihood", {}, (prompt, answer.lstrip()), 0)
        ((log, _),) = lm.loglikelihood([request], disable_tqdm=True)
        np.testing.assert_allclose(found[index] * len(answer.lstrip()), log, rtol=1e-4)


def test_the_first_start_token_is_the_only_one_in_its_likelihood(tmp_path: Path) -> None:
    """By hand: log softmax over one start token, the prompt and the answer."""
    rows = [{"prompt": "<s>w5", "answer": "w8"}, {"prompt": "w6", "answer": "w9"}, {"prompt": "", "answer": "<s>w7"}]
    write_lines(tmp_path / "items.jsonl", rows)
    write_lines(tmp_path / "held.jsonl", [{"prompt": "x", "answer": "y"}])
    keys = {"file": tmp_path / "items.jsonl", "held_out_file": tmp_path / "held.jsonl"}
    evaluator = evaluator_settings("likelihood", "test").model_validate(keys).build()
    for post in ("<s> $A", "<s> $A </s>"):
        live = live_with(post)
        found = score(evaluator, live, "search", [0, 1, 2]).scores["log_likelihood"]
        for text, index, scored in (("w5w8", 0, 2), ("w6w9", 1, 2), ("w7", 2, 2)):
            ids = [START, *plain(live, text)]
            with torch.no_grad():
                logs = live.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            wanted = sum(logs[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids))) / scored
            np.testing.assert_allclose(found[index], wanted, rtol=1e-5)


def test_examples_never_are_the_item_itself() -> None:
    examples = Examples(2, [Example(f"q{n}", f"a{n}", str(n)) for n in range(5)], "file")
    assert [e.prompt for e in examples.of("4")] == ["q0", "q1"]
    assert [e.prompt for e in examples.of("0")] == ["q1", "q2"]
    with pytest.raises(InputError, match="num_fewshot: asks for 5 examples, and there are 5 items"):
        Examples(5, [Example("q", "a", str(n)) for n in range(5)], "file")


def test_a_chat_that_is_not_opened_ends_in_its_last_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is"}]
    assert chat_text(tokenizer, turns, opens=False) == "<s>user: 1 + 1?</s>\nassistant: It is"
    settings = PromptSettings(apply_chat_template=True)
    assert render(tokenizer, settings, "1?", [Example("2?", " 2 ", "x")]).count("assistant: 2</s>") == 1


def test_the_templates_of_sources_are_tried_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(MINIATURES / "maths", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ 'x' * 20000000000 }}"}))
    write_lines(tmp_path / "items.jsonl", ITEMS)
    objective = {
        **KEYS["likelihood"],
        "evaluator": "likelihood",
        "metric": "log_likelihood",
        "apply_chat_template": True,
    }
    sources = {"base": str(MINIATURES / "base"), "maths": str(model)}
    file = search_file(tmp_path, sources=sources, tokenizer="maths", objectives={"m": objective})
    assert evomerge("validate", file) == 2
    assert "sources.maths: its tokenizer cannot be used: MemoryError" in capsys.readouterr().err


# ---- what a search is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["search", "held_out"])
@pytest.mark.parametrize("kind", ["likelihood", "multiple_choice", "rouge", "mgsm", "lm_eval"])
def test_an_item_beyond_the_context_is_told_and_costs_itself(
    kind: str, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either split, before anything is scored, with its line; the search goes on to its winner."""
    long = dict(ITEMS[0], prompt="1 + " * 3000 + "0?", question="1 + " * 3000 + "0?")
    rows = {"search": ITEMS[:6], "held_out": ITEMS[9:15]}
    rows[split] = [*rows[split], long]
    for name in rows:
        write_lines(tmp_path / f"{name}.jsonl", rows[name])
    write_task(tmp_path / "tasks", "sums", TASK, validation=rows["search"], test=rows["held_out"])
    metric = {"likelihood": "log_likelihood", "multiple_choice": "margin", "rouge": "rouge_l", "mgsm": "acc_exact"}
    objective = {**KEYS[kind], "evaluator": kind, "metric": metric.get(kind, "exact_match")}
    if kind == "lm_eval":
        del objective["allow_task_code"]
        place = "row 6 of"
    else:
        objective |= {"file": "search.jsonl", "held_out_file": "held_out.jsonl"}
        place = f"{split}.jsonl, line 7 ("
    keys = {"task_folders": ["tasks"], "allow_task_code": True}
    file = search_file(
        tmp_path, objectives={"m": objective}, budget={"candidates": 6}, confirm={"top": 1}, pool="in_process", **keys
    )
    assert evomerge("validate", file) == 0
    said = capsys.readouterr().out
    assert "objectives.m: 1 item is too long" in said
    assert place in said
    assert "valid" in said
    if kind in ("likelihood", "lm_eval"):
        assert evomerge("search", file, "--dir", tmp_path / "out") == 0
        assert "winner" in capsys.readouterr().out


def test_an_answer_beyond_the_context_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "search.jsonl", ITEMS[:6])
    write_lines(tmp_path / "held_out.jsonl", [*ITEMS[9:12], {"prompt": "1?", "answer": "2 " * 3000}])
    objective = {
        "evaluator": "likelihood", "metric": "log_likelihood", "file": "search.jsonl",
        "held_out_file": "held_out.jsonl",
    }  # fmt: skip
    file = search_file(tmp_path, objectives={"m": objective})
    assert evomerge("validate", file) == 2
    assert "held_out.jsonl, line 4: its answer is" in capsys.readouterr().err


def test_items_that_repeat_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "items.jsonl", [*ITEMS, *ITEMS[:3]])
    objective = {"evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl"}
    file = search_file(tmp_path, objectives={"m": objective})
    assert evomerge("validate", file) == 0
    assert "items repeat another one" in capsys.readouterr().out


def test_prompts_and_answers_are_read_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "items.jsonl", [dict(item, prompt=f"{item['prompt']}\n\x1b[2J答:") for item in ITEMS])
    objectives = {
        "said": {"evaluator": "rouge", "metric": "rouge_l", "file": "items.jsonl", "max_new_tokens": 4},
        "likely": {"evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl", "num_fewshot": 1},
        "size": {"evaluator": "cost", "metric": "parameters"},
        "own": {
            "evaluator": "python", "file": "own.py", "function": "own", "metrics": {"own": "maximize"}, "metric": "own",
            "items_file": "items.jsonl", "system_instruction": "Be brief.",
        },
    }  # fmt: skip
    (tmp_path / "own.py").write_text(
        "def own(items, generate):\n"
        "    first = generate([f'Once more: {item[\"prompt\"]}' for item in items], 3)\n"
        "    return [float(len(generate([text], 2)[0])) for text in first]\n"
    )
    optimizer = {"name": "random"}
    file = search_file(
        tmp_path, objectives=objectives, budget={"candidates": 6}, optimizer=optimizer, confirm={"top": 1},
        allow_task_code=True,
    )  # fmt: skip
    assert evomerge("validate", file, "--show-prompt") == 0
    shown = capsys.readouterr().out
    assert "objectives.likely: " in shown
    assert "objectives.size: its prompts, if any" in shown
    assert shown.count("'<bos>'") == 3
    own = shown.partition("objectives.own: ")[2]
    assert "Be brief." in own
    assert "| Once more: " in own
    assert "| \\x1b[2J答:" in shown
    assert evomerge("search", file, "--dir", tmp_path / "out") == 0
    capsys.readouterr()
    for arguments, parts in {
        ("show", "c0001"): ("said, search split, the first of", "item 0: c0001", "asked  |", "prompt   |", "c0001  |"),
        ("show", "c0001", "--items"): ("item 3: c0001",),
        ("show", "c0001", "--prompt"): ("objectives.said: ", "tokens  1 '<bos>'", "c0001  |"),
        ("compare", "c0001", "c0002", "--items"): ("items differ", "c0002 "),
    }.items():
        command, *rest = arguments
        assert evomerge(command, tmp_path / "out", *rest) == 0
        text = capsys.readouterr().out
        assert all(part in text for part in parts), text
        assert "\x1b" not in text
    assert evomerge("compare", tmp_path / "out", "c0001", "c0002", "--items", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"objective", "split", "number", "text", "right", "answered", "pictures"} == set(found[0])
