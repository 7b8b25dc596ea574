"""Searches that older programs began go on, and are exported, with the candidates that those would have made.

The stores in ``golden/store`` were written by Evomerge when its stores had format 4, by drivers that died in the midst
of a search, and dumped; beside each, every candidate as that program made it when it went on to the end.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
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


def test_a_race_goes_on(tmp_path: Path) -> None:
    restore("racing-format-4", tmp_path)
    setup = test_generation.setup_of(racing=test_generation.RACE, candidates=36)
    drive(tmp_path, setup, simulation=test_generation.simulate)
    assert but_for_last_bits(candidates(tmp_path)) == but_for_last_bits(recorded("racing-format-4"))


def but_for_last_bits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Libraries of linear algebra choose their kernels by the processor: CMA-ES on another one than was recorded on
    differs in the last bit of a genome, and so in the recipe's hash.
    """
    rounded = []
    for row in rows:
        genome = None if row["genome"] is None else np.frombuffer(bytes.fromhex(row["genome"])).round(12).tolist()
        rounded.append({key: value for key, value in row.items() if key != "recipe"} | {"genome": genome})
    return rounded


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
