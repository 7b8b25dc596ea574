"""Scoring one model as plain transformers loads it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from evaluators.base import Split
from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.live import (
    LiveModel,
    NotFiniteError,
    check_live,
    for_scoring,
    live_model,
    load_tokenizer,
    load_weights,
)
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.search.estimation.statistics import mean_and_error
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import objective_values
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.workers.worker import choose_device, torch_dtype
from evomerge.store import Estimate


def scored(live: LiveModel, prepared: Prepared, split: Split) -> dict[str, Estimate]:
    """What a model is worth in each objective and constraint, on as many items of a split as a search scores."""
    setup = prepared.setup
    evaluators = enumerate(zip(setup.evaluators, prepared.evaluators, strict=True))
    wanted = setup.counts()
    scores = [
        evaluator.score(live, split, range(wanted[e] if split == "search" else info.held_out_items))
        if e in wanted  # the screen's is not
        else {}
        for e, (info, evaluator) in evaluators
    ]
    return {m.name: mean_and_error(objective_values(m, scores, split)) for m in setup.measures}


def plain_model(source: Source, file: SearchFile) -> LiveModel:
    """A model as plain transformers loads it, in the dtype, on the device and with the threads of a search's worker.

    Adapters are folded into it, as they are when a search makes its source of them.

    Raises:
        InputError: transformers cannot load it, or it holds or computes NaN or Inf.
    """
    torch.set_num_threads(file.cluster.cpus_per_worker)
    device, dtype = choose_device(file.device), torch_dtype(file.dtype)
    if source.adapters:
        live = live_model(source, device, dtype)
        load_weights(live, ((name, source.read(name)) for name in source.tensors))
    else:
        disable_progress_bar()  # it would run through our own
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:  # whatever strange settings do inside transformers
            raise InputError(source.place, f"transformers cannot load it: {first_line(error)}") from error
        live = LiveModel(for_scoring(model.to(device)), load_tokenizer(source))
    try:
        check_live(live)
    except NotFiniteError as error:
        raise InputError(source.place, f"cannot be scored: {error}") from error
    except Exception as error:  # of a model whose settings have it compute something else
        raise InputError(source.place, f"cannot be scored: {first_line(error)}") from error
    return live
