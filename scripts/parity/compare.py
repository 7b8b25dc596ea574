"""Makes the models, merges them with mergekit and with Evomerge, and compares the results; see ``run``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from cases import Case, all_cases
from models import make_models
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from evomerge.commands.merge import merge
from evomerge.errors import InputError

TEXTS = (
    "a model that reads this text",
    "der Wanderer im dunklen Wald",
    "<s>12 + 30 = 42</s>",
    "日本語",
    "<|call|><|end|>",
)
CHAT = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", " What is 12 + 30? "),
        ("assistant", "42"),
        ("user", "Sure?"),
    )
]
# Chat templates for which mergekit writes white space that the models' own do not have.
SPACED = ("alpaca", "exaone", "llama3")
# Limits in standard errors, for a whole model and for a single tensor, of which there are thousands.
MODEL_LIMIT, TENSOR_LIMIT = 4.0, 5.0


@dataclass(frozen=True)
class Verdict:
    """``figure`` is the largest relative error, or the largest difference in standard errors, as text."""

    passed: bool
    figure: str
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="a Python that has mergekit")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root / "models")
        cases = {f"{number:03}": case for number, case in enumerate(all_cases(root / "models"))}
        cases = {number: case for number, case in cases.items() if arguments.only in case.name}
        for number, case in cases.items():
            (root / f"{number}.yaml").write_text(yaml.safe_dump(case.config, sort_keys=False))
        oracle = [str(arguments.python), str(Path(__file__).with_name("oracle.py")), str(root)]
        log_file = root / "oracle.log"
        with log_file.open("w") as log, subprocess.Popen(oracle, stdout=log, stderr=log) as theirs:
            refusals = {number: _merge(root / f"{number}.yaml") for number in cases}
        if theirs.returncode:
            print(log_file.read_text(), file=sys.stderr)
            return 1
        verdicts = {case.name: _judge(case, root / f"{n}.yaml", refusals[n]) for n, case in cases.items()}
    _print(verdicts)
    failed = [name for name, verdict in verdicts.items() if not verdict.passed]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} cases agree, in {time.perf_counter() - start:.0f} s")
    return 1 if failed or not verdicts else 0


def _merge(file: Path) -> str:
    """Merge with Evomerge, and return its error, or an empty text."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            merge(file, file.with_suffix(".ours"))
    except InputError as error:
        return str(error)
    except Exception as error:  # a case fails, not the run
        return f"{type(error).__name__}: {error}"
    return ""


def _judge(case: Case, file: Path, refusal: str) -> Verdict:
    ours, theirs = file.with_suffix(".ours"), file.with_suffix(".theirs")
    error = file.with_suffix(".error")
    if error.exists():
        return Verdict(False, "", f"mergekit fails: {error.read_text().strip().splitlines()[-1]}")
    if refusal:
        return Verdict(False, "", f"Evomerge fails: {refusal}")
    if different := _side_files(case, ours, theirs):
        return Verdict(False, "", different)
    mine, other = _tensors(ours), _in_order(_tensors(theirs), theirs, ours)
    for name in sorted(mine.keys() | other.keys()):
        if name not in mine or name not in other:
            return Verdict(False, "", f"only {'mergekit' if name in other else 'Evomerge'} writes {name}")
        one, two = mine[name], other[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return Verdict(
                False, "", f"{name} is {one.dtype} {list(one.shape)}, mergekit's {two.dtype} {list(two.shape)}"
            )
    if case.kind == "random":
        return _in_distribution(mine, other, _tensors(Path(case.config["base_model"])))
    return _exact(mine, other, case.tolerance)


def _side_files(case: Case, ours: Path, theirs: Path) -> str:
    """The differences in configuration and tokenizer. Tokens are compared by text; see ``_in_order``."""
    configs = [AutoConfig.from_pretrained(folder) for folder in (ours, theirs)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs)]
    compared = {
        field: [getattr(config, field) for config in configs] for field in ("num_hidden_layers", "vocab_size", "dtype")
    }
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    for what, (one, two) in {
        "tokens": vocabularies,
        "ids": [vocabulary.values() for vocabulary in vocabularies],
    }.items():
        compared[what] = [sorted(set(one) - set(two)), sorted(set(two) - set(one))]
    for text in TEXTS:
        compared[f"tokens of {text!r}"] = [_cut(ours, text), _cut(_cutter(case, text) or theirs, text)]
    for prompt in (False, True):
        compared[f"chats{' for an answer' * prompt}"] = [_chat(tokenizer, case, prompt) for tokenizer in tokenizers]
    different = {what: values for what, values in compared.items() if values[0] != values[1]}
    return "; ".join(f"{what} differ: {str(one)[:80]} and {str(two)[:80]}" for what, (one, two) in different.items())


