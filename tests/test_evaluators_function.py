"""A person's own function as an evaluator: the README's example, the contract, and faults with their file and line."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
import yaml
from helpers_miniature import ROOT, evomerge, json_of, search_file
from PIL import Image

from evaluators import function
from evaluators.base import EvaluatorSettings
from evaluators.function import FunctionEvaluator, FunctionSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.commands.driving import open_all
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.inference.transformers_engine import generate
from evomerge.search.settings.search_file import load_search_file
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = [{"prompt": f"{'so ' * (n % 5)}what is {n} + {n * n}?", "letters": n % 7, "more": [n]} for n in range(24)]

LETTERS = """\
def score(items, generate):
    answers = generate([item["prompt"] for item in items], max_new_tokens=6)
    return [len(answer) + sum(map(ord, answer)) % 97 / 97 for answer in answers]
"""


def given(folder: Path, code: str = LETTERS, **changes: Any) -> FunctionSettings:
    """Settings with the code and the items in files."""
    (folder / "my_score.py").write_text(code)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    keys = {
        "file": folder / "my_score.py",
        "items_file": folder / "items.jsonl",
        "metrics": {"letters": "maximize"},
        "allow_task_code": True,
    }
    return FunctionSettings.model_validate(keys | changes)


def refusal(settings: FunctionSettings) -> str:
    with pytest.raises(InputError) as caught:
        settings.build()
    return str(caught.value)


def fault(folder: Path, code: str, **changes: Any) -> str:
    """What is said when a function is loaded, but fails on items."""
    evaluator = given(folder, code, **changes).build()
    with pytest.raises(InputError) as caught:
        score(evaluator, tiny_live(), "search", [0, 1, 2])
    return str(caught.value)


def readme() -> tuple[str, dict[str, Any]]:
    """The function in the README, of at most 20 lines, and the part of a search file beside it."""
    text = (ROOT / "evaluators" / "README.md").read_text()
    section = re.split(r"^## ", text.split("## A function of your own\n")[1], flags=re.MULTILINE)[0]
    code, keys = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    assert len(code) == len(keys) == 1
    assert code[0].count("\n") <= 20
    return code[0], yaml.safe_load(keys[0])


class TestContract(EvaluatorContract):
    changes: ClassVar[dict[str, object]] = {"metrics": {"letters": "minimize"}}

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return given(tmp_path)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


class TestReadme(EvaluatorContract):
    """The function of the README, with the objective beside it."""

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        code, content = readme()
        objective = content["objectives"]["politeness"]
        assert objective.pop("evaluator") == "python"
        assert objective.pop("metric") in objective["metrics"]
        paths = {key: tmp_path / objective.pop(key) for key in ("file", "items_file")}
        settings = given(tmp_path, code, **objective, allow_task_code=content["allow_task_code"])
        assert paths == {"file": settings.file, "items_file": settings.items_file}
        return settings

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()

    def test_its_numbers(self, evaluator: FunctionEvaluator, live: LiveModel) -> None:
        items = [item.fields for item in evaluator._lines["search"]]
        found = score(evaluator, live, "search", range(len(items))).scores
        answers = generate(live, [item["prompt"] for item in items], 32, ["\n"], 16)
        wanted = [abs(len(answer) - item["letters"]) for item, answer in zip(items, answers, strict=True)]
        assert found["miss"].tolist() == wanted
        assert evaluator.metrics == {"polite": True, "miss": False}


# ---- what a function gets and gives ----------------------------------------------------------------------------------


def test_items_are_whole_and_each_time_new(tmp_path: Path) -> None:
    code = """\
def score(items, generate):
    sums = [item["letters"] + sum(item["more"]) for item in items]
    for item in items:
        item["letters"] = 100
        item["more"].append(100)
    return sums
"""
    evaluator = given(tmp_path, code).build()
    fields = [item.fields for item in evaluator._lines["search"]]
    wanted = [item["letters"] + item["more"][0] for item in ITEMS if item in fields]
    for _ in range(2):
        assert score(evaluator, tiny_live(), "search", range(len(fields))).scores["letters"].tolist() == wanted


def test_every_item_is_in_one_split_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    settings = given(tmp_path)
    evaluator = settings.build()
    both = [*evaluator.items("search"), *evaluator.items("held_out")]
    assert len(set(both)) == len(both) == len(ITEMS)
    settings.items_file.write_text("".join(json.dumps(dict(reversed(i.items()))) + "\n" for i in reversed(ITEMS)))
    turned = settings.build()
    assert {item.id for item in turned.items("held_out")} == {item.id for item in evaluator.items("held_out")}


def test_kinds_of_numbers(tmp_path: Path) -> None:
    code = """\
