"""The house around the code: pinned versions, scripts, the image, and what no file may say."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_LINES = 60

SCRIPTS = [ROOT / ".ci/run", *sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix)]

# Folders of somebody's machine, and where packages come from: both are the installer's business, not the project's.
PRIVATE = re.compile(
    r"(?<![\w.$}-])/(?:root|home|work|Users|mnt)/\w\w|\b(?:pypi\.org|pythonhosted\.org|npmjs\.org)\b|--(?:extra-)?index-url\b"
)


APART = {"vllm"}
"""Extras that want other versions of what is pinned here; scripts/vllm/requirements.txt has the pins of this one."""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def direct_requirements() -> list[Requirement]:
    extras = [texts for name, texts in PROJECT["optional-dependencies"].items() if name not in APART]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for texts in extras for text in texts)]]


def all_requirements() -> list[Requirement]:
    """What the project needs and what that needs in turn, for this Python and platform."""
    found: list[Requirement] = []
    todo = direct_requirements()
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        found.append(requirement)
        for extra in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), extra)) not in seen:
                seen.add(key)
                inner = [Requirement(text) for text in requires(requirement.name) or ()]
                todo += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every file of the repository that is text: its path and its content."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


# ---- versions --------------------------------------------------------------------------------------------------------


def test_torch_is_pinned_to_its_public_version() -> None:
    """A local version such as +cpu exists on one kind of machine alone."""
    assert pins()["torch"] == "2.13.0"
    assert not [version for version in pins().values() if "+" in version]


def test_transformers_lives_beside_vllm() -> None:
    assert pins()["transformers"] in SpecifierSet(">=5.16,<5.20")


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda r: r.name)
def test_each_pin_is_in_the_range_that_is_asked_for(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_everything_is_pinned_that_is_installed() -> None:
    # torch for CUDA brings a dozen packages that its CPU build lacks; torch itself says which versions it wants.
    of_cuda = re.compile(r"nvidia-|cuda-|triton")
    for requirement in all_requirements():
        name = canonicalize_name(requirement.name)
        if not of_cuda.match(name):
            assert name in pins(), f"constraints.txt lacks {name}"
            assert pins()[name] in requirement.specifier, str(requirement)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="other platforms need fewer")
def test_nothing_is_pinned_that_nobody_needs() -> None:
    assert set(pins()) - {canonicalize_name(r.name) for r in all_requirements()} == set()


# ---- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env ")


def test_shell_scripts_are_clean() -> None:
    shell = [str(path) for path in SCRIPTS if path.read_text().partition("\n")[0].endswith(("bash", "sh"))]
    command = [str(Path(sys.executable).with_name("shellcheck")), *shell]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def bootstrap(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's bootstrap on a project of no files but the three that it reads."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts/bootstrap", folder / "scripts/bootstrap")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "constraints.txt").write_text("torch==0.0.1\n")
    command = [str(folder / "scripts/bootstrap")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")


def test_bootstrap_without_a_python_says_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "rm"):
        (tools / name).symlink_to(str(shutil.which(name)))
    ran = bootstrap(tmp_path, PATH=str(tools))
    assert ran.returncode == 1
    assert "no Python 3.11" in ran.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.nightly
def test_bootstrap_that_fails_shows_why_and_fails_again(tmp_path: Path) -> None:
    for _ in range(2):
        ran = bootstrap(tmp_path, PATH=os.environ["PATH"], PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
        assert ran.returncode == 1
        assert "torch==0.0.1" in ran.stderr
        assert ".venv/bootstrap.log" in ran.stderr


# ---- the image -------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_image_copies_what_exists_and_is_let_in() -> None:
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert "pyproject.toml" in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in let_in
    assert {line[1:] for line in let_in if line.startswith("!")} == set(copied)


def test_image_holds_every_package_and_what_its_build_reads() -> None:
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert {"evomerge", "search_spaces", "evaluators", PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_image_installs_the_pinned_versions_and_is_not_root() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("--constraint constraints.txt" in rest for rest in installs)
    assert [rest for word, rest in instructions() if word == "USER"] == ["1000:1000"]
    assert ("ENTRYPOINT", '["evomerge"]') in instructions()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_no_imports_go_in_circles() -> None:
    """But for typing: what two modules need of each other belongs in a third."""
    graph = grimp.build_graph("evomerge", "evaluators", "search_spaces", exclude_type_checking_imports=True)
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_no_file_speaks_of_a_machine_or_a_registry() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if PRIVATE.search(line) and name != "tests/test_house.py"
    ]
    assert found == []


@pytest.mark.parametrize("package", ["evomerge", "search_spaces", "evaluators"])
def test_functions_fit_on_a_screen(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {function.name}": lines
        for path in (ROOT / package).rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := _code_lines(function)) > MAX_LINES
    }
    assert found == {}


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without those of its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    return (function.end_lineno or 0) - function.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
