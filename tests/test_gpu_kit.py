"""The GPU kit: its rows in their small form, on what its requirements list alone, and how results are shown."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evomerge.method import own_methods

ROOT = Path(__file__).parents[1]
KIT = ROOT / "scripts" / "gpu"
MACHINE = ("torch", "transformers", "numba", "safetensors", "peft", "psutil", "numpy")
"""What a machine with a GPU has; the kit's requirements are beside these and what they need."""


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the kit by name."""
    monkeypatch.syspath_prepend(KIT)
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in {file.stem for file in KIT.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]  # their names are everybody's


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results_are_a_table_and_json(kit: Any) -> None:
    results = kit("results")
    good = results.Result("pass Combine", True, "bit for bit", 1.25, log="not shown")
    bad = results.Result("method ties", False, "3 elements differ", 0.5, log="Traceback\n")
    assert re.fullmatch(r"pass Combine +ok +1\.2 s  bit for bit", results.table_line(good))
    assert re.fullmatch(r"method ties +FAILED +0\.5 s  3 elements differ", results.table_line(bad))
    assert json.loads(results.as_json([good, bad])) == {
        "rows": [
            {"name": "pass Combine", "ok": True, "figure": "bit for bit"},
            {"name": "method ties", "ok": False, "figure": "3 elements differ"},
        ]
    }
    told = results.summary([good, bad], "scripts/gpu/check --small")
    assert told.startswith("1 of 2 rows hold, 2 s\n")
    assert 'again: scripts/gpu/check --small --row "method ties"\nTraceback' in told
    assert "not shown" not in told


@pytest.mark.parametrize(
    ("wanted", "expected"), [([], ["a", "b", "c"]), (["b"], ["b"]), (["c", "a"], ["a", "c"]), (["a", "a"], ["a"])]
)
def test_rows_are_selected_by_name(kit: Any, wanted: list[str], expected: list[str]) -> None:
    assert kit("results").selected(["a", "b", "c"], wanted) == expected


@pytest.mark.parametrize(
    ("name", "hint"), [("method tie", "'method ties'"), ("x", "there are: method ties, pass TensorFunction")]
)
def test_a_row_that_there_is_not_is_refused_with_the_nearest(kit: Any, name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        kit("results").selected(["method ties", "pass TensorFunction"], [name])


# ---- rows in a process beside ----------------------------------------------------------------------------------------

REPORTS = """
import json, os, signal, sys, time
names = sys.argv[1:] or ["a", "b", "c"]
def say(**report): print(json.dumps(report), flush=True)
def does(name, ok=True): say(name=name, ok=ok, figure="of " + name, seconds=0.0, printed=os.fstat(2).st_size)
"""


def ran(kit: Any, body: str, wanted: Sequence[str] = (), limit_s: float = 60.0) -> list[tuple[str, bool, str, str]]:
    """How rows ended whose child does ``body`` for each name after it has reported what it is to run."""
    script = REPORTS + "say(rows=names)\nfor name in names:\n" + textwrap.indent(textwrap.dedent(body), "    ")

    def command(names: Sequence[str]) -> list[str]:
        return [sys.executable, "-S", "-c", script, *names]

    results = kit("children").run_rows(wanted, command, limit_s)
    return [(result.name, result.ok, result.figure, result.log) for result in results]


def test_rows_run_one_after_another_and_only_failing_ones_show_what_they_printed(kit: Any) -> None:
    body = """
        say(starts=name)
        print("printed by", name, file=sys.stderr, flush=True)
        does(name, ok=name != "b")
    """
    assert ran(kit, body) == [
        ("a", True, "of a", ""),
        ("b", False, "of b", "printed by b\n"),
        ("c", True, "of c", ""),
    ]
    assert [name for name, *_ in ran(kit, body, wanted=["b"])] == ["b"]


@pytest.mark.parametrize(
    ("ends", "figure"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by signal 9"),
        ("os._exit(3)", "its process ended with exit code 3"),
        ("raise MemoryError", "its process ended with exit code 1"),
    ],
)
def test_the_end_of_a_process_is_the_failure_of_its_row_alone(kit: Any, ends: str, figure: str) -> None:
    results = ran(kit, f"say(starts=name)\nif name == 'b': {ends}\ndoes(name)")
    assert [(name, ok) for name, ok, *_ in results] == [("a", True), ("b", False), ("c", True)]
    assert results[1][2] == figure


def test_a_process_whose_device_is_spoilt_hands_over_to_another(kit: Any) -> None:
    results = ran(kit, "say(starts=name)\ndoes(name, ok=name != 'b')\nif name == 'b': break")
    assert [(name, ok) for name, ok, *_ in results] == [("a", True), ("b", False), ("c", True)]


def test_a_row_that_takes_too_long_is_ended(kit: Any) -> None:
    results = ran(kit, "say(starts=name)\nif name == 'a': time.sleep(600)\ndoes(name)", limit_s=1.0)
    assert results[0][:3] == ("a", False, "took longer than 1 s")
    assert [name for name, *_ in results] == ["a", "b", "c"]  # which the others may, on a busy machine, take too


def test_a_process_that_cannot_begin_ends_the_run_or_its_first_row(kit: Any) -> None:
    with pytest.raises(kit("children").NothingRanError, match="no such row"):
        list(
            kit("children").run_rows(
                ["x"], lambda names: [sys.executable, "-S", "-c", "raise SystemExit('no such row')"], 60.0
            )
        )
    results = ran(kit, "raise SystemExit('no memory')")  # each time anew, before a row is begun
    assert [(name, ok) for name, ok, *_ in results] == [("a", False), ("b", False), ("c", False)]
    assert results[0][3] == "no memory\n"


@pytest.mark.parametrize(("ok", "code"), [("True", 0), ("name != 'b'", 1)])
def test_the_exit_code_says_whether_all_rows_hold(
    kit: Any, ok: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child.py"
    child.write_text(REPORTS + f"say(rows=['a', 'b'])\nfor name in ['a', 'b']:\n    does(name, ok={ok})\n")
    check = kit("check")
    monkeypatch.setattr(check, "CHILD", child)
    for arguments, is_json in ((["--small", "--json"], True), (["--small"], False)):
        monkeypatch.setattr(sys, "argv", ["check", *arguments])
        assert check.main() == code
        printed = capsys.readouterr().out
        assert ("of 2 rows hold" in printed) is not is_json
        if is_json:
            assert [row["ok"] for row in json.loads(printed)["rows"]] == [True, code == 0]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_pass_has_an_example(kit: Any) -> None:
    checks = kit("check_passes")
    assert set(checks.kinds()) == {type(plan).__name__ for plan in checks.examples(exact=True).values()}


def test_a_new_kind_of_pass_has_a_row_that_fails_until_it_has_an_example(
    kit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from evomerge.merging.arithmetic import passes

    @dataclass(frozen=True)
    class Rotate(passes.TensorFunction):
        """A pass of tomorrow."""

    monkeypatch.setattr(passes, "Rotate", Rotate, raising=False)
    (row,) = (row for row in kit("check_passes").rows() if "Rotate" in row.name)
    module = kit("kit")
    with pytest.raises(module.WrongError, match="Rotate has no example"):
        row.run(module.Setting(module.CPU, True, tmp_path))


def test_comparisons_see_what_differs(kit: Any) -> None:
    import torch

    module = kit("kit")
    expected = torch.tensor([1.0, -2.0, 0.0], dtype=torch.bfloat16)
    module.same_bits(expected.clone(), expected, "weights")
    next_digit = torch.tensor([1.0078125, -2.0, 0.0], dtype=torch.bfloat16)
    with pytest.raises(module.WrongError, match="weights: 1 elements differ, the first at 0"):
        module.same_bits(next_digit, expected, "weights")
    assert module.close_share(next_digit, expected, scale=1.0, what="weights") == pytest.approx(2 / 3)
    for wrong in ([1.1, -2.0, 0.0], [1.0, 2.0, 0.0], [1.0, -2.0, float("nan")], [1.0, -2.0, 0.1]):
        made = torch.tensor(wrong, dtype=torch.bfloat16)
        with pytest.raises(module.WrongError, match="weights: 1 of 3 elements are off"):
            module.close_share(made, expected, scale=1.0, what="weights")
    with pytest.raises(module.WrongError, match="differ"):
        module.same_bits(expected.float(), expected, "weights")


# ---- the small form --------------------------------------------------------------------------------------------------


def needed(names: Iterable[str]) -> set[str]:
    """Packages and all that they need, without extras, by their normal names."""
    known, waiting = set[str](), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in known:
            continue
        known.add(name)
        for requirement in requires(name) or []:
            wanted, _, marker = requirement.partition(";")
            if "extra" not in marker and (match := re.match(r"[\w.-]+", wanted)) and _is_installed(match[0]):
                waiting.append(match[0])
    return known


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except ImportError:  # of another system or Python
        return False
    return True


def lay_out(package: Distribution, site: Path) -> None:
    """Link what a package has installed into a folder of packages."""
    tops = {file.parts[0] for file in package.files or () if not file.parts[0].startswith("..")}
    for top in tops - {"__pycache__"}:
        link = site / top
        if not link.exists():
            link.symlink_to(Path(str(package.locate_file(top))))


@pytest.mark.nightly  # a minute and a half: torch generates, and a C++ compiler compiles, a dozen kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with a C++ compiler")
def test_passes_are_compiled_as_one_graph_that_writes_nothing_but_its_result(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler that makes them for CUDA, up to where it generates code: one graph, no buffer, the same bits."""
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    from evomerge.merging.arithmetic import device

    torch._dynamo.reset()
    counters.clear()
    device.compiled.cache_clear()
    monkeypatch.setattr(device, "is_compiled", lambda device: True)
    passes, module = kit("check_passes"), kit("kit")
    setting = module.Setting(module.CPU, True, tmp_path)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    for label, plan in passes.examples(exact=True).items():
        if plan.kernel() is None:
            continue
        (expected, made), codes = run_and_get_code(passes.both, plan, setting, 1 << 16, torch.bfloat16, exact=True)
        module.same_bits(made, expected, label)
        (code,) = codes
        if label != "Disjoint":  # which counts within blocks: a GPU does so within a kernel, a CPU between loops
            assert "empty_strided_cpu(" not in code.partition("def call")[2], label
        expected, made = passes.both(plan, setting, 3003, torch.bfloat16, exact=True)
        module.same_bits(made, expected, label)
    assert not counters["graph_break"]
    device.compiled.cache_clear()