import numpy as np
from fractions import Fraction
def score(items, generate):
    return {"a": [True, 2**70, Fraction(1, 2)], "b": np.array([1.5, 2.5, -3]), "c": np.array([True, False, True])}
"""
    metrics = dict.fromkeys("abc", "minimize")
    found = score(given(tmp_path, code, metrics=metrics).build(), tiny_live(), "search", [0, 1, 2]).scores
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [1.0, 2.0**70, 0.5], "b": [1.5, 2.5, -3.0], "c": [1.0, 0.0, 1.0],
    }  # fmt: skip


def test_generate_takes_stops_and_counts_its_time(tmp_path: Path) -> None:
    code = """\
def score(items, generate):
    prompts = [item["prompt"] for item in items]
    whole = generate(prompts, 8)
    cut = generate(tuple(prompts), stop=[whole[0][2]], max_new_tokens=8)
    return [float(c == w.split(whole[0][2])[0]) for c, w in zip(cut, whole)]
"""
    evaluator = given(tmp_path, code, batch_size=4).build()
    graded = score(evaluator, tiny_live(), "search", [0, 1, 2, 3, 4])
    assert graded.scores["letters"].tolist() == [1.0] * 5
    assert graded.seconds.keys() == {"generate", "score"}
    assert graded.seconds["generate"] > 0
    assert score(evaluator, tiny_live(), "search", []).seconds == {}


def test_what_it_prints_is_no_output_of_the_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('loaded')\ndef score(items, generate):\n    print('scored')\n    return [1] * len(items)\n"
    score(given(tmp_path, code).build(), tiny_live(), "search", [0])
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "loaded\nscored\n"


def test_the_file_may_hold_what_python_files_hold(tmp_path: Path) -> None:
    code = """\
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Answer:
    text: str
def good(items, generate):
    return [len(Answer(item["prompt"]).text) for item in items]
