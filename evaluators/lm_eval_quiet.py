"""Ways to run lm-eval's code without side effects: no log output, no progress bars, random generators restored.

They are separate from lm-eval's model, which takes two seconds to import.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator

import datasets
import numpy as np
import torch


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Run task code with fixed seeds; Python's, numpy's and torch's generators are restored afterwards.

    Some tasks shuffle their choices with the global generators, so without seeds the items would differ between
    workers. A GPU's generator is left alone, because nothing here draws from it.
    """
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(1234)
    torch.default_generator.manual_seed(1234)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of lm-eval and datasets, and the progress bars of datasets."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    ends = [(logger.handlers, logger.propagate) for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    for logger in loggers:  # not by level: setting one clears the level cache of all loggers of the process
        logger.handlers, logger.propagate = [logging.NullHandler()], False  # errors are raised anyway
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, ends, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if bars:
            datasets.enable_progress_bars()