def _cutter(case: Case, text: str) -> Path | None:
    """The folder with the tokenizer that tokenizes texts as Evomerge intends, if mergekit's result does not."""
    return Path(case.cut_like) if case.cut_like and "<|" not in text else None


def _cut(folder: Path, text: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def _chat(tokenizer: PreTrainedTokenizerBase, case: Case, prompt: bool) -> str:
    """A chat in the tokenizer's template, without white space if mergekit writes other white space for it."""
    if tokenizer.chat_template is None:
        return "no template"
    chat = str(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt))
    return "".join(chat.split()) if case.config.get("chat_template") in SPACED else chat


def _in_order(tensors: dict[str, Tensor], folder: Path, like: Path) -> dict[str, Tensor]:
    """Tensors with one row per token, reordered to another tokenizer.

    mergekit adds tokens in the order of a hash table, which differs between processes.
    """
    theirs, ours = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (folder, like))
    if theirs == ours:
        return tensors
    order = torch.arange(AutoConfig.from_pretrained(folder).vocab_size)
    order[[ours[token] for token in theirs]] = torch.tensor(list(theirs.values()))
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: tensor[order] if name in rows else tensor for name, tensor in tensors.items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    # A tied head may be in the file or not.
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        head = tensors.pop("lm_head.weight", None)
        assert head is None or torch.equal(head, tensors["model.embed_tokens.weight"])
    return tensors


def _exact(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> Verdict:
    errors = {}
    for name, expected in theirs.items():
        largest = expected.double().abs().max().item()
        error = (ours[name].double() - expected.double()).abs().max().item() / (largest or 1.0)
        errors[name] = error if math.isfinite(error) else math.inf
    worst = max(errors, key=lambda name: errors[name])
    passed = errors[worst] <= tolerance
    return Verdict(passed, f"{errors[worst]:.1e}", "" if passed else f"{worst}; {_few(errors, tolerance)}")


def _few(errors: dict[str, float], tolerance: float) -> str:
    return f"{sum(error > tolerance for error in errors.values())} of {len(errors)} tensors above {tolerance:.0e}"


def _in_distribution(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> Verdict:
    """Compare the share of kept elements, and the mean and the second moment of the change from the base.

    Both draw a mask for every element, so the differences between corresponding elements are independent with mean
    zero, and their sum has the standard error sqrt(sum of squares).
    """
    totals: dict[str, tuple[float, float]] = {}
    worst, figure, passed = "", 0.0, True
    for name, start in base.items():
        mine, other = (tensors[name].double() - start.double() for tensors in (ours, theirs))
        differences = {
            "kept fraction": (mine != 0).double() - (other != 0).double(),
            "mean": mine - other,
            "second moment": mine.square() - other.square(),
        }
        for what, difference in differences.items():
            total, squares = difference.sum().item(), difference.square().sum().item()
            before = totals.get(what, (0.0, 0.0))
            totals[what] = before[0] + total, before[1] + squares
            if _in_errors(total, squares) > TENSOR_LIMIT:
                passed, worst = False, f"{what} of {name}: {_in_errors(total, squares):.1f} standard errors"
    for what, (total, squares) in totals.items():
        figure = max(figure, _in_errors(total, squares))
        if _in_errors(total, squares) > MODEL_LIMIT:
            passed, worst = False, f"{what} over the model: {_in_errors(total, squares):.1f} standard errors"
    return Verdict(passed, f"{figure:.1f} s.e.", worst)


def _in_errors(total: float, squares: float) -> float:
    return abs(total) / math.sqrt(squares) if squares else 0.0


def _print(verdicts: dict[str, Verdict]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("method / option")
    table.add_column("difference", justify="right")
    table.add_column("verdict")
    for name, verdict in verdicts.items():
        table.add_row(name, verdict.figure, "ok" if verdict.passed else f"FAILED: {verdict.note}")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