"""
    evaluator = given(tmp_path, code, function="good").build()
    prompts = [item.fields["prompt"] for item in evaluator._lines["search"]]
    assert score(evaluator, tiny_live(), "search", [1, 0]).scores["letters"].tolist() == [
        len(prompts[1]),
        len(prompts[0]),
    ]


def test_the_version_is_of_code_items_and_settings(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = given(tmp_path).build().version
    assert given(elsewhere).build().version == first
    others = [
        given(tmp_path, LETTERS + "# other\n").build().version,
        given(tmp_path, held_out=0.3).build().version,
        given(tmp_path, metrics={"letters": "minimize"}).build().version,
        given(tmp_path, LETTERS.replace("def score", "def other"), function="other").build().version,
    ]
    settings = given(tmp_path)
    settings.items_file.write_text(settings.items_file.read_text().replace('"letters": 3', '"letters": 4'))
    assert len({first, *others, settings.build().version}) == 6


# ---- what it asks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ("return [len(a) for a in generate(['Q: ' + i['prompt'] for i in items], 5)]", ["Q: {prompt}"]),
        ("a = generate([items[0]['prompt']], 2)\n    return [len(generate([a[0] + 'x'], 2))]", ["{prompt}"]),
        ("generate([], 2)\n    generate(['a', 'b'], 2)\n    return [1]", ["a", "b"]),
        ("return [1 / len(generate([items[0]['prompt']], 2)[0])]", ["{prompt}"]),  # fails on an empty answer
        ("return [1]", []),
    ],
)
def test_the_first_prompts_are_those_that_it_sends_for_the_first_item(
    tmp_path: Path, body: str, prompts: list[str]
) -> None:
    evaluator = given(tmp_path, f"def score(items, generate):\n    {body}\n").build()
    first = json.loads(evaluator.items("search")[0].question)["prompt"]
    asked = evaluator.first_prompts(Reader(tiny_live().tokenizer, None))
    assert [prompt.text for prompt in asked] == [text.format(prompt=first) for text in prompts]
    assert {prompt.place for prompt in asked} <= {evaluator.items("search")[0].place}


@pytest.mark.parametrize(
    ("body", "said"), [("while True: pass", "took more than 1 s"), ("raise ValueError('no')", "line 2: score failed")]
)
def test_a_function_that_asks_nothing_and_does_not_end_well_shows_no_prompts(
    tmp_path: Path, body: str, said: str
) -> None:
    evaluator = given(tmp_path, f"def score(items, generate):\n    {body}\n", max_seconds=1).build()
    with pytest.raises(InputError, match=said):
        evaluator.first_prompts(Reader(tiny_live().tokenizer, None))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_runs_without_consent(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    said = refusal(given(tmp_path, f"open({str(ran)!r}, 'w')\n", allow_task_code=False))
    assert "file: names my_score.py, which is code" in said
    assert "`allow_task_code: true`" in said
    assert not ran.exists()


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "my_score.py"
    assert f"{tmp_path / 'none.py'}: there is no such file" in refusal(given(tmp_path, file=tmp_path / "none.py"))
    assert f"{file}, line 2: is not Python" in refusal(given(tmp_path, "x = 1\ndef score(items:\n"))
    said = refusal(given(tmp_path, "def f():\n    return 1 / 0\n\nf()\n"))
    assert f"{file}, line 2: failed when it was loaded (ZeroDivisionError: division by zero)" in said
    said = refusal(given(tmp_path, "import json\n\njson.loads('{')\n"))
    assert f"{file}, line 3: failed when it was loaded (JSONDecodeError" in said  # where the person can look
    said = refusal(given(tmp_path, "def scores(items, generate): pass\n"))
    assert f"{file}: has no function 'score'; it has: scores. Name one as `function:`" in said
    assert "null bytes" in refusal(given(tmp_path, "x = 1\0\n"))


def test_a_fault_is_told_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "my_score.py"
    code = "def one(item):\n    return item['lettres']\n\ndef score(items, generate):\n    return [*map(one, items)]\n"
    assert f"{file}, line 2: score failed (KeyError: 'lettres')" in fault(tmp_path, code)
    code = "def score(items, generate):\n    return generate('a text')\n"
    assert f"{file}, line 2: score failed (TypeError: generate takes prompts as a list" in fault(tmp_path, code)
    assert "score failed (TypeError" in fault(tmp_path, "def score(items): pass\n")


def test_the_models_own_faults_are_not_the_functions(tmp_path: Path) -> None:
    live = tiny_live()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    live.model.forward = full
    evaluator = given(tmp_path).build()
    with pytest.raises(torch.OutOfMemoryError):
        score(evaluator, live, "search", [0])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "letters: returned NoneType, not a number for each item"),
        ("1.0", "letters: returned float, not a number for each item"),
        ("[1.0]", "letters: returned 1 numbers for 3 items"),
        ("[1, 'a', 2]", "letters: returned 'a' for {items}, line 3"),
        ("[1, 2, float('nan')]", "letters: returned nan for {items}, line 4"),
        ("[1e39, 1, 1]", "letters: returned 1e+39 for {items}, line 2"),
        ("[1, 10**400, 1]", "letters: returned 1000"),
        ("{}", "returned no metric, where letters is declared"),
        ("{'letters': [1, 2, 3], 'b': [1, 2, 3]}", "returned letters, b, where letters is declared"),
    ],
)
def test_anything_but_numbers(tmp_path: Path, returned: str, said: str) -> None:
    code = f"def score(items, generate):\n    return {returned}\n"
    place = said.format(items=tmp_path / "items.jsonl")
    assert f"my_score.py, score: {place}" in fault(tmp_path, code)


PICTURES = """
from PIL import Image

def score(items, generate):
    colour = lambda item: (10 * item["letters"], 0, 200)
    pictures = [Image.new("RGB", (600, 300), colour(item)) for item in items]
    pictures[1] = None
    return {"letters": [0.5] * len(items), "pictures": %s}
