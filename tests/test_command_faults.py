"""Bad models and a full disk under the commands beside a plain merge: extract, transplant, recipes in stages."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers_checkpoints import WORDS, edit_json, edit_tensors, save_model, save_tokenizer, tiny_config

from evomerge.checkpoints import writer
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.commands.extract import ExtractOptions, extract
from evomerge.commands.merge import merge
from evomerge.commands.transplant import transplant
from evomerge.errors import InputError

Run = Callable[[Path, Path, Path], None]
"""A command by three paths: of the model that a test spoils, of another one, and of what is made."""


def stages(bad: Path, other: Path, out: Path) -> None:
    """The bad model in the first of two stages, which is kept."""
    weighted = [{"model": str(model), "parameters": {"weight": 1}} for model in (bad, other)]
    first = {"name": "pair", "merge_method": "linear", "models": weighted}
    last = {"merge_method": "linear", "models": [{"model": "pair", "parameters": {"weight": 1}}, weighted[1]]}
    file = out.with_suffix(".yaml")
    file.write_text("---\n".join(yaml.safe_dump(document) for document in (first, last)))
    try:
        merge(file, out, keep=out.parent / "kept")
    finally:
        file.unlink()
        if (out.parent / "kept").exists():
            (out.parent / "kept").rmdir()  # empty after a fault


RUNS: dict[str, tuple[Run, str]] = {
    "extract, model": (lambda bad, other, out: extract(str(bad), str(other), out, ExtractOptions(rank="2")), "MODEL"),
    "extract, base": (lambda bad, other, out: extract(str(other), str(bad), out, ExtractOptions(rank="2")), "--base"),
    "transplant, model": (lambda bad, other, out: transplant(str(bad), str(other), out, "omp", 4, None), "MODEL"),
    "transplant, donor": (lambda bad, other, out: transplant(str(other), str(bad), out, "omp", 4, None), "DONOR"),
    "stages": (stages, "out.yaml"),
}
"""With the place that an error names: as the command line calls the bad model, or the file that does."""


def not_a_number(folder: Path) -> None:
    """In a row of a token that the other model lacks."""
    edit_tensors(folder, lambda tensors: tensors["model.embed_tokens.weight"][31].fill_(torch.nan))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def leads_outside(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def narrower(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=12)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, "there is no folder"),
    "NaN": (not_a_number, "model.embed_tokens.weight .*NaN|NaN .*model.embed_tokens.weight"),
    "pickled": (pickled, "pickled weights only"),
    "a name that leads outside": (leads_outside, "leads outside"),
    "cut short": (cut, "is cut short"),
    "other shapes than its configuration says": (
        narrower,
        r"has shape \[16, 24\] in the files; config.json asks for \[16, 12\]",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("bad", "other")):
        save_model(tiny_config(), folder / name, seed=seed)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", RUNS)
def test_a_bad_model_is_refused_and_nothing_is_left(models: Path, tmp_path: Path, command: str, fault: str) -> None:
    bad, other = (shutil.copytree(models / name, tmp_path / name) for name in ("bad", "other"))
    if command.startswith("transplant"):
        save_tokenizer(tmp_path / ("bad" if command.endswith("donor") else "other"), [*WORDS[:-1], "new"])
    spoil, words = FAULTS[fault]
    spoil(bad)
    before = set(tmp_path.iterdir())
    run, place = RUNS[command]
    with pytest.raises(InputError, match=words) as caught:
        run(bad, other, tmp_path / "out")
    assert place in caught.value.place
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["extract, model", "transplant, model", "stages"])
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    left = iter(range(3))
    written = {place: getattr(place, name) for place, name in ((writer, "_write_at"), (TensorFile, "add_bytes"))}

    def until_full(write: Callable[..., None]) -> Callable[..., None]:
        def one(*given: object) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*given)

        return one

    monkeypatch.setattr(writer, "_write_at", until_full(written[writer]))
    monkeypatch.setattr(TensorFile, "add_bytes", until_full(written[TensorFile]))
    with pytest.raises(InputError, match="the disk is full"):
        RUNS[command][0](models / "bad", models / "other", tmp_path / "out")
    assert not list(tmp_path.iterdir())
