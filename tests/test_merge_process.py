"""Commands that write models, in processes of their own: their memory, and what is left when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_checkpoints import WORDS, save_model, save_tokenizer, tiny_config
from helpers_miniature import environment

from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.checkpoints.writer import FolderWriter
from evomerge.commands.extract import ExtractOptions, extract
from evomerge.commands.merge import merge
from evomerge.commands.transplant import transplant
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


MEASURED_EXTRACTION = """
import sys, threading
from pathlib import Path
from evomerge.commands.extract import ExtractOptions, extract

def anonymous():  # KB of memory that is no file's
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

peak, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())

for model, base, out in (sys.argv[1:4], sys.argv[4:7]):
    peak[0] = 0
    ended.clear()
    thread = threading.Thread(target=watch)
    thread.start()
    extract(model, base, Path(out), ExtractOptions(rank="8"))
    ended.set()
    thread.join()
    print("peak", peak[0])
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


@pytest.mark.nightly
def test_memory_of_an_extraction_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    arguments = []
    for layers in (2, 14):
        config = tiny_config(num_hidden_layers=layers, hidden_size=384, intermediate_size=1536)
        pair = [save_model(config, tmp_path / f"{name}{layers}", seed=seed) for seed, name in enumerate(("m", "b"))]
        arguments += [*map(str, pair), str(tmp_path / f"out{layers}")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_EXTRACTION, *arguments],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shallow, deep = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert deep - shallow < 15_000  # KB; the changes of twelve layers are 100 MB


KILLED = """
import sys
from pathlib import Path
from evomerge.startup import collect_garbage_rarely
collect_garbage_rarely()
from test_merge_process import MADE, die_half_way
for kind in MADE:
    die_half_way(kind, Path(sys.argv[1]))
"""
SHARD = 20_000


def opened(folder: Path) -> dict[str, Source]:
    return {name: open_source(name, str(folder / name), place=name) for name in NAMES}


def make(sources: dict[str, Source], out: Path) -> list[tuple[int, int]]:
    """Merge into files of a few tensors each; what was reported of the progress."""
    blend = Blend(method="linear", sources=("one", "two"), parameters={"weight": {"one": 0.3, "two": 0.7}})
    references = {name: source.reference for name, source in sources.items()}
    recipe = StackRecipe.uniform(blend, sources=references, tokenizer="base", layers=4)
    told: list[tuple[int, int]] = []
    write_model(recipe, sources, out, texts={}, shard_bytes=SHARD, progress=lambda *done: told.append(done))
    return told


def make_adapter(folder: Path, out: Path) -> None:
    extract(str(folder / "one"), str(folder / "base"), out, ExtractOptions(rank="4"))


def make_transplant(folder: Path, out: Path, method: str = "omp") -> None:
    transplant(str(folder / "one"), str(folder / "words"), out, method, 4, None)


def make_stages(folder: Path, out: Path, density: float = 0.4) -> None:
    """The first of two stages is kept beside the model."""
    one, two, base = (str(folder / name) for name in ("one", "two", "base"))
    weighted = [{"model": model, "parameters": {"weight": 0.5, "density": density}} for model in (one, two)]
    first = {"name": "pair", "merge_method": "ties", "base_model": base, "models": weighted}
    last = {"merge_method": "slerp", "base_model": "pair", "models": [{"model": "pair"}, {"model": one}]}
    file = folder / "stages.yaml"
    file.write_text("---\n".join(yaml.safe_dump(d) for d in (first, {**last, "parameters": {"t": 0.3}})))
    merge(file, out, keep=out.parent / "kept")


def make_table(folder: Path, out: Path, weight: float = 0.3) -> None:
    """A merge of files of tensors, whatever model they are of."""
    (one,), (two,) = (list((folder / name).glob("*.safetensors")) for name in ("one", "two"))
    models = [{"model": str(one), "parameters": {"weight": weight}}, {"model": str(two), "parameters": {"weight": 1}}]
    file = folder / "table.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    merge(file, out)


MADE: dict[str, tuple[Callable[[Path, Path], object], int]] = {
    "merge": (lambda folder, out: make(opened(folder), out), 20),
    "extract": (make_adapter, 20),
    "transplant": (make_transplant, 20),
    "first stage": (make_stages, 20),
    "last stage": (make_stages, 60),
    "table": (make_table, 20),
}
"""What is made of the models of a folder, and how many tensors are written before the process dies."""


def die_half_way(kind: str, folder: Path) -> None:
    """Make something in a child of this process that SIGKILL ends after some tensors."""
    if (child := os.fork()) != 0:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, kind
        return
    run, tensors = MADE[kind]
    left = iter(range(tensors))

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def one(*given: object) -> None:
            write(*given)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        return one

    FolderWriter.write, TensorFile.add = dying(FolderWriter.write), dying(TensorFile.add)  # type: ignore[method-assign]
    write_model.__kwdefaults__["shard_bytes"] = SHARD
    out = folder / kind / "out"
    out.parent.mkdir()
    run(folder, out)
    os._exit(0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and for each of ``MADE`` a folder with what a killed process left there."""
    folder = tmp_path_factory.mktemp("killed") / "models"
    configuration(folder, 4, 64)
    save_model(tiny_config(num_hidden_layers=1), folder / "words", seed=9)
    save_tokenizer(folder / "words", [*WORDS[:-1], "new"])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(
        command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in files of a few tensors, as the killed processes wrote them."""
    monkeypatch.setitem(write_model.__kwdefaults__, "shard_bytes", SHARD)


def same(one: Path, other: Path) -> None:
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_a_killed_merge_goes_on_from_its_complete_files(killed: Path, tmp_path: Path) -> None:
    make(opened(killed), tmp_path / "whole")
    out = killed / "merge" / "out"
    assert not out.exists()
    (left,) = out.parent.glob(".out.partial-*")
    complete = {file.name: file.stat().st_mtime_ns for file in left.glob("*.safetensors")}
    assert complete
    told = make(opened(killed), out)
    assert 1 < told[0][0] <= 21  # did not begin anew
    assert told[-1][0] == told[-1][1]
    assert not list(out.parent.glob(".out.*"))
    same(tmp_path / "whole", out)
    for name, time in complete.items():
        assert (out / name).stat().st_mtime_ns == time


Make = Callable[..., object]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("kind", "run", "otherwise"),
    [
        ("extract", make_adapter, {}),
        ("transplant", make_transplant, {"method": "mean"}),
        ("first stage", make_stages, {"density": 0.9}),
        ("last stage", make_stages, {}),
        ("table", make_table, {"weight": 0.9}),
    ],
)
def test_what_a_killed_process_left_is_never_taken_for_whole(
    killed: Path, tmp_path: Path, kind: str, run: Make, otherwise: dict[str, Any]
) -> None:
    """Also where the same folder is made otherwise now."""
    out = killed / kind / "out"
    assert not out.exists()
    assert list(out.parent.rglob(".*.partial-*"))
    kept = list(out.parent.glob("kept/[!.]*"))
    assert bool(kept) == (kind == "last stage")
    times = [file.stat().st_mtime_ns for folder in kept for file in folder.iterdir()]
    (tmp_path / kind).mkdir()
    for place in (out, tmp_path / kind / "out"):
        run(killed, place, **otherwise)
    same(tmp_path / kind / "out", out)
    assert not list(out.parent.glob(".out.*"))
    assert times == [file.stat().st_mtime_ns for folder in kept for file in folder.iterdir()]
    stages = [sorted((place / "kept").glob("[!.]*")) for place in (out.parent, tmp_path / kind)]
    for ours, theirs in zip(*stages, strict=True):
        same(ours, theirs)
