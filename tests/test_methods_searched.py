"""Every merge method, searched on the miniatures from a search file alone, and exported as it was scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_miniature import MINIATURES, evomerge, export_of, newest_scored, search_file, short_search_file
from helpers_tiers import nightly_but

from evomerge.method import own_methods

METHODS = {name: method for name, method in own_methods().items() if not method.needs}
# Grain "element" with draws, and grain "row"; test_tsv.py and test_regmean.py have one of grain "tensor".
COMMIT = ("dare_ties",)


@pytest.mark.parametrize("method", nightly_but(COMMIT, METHODS))
def test_a_method_is_searched_and_exported(method: str, tmp_path: Path) -> None:
    spec = METHODS[method]
    names = ("base", "maths", "japanese")[: 1 + (spec.max_sources or 2)]
    sources = {name: str(MINIATURES / name) for name in names}
    file = short_search_file(tmp_path, sources=sources, space={"method": method})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert export_of(newest_scored(tmp_path / "search"), tmp_path / "search", tmp_path / "out") == 0


def test_a_method_that_mixes_fewer_sources_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("validate", search_file(tmp_path, space={"method": "nearswap"})) == 2
    assert "nearswap mixes 1 sources, not 2 (maths, japanese)" in capsys.readouterr().err
