"""What is computed of the sources once: by whom it is shared, what it follows from, and what is never trusted."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.merging.measured.evidence import Evidence

CONTENTS = {"base": "0" * 64, "maths": "1" * 64}


class Counting:
    """Computes two tensors, and counts how often."""

    def __init__(self, values: Callable[[], dict[str, Tensor]] | None = None) -> None:
        self.times = 0
        self._values = values or (lambda: {"u": torch.arange(6.0).view(2, 3), "counts": torch.tensor([3, 4])})

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return self._values()


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_what_one_has_computed_the_next_maps(tmp_path: Path) -> None:
    compute = Counting()
    made = Evidence(tmp_path / "new" / "evidence", CONTENTS).get("svd", ("base", 3), compute)
    kept = Evidence(tmp_path / "new" / "evidence", CONTENTS).get("svd", ("base", 3), compute)
    assert compute.times == 1
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], kept[name]) and made[name].dtype == kept[name].dtype for name in made)


def test_without_a_folder_it_is_kept_for_this_process() -> None:
    compute, evidence = Counting(), Evidence()
    assert evidence.get("svd", ("base",), compute) is evidence.get("svd", ("base",), compute)
    assert compute.times == 1


def test_large_evidence_without_a_folder_takes_no_memory() -> None:
    compute, evidence = Counting(lambda: {"u": torch.zeros(1 << 19)}), Evidence()
    for _ in range(2):
        evidence.get("svd", ("base",), compute)
    assert compute.times == 2


@pytest.mark.parametrize(
    ("kind", "follows_from"),
    [("svd 2", ("base", 1)), ("svd", ("maths", 1)), ("svd", ("base", 2)), ("svd", ("base", "1")), ("svd", ("base",))],
)
def test_another_kind_or_another_ground_is_something_else(
    kind: str, follows_from: tuple[Any, ...], tmp_path: Path
) -> None:
    compute = Counting()
    Evidence(tmp_path, CONTENTS).get("svd", ("base", 1), compute)
    Evidence(tmp_path, CONTENTS).get(kind, follows_from, compute)
    assert compute.times == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def write_noise(file: Path) -> None:
    file.write_bytes(b"\xff" * 400)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, write_noise])
def test_a_damaged_file_is_computed_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    compute = Counting()
    Evidence(tmp_path, CONTENTS).get("svd", ("base",), compute)
    damage(only_file(tmp_path))
    again = Evidence(tmp_path, CONTENTS).get("svd", ("base",), compute)
    assert compute.times == 2
    assert torch.equal(again["u"], torch.arange(6.0).view(2, 3))
    Evidence(tmp_path, CONTENTS).get("svd", ("base",), compute)
    assert compute.times == 2


def test_a_file_in_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    compute, other = Counting(), Counting(lambda: {"u": torch.ones(2)})
    Evidence(tmp_path, CONTENTS).get("svd", ("base",), compute)
    place = only_file(tmp_path)
    Evidence(tmp_path, CONTENTS).get("svd", ("maths",), other)
    (wrong,) = set(tmp_path.glob("*.safetensors")) - {place}
    wrong.replace(place)
    assert torch.equal(Evidence(tmp_path, CONTENTS).get("svd", ("base",), compute)["u"], torch.arange(6.0).view(2, 3))


def test_a_failure_leaves_nothing_behind_and_is_tried_again(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    evidence = Evidence(tmp_path, CONTENTS)
    with pytest.raises(torch.linalg.LinAlgError):
        evidence.get("svd", ("base",), fail)
    assert not list(tmp_path.iterdir())
    assert torch.equal(evidence.get("svd", ("base",), Counting())["counts"], torch.tensor([3, 4]))
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_computation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    compute, evidence = Counting(), Evidence(tmp_path / "file" / "evidence", CONTENTS)
    for name in ("base", "maths", "base"):
        evidence.get("svd", (name,), compute)
    assert compute.times == 2
    assert caplog.text.count("cannot be written") == 1


def test_evidence_that_is_kept_must_say_of_what() -> None:
    with pytest.raises(ValueError, match="sources"):
        Evidence(Path("anywhere"))


def _compute_slowly(folder: Path, gate: Any, entered: Any) -> None:
    def compute() -> dict[str, Tensor]:
        with entered.get_lock():
            entered.value += 1
        gate.wait(60)
        return {"u": torch.ones(3)}

    Evidence(folder, CONTENTS).get("svd", ("base",), compute)


def test_two_processes_compute_one_thing_once_between_them(tmp_path: Path) -> None:
    """This process is the other one."""
    context = multiprocessing.get_context("spawn")
    gate, entered = context.Event(), context.Value("i", 0)
    worker = context.Process(target=_compute_slowly, args=(tmp_path, gate, entered))
    worker.start()
    while not entered.value:  # it is computing; the other can only wait
        assert worker.is_alive()
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_compute_slowly, tmp_path, gate, entered)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        gate.set()
        waiting.result(60)
    worker.join(60)
    assert worker.exitcode == 0
    assert entered.value == 1
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
