"""Searches that older programs began go on, and are exported, with the candidates that those would have made.

The stores in ``golden/store`` were written by Evomerge when its stores had format 4, by drivers that died in the midst
of a search, and dumped; beside each, every candidate as that program made it when it went on to the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import test_generation
import torch
from helpers_miniature import ROOT, evomerge
from helpers_search import FakeSpace, drive, make_setup, simulate
from safetensors import safe_open

from evomerge.optimizers import OptunaSettings
from evomerge.store import Store

GOLDEN = Path(__file__).parent / "golden" / "store"

# What each format brought, taken away again.
BEFORE = {
    4: ["DROP TABLE answer", "DROP TABLE item"],
    3: [f"ALTER TABLE lease DROP COLUMN {name}" for name in ("writes", "boot", "expires_since_boot")],
    2: ["ALTER TABLE candidate DROP COLUMN eligible", "DROP TABLE alembic_version"],
}


def restore(name: str, folder: Path, version: int = 4) -> None:
    """The store of a search as a program of this format had left it, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (GOLDEN / f"{name}.sql").read_text(encoding="utf-8")
    text = text.replace("{ROOT}", str(ROOT)).replace("{FOLDER}", str(folder))
    with closing(sqlite3.connect(folder / "search.db")) as connection:
        connection.executescript(text)
        for newer in range(4, version, -1):
            for statement in BEFORE[newer]:
                connection.execute(statement)
        connection.execute("UPDATE search SET schema_version = ?", (version,))
        if version > 1:
            connection.execute("UPDATE alembic_version SET version_num = ?", (str(version),))
        connection.commit()


def candidates(folder: Path) -> list[dict[str, Any]]:
    with Store.open(folder / "search.db") as store:
        return [
            {
                "number": row.number,
                "step": row.step,
                "origin": row.origin,
                "genome": None if row.genome is None else row.genome.tobytes().hex(),
                "recipe": row.recipe_hash,
                "status": row.status,
                "losses": row.losses,
                "on_front": row.on_front,
                "eligible": row.eligible,
                "objectives": {name: value.mean for name, value in row.objectives.items()},
                "scores": _digest(store, row.number),
            }
            for row in store.candidates()
        ]


def _digest(store: Store, number: int) -> str:
    found = store.scores(number, "search")
    content = b"".join(s.items.tobytes() + b"".join(v.tobytes() for v in s.metrics.values()) for s in found)
    return hashlib.sha256(content).hexdigest()[:16]


def recorded(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def weights(folder: Path) -> str:
    """A digest of all tensors of a model folder, by name."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                digest.update(name.encode())
                digest.update(tensors.get_tensor(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_search_goes_on_from_every_format(tmp_path: Path, version: int) -> None:
    restore("plain-format-4", tmp_path, version)
    nsga2 = OptunaSettings(name="nsga2", population=6)
    setup = make_setup(objectives=2, optimizer=nsga2, candidates=24, space=FakeSpace(3, 1))
    drive(tmp_path, setup, simulation=simulate)
    assert candidates(tmp_path) == recorded("plain-format-4")


def race(folder: Path) -> None:
    """Go on with the recorded race, and print what came of it."""
    restore("racing-format-4", folder)
    setup = test_generation.setup_of(racing=test_generation.RACE, candidates=36)
    drive(folder, setup, simulation=test_generation.simulate)
    print(json.dumps(candidates(folder)))


@pytest.mark.nightly  # every format of store goes on above
def test_a_race_goes_on(tmp_path: Path) -> None:
    """With the kernels that it was recorded with: OpenBLAS chooses them by the processor when it is loaded, and the
    last bit of CMA-ES's genomes hangs on that."""
    start = "from evomerge.startup import collect_garbage_rarely; collect_garbage_rarely()"
    code = f"{start}; import pathlib, {__name__}; {__name__}.race(pathlib.Path({str(tmp_path)!r}))"
    surroundings = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_CORETYPE": "Haswell"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == recorded("racing-format-4")


def goes_on_and_is_exported(folder: Path, *settings: object) -> None:
    """The search of miniatures, by the command line."""
    restore("miniature-format-4", folder / "search")
    assert evomerge("resume", folder / "search", *settings) == 0
    wanted = recorded("miniature-format-4")
    exported = next(row for row in wanted if "exported" in row)
    digest = exported.pop("exported")
    assert candidates(folder / "search") == wanted
    name = f"c{exported['number']:04d}"
    assert evomerge("export", folder / "search", folder / "out", "--candidate", name, "--no-verify") == 0
    assert weights(folder / "out") == digest


def test_a_search_of_models_goes_on_and_is_exported(tmp_path: Path) -> None:
    goes_on_and_is_exported(tmp_path)
