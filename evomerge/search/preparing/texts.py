"""Checks of calibration texts before any source is run over them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from evomerge.calibration import Calibration
from evomerge.checkpoints.source import Source
from evomerge.merging.measured.inputs import token_ids, widest_input
from evomerge.method import Need


def text_warnings(
    calibration: Calibration,
    sources: Mapping[str, Source],
    model: str,
    tokenizer: Any,
    needs: Mapping[str, Collection[Need]],
) -> Iterator[str]:
    """Which sources' texts have fewer tokens than their widest linear layer has inputs, where Gram matrices are needed.

    The Gram matrix of such a layer is singular. A ridge makes it invertible nevertheless, so this is not an error; but
    in directions that the texts do not reach the ridge decides.

    Args:
        model: the source that gives the tokenizer, whose layers are as wide as those of the others.
        needs: what is needed from each source that is run over its texts.

    Raises:
        InputError: texts cannot be read or have no tokens, or a layer's inputs are needed that cannot be observed.
    """
    counts = {name: sum(map(len, token_ids(tokenizer, calibration, name))) for name in needs}
    short: dict[int, list[str]] = {}
    grams = [name for name, of_source in needs.items() if {"calibration", "merged_inputs"} & {*of_source}]
    width = widest_input(sources[model]) if grams else 0
    for name in grams:
        if counts[name] < width:
            short.setdefault(counts[name], []).append(name)
    for count, names in short.items():
        yield (
            f"calibration: the texts of {', '.join(names)} have {count:,} tokens, and the widest linear layer has "
            f"{width:,} inputs: its Gram matrix is singular, and a ridge decides what the texts do not say; more texts "
            "(`prompts`), or more of each (`tokens`), say it"
        )
