"""One of two workers that share a device in a row: scores some candidates and prints the scores as JSON.

python one_worker.py SEARCH_FILE SHARE --small|--cuda
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from evomerge.merging.measured.evidence import Evidence
from evomerge.search.preparing.prepare import prepare
from evomerge.search.settings.search_file import load_search_file
from evomerge.search.work.jobs import Job, Measured
from evomerge.search.workers.worker import Worker


def main() -> None:
    file, share, form = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    if form == "--cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    prepared = prepare(load_search_file(file, []))
    worker = Worker.of("one", prepared, Evidence())
    space, scores = prepared.setup.space, []
    for number, share_of_range in enumerate((0.25, 0.5, 0.75)):
        genome = np.array([p.low + share_of_range * (p.high - p.low) for p in space.parameters])
        result = worker.run(Job(number, 1, space.decode(genome), prepared.setup.tasks("search"))).result
        if not isinstance(result, Measured):
            raise SystemExit(f"{result.reason}: {result.message}\n{result.log}")
        scores.append([values.tolist() for values in result.scores[0].values()])
    peak = torch.cuda.max_memory_allocated() / 1e9 if form == "--cuda" else 0.0
    print(json.dumps({"scores": scores, "peak_gb": peak}))


if __name__ == "__main__":
    main()
