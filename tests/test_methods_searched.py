"""Every merge method, searched on the miniatures from a search file alone, and exported as it was scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_miniature import MINIATURES, evomerge, search_file
from helpers_tiers import nightly_but

from evomerge.method import own_methods
from evomerge.store import Store

METHODS = {name: method for name, method in own_methods().items() if not method.needs}
# Grain "element", the same with draws, and grain "row"; test_tsv.py and test_regmean.py have one of grain "tensor".
COMMIT = ("slerp", "dare_ties", "della")
ITEMS = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:4]", "held_out": "test[:4]"}


@pytest.mark.parametrize("method", nightly_but(COMMIT, METHODS))
def test_a_method_is_searched_and_exported(method: str, tmp_path: Path) -> None:
    spec = METHODS[method]
    names = ("base", "maths", "japanese")[: 1 + (spec.max_sources or 2)]
    sources = {name: str(MINIATURES / name) for name in names}
    file = search_file(
        tmp_path,
        sources=sources,
        space={"method": method},
        objectives={"mini_math_ja": ITEMS},
        budget={"candidates": 8},
        confirm={"top": 1},
    )
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    with Store.open(tmp_path / "search" / "search.db") as store:
        assert store.counts()["failed"] == 0
        number = max(row.number for row in store.candidates() if row.status == "done")
    # Verifying: the folder is loaded with plain transformers and must score item by item as the live model did.
    assert evomerge("export", tmp_path / "search", tmp_path / "out", "--candidate", f"c{number:04d}") == 0


def test_a_method_that_mixes_fewer_sources_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("validate", search_file(tmp_path, space={"method": "nearswap"})) == 2
    assert "nearswap mixes 1 sources, not 2 (maths, japanese)" in capsys.readouterr().err
