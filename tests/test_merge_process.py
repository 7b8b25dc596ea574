"""`evomerge merge` in a process of its own: the memory it takes, and what is left of it when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers_checkpoints import save_model, tiny_config
from helpers_miniature import environment

from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.building.export import write_model
from evomerge.recipes.stack import Blend, StackRecipe

NAMES = ("base", "one", "two")
MEASURED = """
import resource, sys
from pathlib import Path
from evomerge.commands.merge import merge
import evomerge.merging.arithmetic.kernels, evomerge.merging.arithmetic.scans
merge(Path(sys.argv[1]), Path(sys.argv[2]))  # of small models first: what is imported and compiled is there then
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(Path(sys.argv[3]), Path(sys.argv[4]))
print("grew", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def configuration(folder: Path, layers: int, width: int) -> Path:
    """Three models and a mergekit file that merges them by TIES."""
    folder.mkdir()
    config = tiny_config(num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width)
    for seed, name in enumerate(NAMES):
        save_model(config, folder / name, seed=seed)
    mixed = [{"model": name, "parameters": {"weight": 0.5, "density": 0.4}} for name in NAMES[1:]]
    content = {"merge_method": "ties", "base_model": "base", "models": mixed, "parameters": {"normalize": False}}
    (folder / "merge.yaml").write_text(yaml.safe_dump(content))
    return folder / "merge.yaml"


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = configuration(tmp_path / "small", 2, 64), configuration(tmp_path / "large", 24, 512)
    size = sum(file.stat().st_size for file in (tmp_path / "large").rglob("*.safetensors"))
    assert size > 200e6  # of three sources; the largest tensor set is 4 MB
    arguments = [str(small), str(tmp_path / "a"), str(large), str(tmp_path / "b")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    grew = int(done.stdout.split("grew ")[1])
    assert grew < 100_000  # kilobytes


KILLED = """
import os, signal, sys
from pathlib import Path
from test_merge_process import make, opened
from evomerge.checkpoints.writer import FolderWriter
write, left = FolderWriter.write, iter(range(int(sys.argv[2])))
def die_soon(self, name, tensor):
    write(self, name, tensor)
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
FolderWriter.write = die_soon
make(opened(Path(sys.argv[1])), Path(sys.argv[1]) / "out")
"""


def opened(folder: Path) -> dict[str, Source]:
    return {name: open_source(name, str(folder / name), place=name) for name in NAMES}


def make(sources: dict[str, Source], out: Path) -> list[tuple[int, int]]:
    """Merge into files of a few tensors each; what was reported of the progress."""
    blend = Blend(method="linear", sources=("one", "two"), parameters={"weight": {"one": 0.3, "two": 0.7}})
    references = {name: source.reference for name, source in sources.items()}
    recipe = StackRecipe.uniform(blend, sources=references, tokenizer="base", layers=4)
    told: list[tuple[int, int]] = []
    write_model(recipe, sources, out, texts={}, shard_bytes=20_000, progress=lambda *done: told.append(done))
    return told


def test_a_killed_merge_goes_on_from_its_complete_files(tmp_path: Path) -> None:
    configuration(tmp_path / "models", 4, 64)
    folder = tmp_path / "models"
    make(opened(folder), tmp_path / "whole")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(folder), "20"]
    done = subprocess.run(
        command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "out").exists()
    (left,) = folder.glob(".out.partial-*")
    complete = {file.name: file.stat().st_mtime_ns for file in left.glob("*.safetensors")}
    assert complete
    told = make(opened(folder), folder / "out")
    assert 1 < told[0][0] <= 21  # did not begin anew
    assert told[-1][0] == told[-1][1]
    assert not list(folder.glob(".out.*"))
    for file in (tmp_path / "whole").iterdir():
        assert (folder / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    for name, time in complete.items():
        assert (folder / "out" / name).stat().st_mtime_ns == time
