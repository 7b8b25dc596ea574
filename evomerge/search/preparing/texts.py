"""What can be said of calibration texts before any source is run over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.calibration import Calibration
from evomerge.checkpoints.source import Source
from evomerge.merging.inputs import token_ids, widest_input


def text_warnings(calibration: Calibration, sources: Mapping[str, Source], model: str, tokenizer: Any) -> Iterator[str]:
    """Which sources' texts have fewer tokens than their widest linear layer has inputs.

    The Gram matrix of such a layer is singular. A ridge makes what needs its inverse solvable all the same, so it is no
    error; but what the texts do not reach is then decided by the ridge.

    Args:
        model: the source that gives the tokenizer, whose layers are as wide as those of the others.

    Raises:
        InputError: texts cannot be read, or have no tokens.
    """
    width = widest_input(sources[model])
    short: dict[int, list[str]] = {}
    for name in sources:
        count = sum(map(len, token_ids(tokenizer, calibration, name)))
        if count < width:
            short.setdefault(count, []).append(name)
    for count, names in short.items():
        yield (
            f"calibration: the texts of {', '.join(names)} have {count:,} tokens, and the widest linear layer has "
            f"{width:,} inputs: its Gram matrix is singular, and a ridge decides what the texts do not say; more texts "
            "(`prompts`), or more of each (`tokens`), say it"
        )