"""


def test_pictures_of_the_first_items_are_kept_small(tmp_path: Path) -> None:
    evaluator = given(tmp_path, PICTURES % "pictures").build()
    indices = [8, 3, 0, 7]
    graded = score(evaluator, tiny_live(), "search", indices)
    assert graded.scores["letters"].tolist() == [0.5] * 4
    assert graded.drawings.keys() == {0, 7}  # of 3 there is none, and 8 is not among the first
    lines = evaluator._lines["search"]
    for item, png in graded.drawings.items():
        image = Image.open(io.BytesIO(png))
        assert image.size == (192, 96)
        assert image.getpixel((5, 5)) == (10 * lines[item].fields["letters"], 0, 200)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("pictures[:2]", "returned 2 pictures for 3 items"),
        ("['x'] * 3", "returned 'x' as a picture for {items}, line 2"),
        ("5", "score failed (TypeError: 'int' object is not iterable)"),
        ("[type('P', (), {'convert': lambda s, m: s, 'thumbnail': lambda s, b: 0, "
         "'save': lambda s, f, k: f.write(b'no')})()] * 3", "is no picture that can be read"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_told(tmp_path: Path, returned: str, said: str) -> None:
    assert said.format(items=tmp_path / "items.jsonl") in fault(tmp_path, PICTURES % returned)


ENDINGS = {
    "exit": ("sys.exit(0)", "(SystemExit: 0)"),
    "exit with a text": ("sys.exit('gone')", "(SystemExit: gone)"),
    "interrupt": ("raise KeyboardInterrupt", "(KeyboardInterrupt)"),
    "generator exit": ("raise GeneratorExit", "(GeneratorExit)"),
    "of nobody's kind": ("raise type('Odd', (BaseException,), {})('x\\ny')", "(Odd: x y)"),
    "no text": ("raise type('Mute', (Exception,), {'__str__': lambda s: 1 / 0})", "(Mute)"),
    "the process": ("os._exit(0)", "ended its process"),
    "a signal": ("os.kill(os.getpid(), 9)", "(SIGKILL)"),
    "a fault in C": ("import ctypes; ctypes.string_at(0)", "(SIGSEGV)"),
    "never": ("while True: pass", "took more than 3 s"),
    "asleep": ("time.sleep(1e6)", "took more than 3 s"),
}


FILL = "k = []\nwhile 1: k.append(b'x' * (1 << 24))"
SWELLING = {
    "a list": "kept = []\n    while True: kept.append(b'x' * (1 << 24))",
    "after an answer": "generate(['x'], 2)\n    kept = []\n    while True: kept.append(b'x' * (1 << 24))",
    "a process that it starts": f"import subprocess, sys\n    subprocess.run([sys.executable, '-c', {FILL!r}])",
    "a thread that it starts": (
        "import threading\n    def fill(kept):\n        while True: kept.append(b'x' * (1 << 24))\n"
        "    threading.Thread(target=fill, args=([],), daemon=True).start()\n    threading.Event().wait()"
    ),
}


@pytest.mark.parametrize("name", SWELLING)
def test_a_function_that_takes_all_memory_is_ended_and_the_next_call_is_answered(tmp_path: Path, name: str) -> None:
    body = f"if items[0]['letters'] == 1:\n        return [1] * len(items)\n    {SWELLING[name]}"
    code = f"def score(items, generate):\n    {body}\n"
    evaluator = given(tmp_path, code, max_gigabytes=0.3).build()
    items = [json.loads(item.question)["letters"] for item in evaluator.items("search")]
    fine, bad = items.index(1), next(i for i, letters in enumerate(items) if letters != 1)
    with pytest.raises(InputError, match=r"took \S+ GB of memory in score, of 0.3 GB that it may have") as caught:
        score(evaluator, tiny_live(), "search", [bad])
    assert caught.value.place == str(tmp_path / "my_score.py")
    assert score(evaluator, tiny_live(), "search", [fine]).scores["letters"].tolist() == [1]


def test_a_file_that_takes_all_memory_is_refused(tmp_path: Path) -> None:
    code = "kept = []\nwhile True:\n    kept.append(b'x' * (1 << 24))\n"
    assert "GB of memory when it was loaded" in refusal(given(tmp_path, code, max_gigabytes=0.3))


@pytest.mark.parametrize("name", ENDINGS)
def test_however_it_ends_the_next_call_is_answered(tmp_path: Path, name: str) -> None:
    statement, said = ENDINGS[name]
    code = f"""\
import os, sys, time
def score(items, generate):
    generate([item["prompt"] for item in items], 2)
    if os.path.exists({str(tmp_path / "fails")!r}):
        {statement}
    return [1.0] * len(items)
