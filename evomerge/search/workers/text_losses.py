"""A model's losses on the calibration texts, used by LM-Cocktail and the soup of these texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evaluators.base import likelihoods
from evomerge.calibration import Calibration
from evomerge.errors import InputError
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import Engine, Likelihood, respond_to

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


def text_losses(live: LiveModel, engine: Engine, calibration: Calibration) -> NDArray[np.float32]:
    """-log p of each text, in nats per token: float32 [texts]. A text's first token is not predicted.

    Raises:
        InputError: a text has fewer than two tokens.
    """
    reader, prompts = Reader.of(live), []
    for number, text in enumerate(calibration.all_texts, start=1):
        ids = reader.tokenizer(text)["input_ids"][: calibration.tokens]
        if len(ids) < 2:
            raise InputError("calibration", f"text {number} has fewer than two tokens", "Give whole sentences.")
        room = None if reader.context is None else reader.context + 1
        prompts.append(Prompt("", text, ids, len(ids) - 1, room, f"calibration text {number}"))
    answered = likelihoods(respond_to(engine, [Likelihood(prompt) for prompt in prompts]))
    return np.array([-one.log / one.tokens for one in answered], dtype=np.float32)
