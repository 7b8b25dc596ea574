"""What the cache of image tokens saves: a candidate scored on pictures with it, and with the tower run every time.

The vision miniature on items of mini_picture_ja. Figures are seconds of one core (processor time of this process on one
thread), as medians of turns: with the cache; with processor and tower run for every item, one at a time, as when a
tower changes; plain transformers, which runs both in batches; and only its tower and processor.

    python scripts/bench/image_tokens.py [--items 200] [--turns 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from evaluators.lm_eval import LmEvalSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import open_source
from evomerge.inference.image_tokens import ImageTokens
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Generate

MINIATURES = Path(__file__).resolve().parents[2] / "examples" / "miniatures"
BATCH = 100


def plain(live: LiveModel, asked: Sequence[Generate]) -> None:
    """Answers by plain transformers, in which a batch ends with its last row."""
    for start in range(0, len(asked), BATCH):
        inputs = processed(live, asked[start : start + BATCH])
        live.model.generate(
            **inputs, max_new_tokens=asked[0].max_new_tokens, do_sample=False, pad_token_id=live.tokenizer.pad_token_id,
            stop_strings=list(asked[0].stop[:1]), tokenizer=live.tokenizer,
        )  # fmt: skip


def tower_alone(live: LiveModel, asked: Sequence[Generate]) -> None:
    with torch.inference_mode():
        for start in range(0, len(asked), BATCH):
            live.model.get_image_features(processed(live, asked[start : start + BATCH])["pixel_values"])


def processed(live: LiveModel, asked: Sequence[Generate]) -> Any:
    texts = [live.tokenizer.bos_token + request.prompt.text for request in asked]
    images = [[media.held for media in request.prompt.media] for request in asked]
    processor = live.processor_of() if live.processor_of else None
    assert processor is not None
    return processor(text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=False).to(
        live.model.dtype
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source("vision", str(MINIATURES / "vision"), place="vision")
    live = live_model(source, torch.device("cpu"))
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    task, items = LmEvalSettings(task="mini_picture_ja", batch_size=BATCH).build(), range(arguments.items)
    asked = [r for r in task.requests(Reader.of(live), "search", items) if isinstance(r, Generate)]

    def anew() -> None:
        with mock.patch.object(ImageTokens, "of", ImageTokens._compute):
            score(task, live, "search", items)

    works: dict[str, Callable[[], object]] = {
        "kept": lambda: score(task, live, "search", items),
        "tower for each item": anew,
        "plain transformers": lambda: plain(live, asked),
        "processor and tower alone, in batches": lambda: tower_alone(live, asked),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(arguments.turns + 1):  # the first one fills the cache
        for name, work in works.items():
            started = time.process_time()
            work()
            if turn:
                taken[name].append(time.process_time() - started)
    for name, seconds in taken.items():
        print(f"{name:40s} {statistics.median(seconds):6.2f} s")


if __name__ == "__main__":
    main()