@pytest.mark.nightly  # half a minute: every pass, method and model of the kit
@pytest.mark.timeout(600)
def test_the_small_form_holds_on_what_the_kit_lists_alone(tmp_path: Path) -> None:
    """In an interpreter that sees the packages of such a machine, those of the requirements, and no other."""
    listed = [line.split("==")[0] for line in (KIT / "requirements.txt").read_text().splitlines() if "==" in line]
    venv.create(tmp_path / "machine", symlinks=True)
    (site,) = (tmp_path / "machine").glob("lib/python*/site-packages")
    for name in needed(MACHINE) | {re.sub(r"[-_.]+", "-", name).lower() for name in listed}:
        lay_out(distribution(name), site)
    assert {"ray", "lm_eval", "datasets", "evomerge"} & {path.name for path in site.iterdir()} == set()
    environment = {**os.environ, "PYTHON": str(tmp_path / "machine" / "bin" / "python"), "PYTHONPATH": ""}
    ran = subprocess.run(
        [KIT / "check", "--small", "--json"], env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    assert [row["name"] for row in rows if not row["ok"]] == []
    assert all(set(row) == {"name", "ok", "figure"} and row["figure"] for row in rows)
    names = {row["name"] for row in rows}
    # Whose passes are products of matrices, not at the speed of memory.
    matrices = {"tsv", "gram", "wudi", "actmat", "swudi", "ace", "regmean", "regmean_plus_plus"}
    assert names >= {f"method {method}" for method in own_methods()} | {f"matrix {method}" for method in matrices}
    assert names >= {f"bandwidth {method}" for method in own_methods() if method not in matrices}
    assert names >= {
        "residency device", "residency pinned", "residency mapped",
        "live equals export", "out of memory", "search of a synthetic model", "two workers on one device",
    }  # fmt: skip


def test_the_kits_requirements_are_those_of_the_project() -> None:
    pinned = {line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    listed = {line for line in (KIT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert listed <= pinned
