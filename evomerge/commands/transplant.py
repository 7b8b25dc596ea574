"""The command transplant: give a model another vocabulary, and measure how well it still predicts a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target
from evomerge.commands.waiting import opening, progress_bar
from evomerge.errors import InputError
from evomerge.files import read_text
from evomerge.plugins import unknown_name

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Source

_TOKENS = 512  # in a chunk of the text, including the previous chunk
_MAX_BYTES = 1_000_000

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "transplant_text.txt"
"""The default text that both models predict."""


def transplant(model: str, donor: str, out: Path, method: str, atoms: int | None, text: Path | None) -> None:
    """Write a model folder of ``model`` with the vocabulary of ``donor``.

    Args:
        atoms: the number of shared tokens that ``omp`` makes a row from.
        text: the text that both models predict; None for a few pages that ship with the project.
    """
    from evomerge.checkpoints.transplant import RowMethod

    check_target(out)
    if method not in get_args(RowMethod):
        raise unknown_name(method, get_args(RowMethod), "--method", "way to make rows")
    for place, reference in (("MODEL", model), ("DONOR", donor)):
        check_reference(reference, place)
    sample = read_text(text or SHIPPED, "--text", _MAX_BYTES)
    if not sample.strip():
        raise InputError("--text", "has no text to predict")
    with opening():
        from evomerge.checkpoints.checks import check_finite
        from evomerge.checkpoints.source import open_source
        from evomerge.checkpoints.transplant import transplanted
        from evomerge.merging.building.export import write_model
        from evomerge.recipes.stack import Blend, StackRecipe
        from evomerge.report.consoles import make_console

        own = open_source("model", model, place="MODEL")
        other = open_source("donor", donor, place="DONOR")
        check_finite(own)
        made = transplanted(own, other, method, atoms)  # type: ignore[arg-type]  # it was checked above
    assert made.plan is not None
    console = make_console()
    recipe = StackRecipe.uniform(
        Blend.copy_of("model"), sources={"model": model}, tokenizer="model", layers=own.layers
    )  # fmt: skip
    with progress_bar(console, "making rows and writing tensors") as update:
        write_model(recipe, {"model": made}, out, texts={}, progress=update, follows=f"{method}{atoms}")
    shared, lacking = len(made.plan.shared), len(made.plan.lacking)
    console.print(f"{shared:,} of {shared + lacking:,} tokens have its own rows, {lacking:,} are made ({method})")
    before = bits_per_byte(own, sample)
    after = bits_per_byte(open_source("transplanted", str(out), place=str(out)), sample)
    what = "the shipped text" if text is None else str(text)
    console.print(f"predicting {what}: {before:.3f} bits a byte before, {after:.3f} after")
    console.print(f"transplanted into {out}", style="bold")


def bits_per_byte(source: Source, text: str) -> float:
    """The bits that a model needs per byte of a text, which does not depend on its tokenizer."""
    import torch

    from evomerge.checkpoints.plain import plain_model

    live = plain_model(replace(source), torch.device("cpu"), None)
    tokenizer: Any = live.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    most = min(_TOKENS, getattr(live.model.config, "max_position_embeddings", None) or _TOKENS) - 1
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lost = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), most):
            piece = ids[start : start + most]
            given = torch.tensor([[*([first] if first is not None else []), *piece]])
            scores = live.model(given).logits[0].float().log_softmax(-1)
            wanted = given[0, 1:]
            lost -= float(scores[:-1].gather(1, wanted[:, None]).sum())
    return lost / 0.6931471805599453 / len(text.encode())