"""
    evaluator = given(tmp_path, code, max_seconds=3).build()
    live = tiny_live()
    for _ in range(2):
        (tmp_path / "fails").touch()
        with pytest.raises(InputError) as caught:
            score(evaluator, live, "search", [0, 1])
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        (tmp_path / "fails").unlink()
        assert score(evaluator, live, "search", [0, 1]).scores["letters"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_file_that_ends_as_it_is_loaded_is_refused(tmp_path: Path, name: str) -> None:
    statement, said = ENDINGS[name]
    assert said in refusal(given(tmp_path, f"import os, sys, time\n{statement}\n", max_seconds=3))


def test_numbers_without_an_end(tmp_path: Path) -> None:
    code = "def score(items, generate):\n    while True:\n        yield 1.0\n"
    assert "letters: returned more than 3 numbers for 3 items" in fault(tmp_path, code)
    code = "class L(list):\n    def __len__(self): return 10**9\ndef score(items, generate): return L([1.0] * 3)\n"
    assert (
        score(given(tmp_path, code).build(), tiny_live(), "search", [0, 1, 2]).scores["letters"].tolist() == [1.0] * 3
    )
    code = "class F(float):\n    def __float__(self): raise RuntimeError('no')\n"
    code += "def score(items, generate): return [F(1)] * len(items)\n"
    assert "score failed (RuntimeError: no)" in fault(tmp_path, code)


def test_copies_of_its_process_say_nothing(tmp_path: Path) -> None:
    """A function that forks comes back twice, and threads of its own may outlive it."""
    code = """\
import os, threading, time
os.fork()
def score(items, generate):
    threading.Thread(target=time.sleep, args=[1e6]).start()
    me = os.getpid()
    if os.fork() == 0:
        try:
            generate(["not from here"])
        except RuntimeError:
            pass
    return [float(os.getpid() == me)] * len(items)
"""
    evaluator = given(tmp_path, code).build()
    live = tiny_live()
    for _ in range(3):
        assert score(evaluator, live, "search", [0, 1]).scores["letters"].tolist() == [1.0, 1.0]


def test_the_worker_is_as_it_was(tmp_path: Path) -> None:
    code = """\
import os, signal, torch
def score(items, generate):
    signal.signal(signal.SIGTERM, signal.SIG_IGN); os.chdir("/"); os.umask(0o777); os.close(1); os.close(2)
    torch.set_num_threads(7); torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)
    return [1.0] * len(items)
"""
    before = (os.getcwd(), signal.getsignal(signal.SIGTERM), torch.get_num_threads(), torch.get_default_dtype())
    score(given(tmp_path, code).build(), tiny_live(), "search", [0])
    assert before == (os.getcwd(), signal.getsignal(signal.SIGTERM), torch.get_num_threads(), torch.get_default_dtype())
    os.fstat(1)


def test_its_process_ends_with_it(tmp_path: Path) -> None:
    """And so does whatever it has started."""
    code = """\
import os, subprocess
other = subprocess.Popen(["sleep", "1000"])
def score(items, generate):
    return {"me": [os.getpid()] * len(items), "other": [other.pid] * len(items)}
"""
    evaluator = given(tmp_path, code, metrics={"me": "maximize", "other": "maximize"}).build()
    found = score(evaluator, tiny_live(), "search", [0]).scores
    processes = [psutil.Process(int(values[0])) for values in found.values()]
    assert all(process.is_running() for process in processes)
    del evaluator
    gc.collect()
    assert not psutil.wait_procs(processes, timeout=60)[1]


def test_a_candidate_whose_function_exits_is_one_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "n = []\ndef score(items, generate):\n    n.append(0)\n    if len(n) == 6: raise SystemExit(0)\n"
    given(tmp_path, code + "    return [float(len(n))] * len(items)\n")
    objective = {
        "evaluator": "python", "file": "my_score.py", "items_file": "items.jsonl", "metrics": {"s": "maximize"},
        "metric": "s",
    }  # fmt: skip
    file = search_file(
        tmp_path, objectives={"s": objective}, allow_task_code=True, budget={"candidates": 8}, confirm={"top": 1}
    )
    assert evomerge("search", file, "--dir", tmp_path / "out") == 0
    shown = json_of(capsys, "status", tmp_path / "out", "--json")
    assert (shown["state"], shown["candidates"]["failed"]) == ("finished", 1)
    (tmp_path / "my_score.py").write_text("import sys\nsys.exit(0)\n")
    assert evomerge("validate", file) == 2
    assert "failed when it was loaded (SystemExit: 0)" in capsys.readouterr().err


def test_several_metrics_need_a_mapping(tmp_path: Path) -> None:
    metrics = {"a": "maximize", "b": "minimize"}
    code = "def score(items, generate):\n    return [1, 2, 3]\n"
    assert "returned no mapping, and several metrics are declared" in fault(tmp_path, code, metrics=metrics)


def test_items_that_cannot_be_used(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(given(tmp_path, items_file=tmp_path / "none.jsonl"))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ITEMS[3]) + "\n")
    assert "other.jsonl, line 1: is an item of" in refusal(given(tmp_path, held_out_file=other))
    settings = given(tmp_path)
    settings.items_file.write_text("[1]\n")
    assert "items.jsonl, line 1: is not a JSON object" in refusal(settings)


def test_equal_settings_are_one_evaluator(tmp_path: Path) -> None:
    one, other = (given(tmp_path, metrics=dict(m)) for m in ([("a", "maximize"), ("b", "minimize")],
                                                             [("b", "minimize"), ("a", "maximize")]))  # fmt: skip
    assert one == other
    assert hash(one) == hash(other)
    assert np.isscalar(one.build().version)


def test_the_readmes_example_is_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the search file to the confirmed winner, with every other new kind of evaluator beside it."""
    code, content = readme()
    given(tmp_path, code)
    objectives = content["objectives"] | {
        "ours": {"evaluator": "language", "file": "items.jsonl", "language": "ja", "metric": "in_language"},
        "rouge": {"evaluator": "rouge", "file": "items.jsonl", "answer": "{letters} です", "metric": "rouge_l"},
    }
    for name in ("ours", "rouge"):
        objectives[name]["max_new_tokens"] = 8
    keys = {"objectives": objectives, "allow_task_code": content["allow_task_code"], "confirm": {"top": 1}}
    file = search_file(tmp_path, **keys, budget={"candidates": 6}, optimizer={"name": "random"})
    assert evomerge("search", file, "--dir", tmp_path / "out") == 0
    shown = json_of(capsys, "status", tmp_path / "out", "--json")
    assert (shown["state"], shown["candidates"]["failed"]) == ("finished", 0)
    file = search_file(tmp_path, **keys | {"allow_task_code": False}, optimizer={"name": "random"})
    assert evomerge("search", file, "--dir", tmp_path / "other") == 2
    assert "allow_task_code: true" in capsys.readouterr().err


