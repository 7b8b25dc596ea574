"""What docs/extend.md shows: its parts keep their contracts, by the tests that it shows.

The parts are a module in a folder of its own, for the contract of an optimizer imports it in a second process.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

_PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
_PARTS, _TESTS = (
    "\n".join(re.findall(r"```python\n(.*?)```", half, re.DOTALL)) for half in _PAGE.split("\n## Test it\n")
)
_FOLDER = TemporaryDirectory()  # it goes with the process
(Path(_FOLDER.name) / "my_package.py").write_text(_PARTS)
sys.path.insert(0, _FOLDER.name)
exec(_TESTS)  # of this project: the classes are collected as if they stood here


def test_every_part_of_the_page_is_tested() -> None:
    tested = {"TestMedian", "TestLowRank", "TestClip", "TestHillClimber", "TestMatches", "TestLetters"}
    assert tested <= set(globals())


def test_a_contract_that_fails_tells_values() -> None:
    """pytest rewrites assertions of test files alone, and of what is registered."""
    for part in ("methods", "steps", "evaluators", "optimizers"):
        assert "@pytest_ar" in vars(import_module(f"evomerge.testing.{part}"))