# ---- tried before a search -------------------------------------------------------------------------------------------

HOPELESS = {
    "sleeps": "    time.sleep(1e6)\n",
    "loops": "    while True: pass\n",
    "sleeps after it has asked": "    generate(['a'])\n    time.sleep(1e6)\n",
    "never ends asking": "    while True: generate(['a'])\n",
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_never_ends_is_told_before_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(function, "_TRY_S", 0.5)
    settings = given(tmp_path, f"import time\ndef score(items, generate):\n{HOPELESS[name]}")
    with pytest.raises(InputError, match=r"took more than 0\.5 s in score") as caught:
        settings.build_and_try()
    assert "max_seconds" in caught.value.hint


def test_a_function_that_is_slow_is_waited_for_as_long_as_its_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "_TRY_S", 0.2)
    slow = "import time\ndef score(items, generate):\n    time.sleep(0.5)\n    return [1.0] * len(items)\n"
    evaluator = given(tmp_path, slow, max_seconds=20).build_and_try()
    assert score(evaluator, tiny_live(), "search", [0, 1]).scores["letters"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return [item['nothing'] for item in items]\n", "line 2: score failed (KeyError"),
        ("    return {'words': [1.0]}\n", "returned words, where letters is declared"),
        ("    return [float('nan')]\n", "returned nan"),
        ("    raise SystemExit\n", "score failed (SystemExit)"),
        ("    import sys\n    sys.setrecursionlimit(10**8)\n    return score(items, generate)\n", "RecursionError"),
    ],
)
def test_what_fails_whatever_the_model_is_told_before_a_search(tmp_path: Path, body: str, said: str) -> None:
    settings = given(tmp_path, f"def score(items, generate):\n{body}")
    with pytest.raises(InputError) as caught:
        settings.build_and_try()
    assert said in str(caught.value)


def test_what_empty_answers_bring_about_is_not_held_against_a_function(tmp_path: Path) -> None:
    code = "def score(items, generate):\n    return [1 / len(answer) for answer in generate(['a'] * len(items))]\n"
    evaluator = given(tmp_path, code).build_and_try()
    found = score(evaluator, tiny_live(), "search", [0, 1]).scores["letters"]
    assert (found > 0).all()


def test_it_is_tried_where_a_search_begins_and_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load_search_file(
        search_file(
            tmp_path,
            objectives={
                "s": {
                    "evaluator": "python", "file": "my_score.py", "items_file": "items.jsonl",
                    "metrics": {"letters": "maximize"}, "metric": "letters",
                }
            },
            allow_task_code=True,
        )
    )  # fmt: skip
    given(tmp_path, "def score(items, generate): return [item['nothing'] for item in items]\n")
    with pytest.raises(InputError, match="score failed"):
        open_all(file)
    assert open_all(file, begins=False).evaluators[0].name == "my_score"
