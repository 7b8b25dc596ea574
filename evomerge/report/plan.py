"""What a search is going to do and cost, before it does any of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from evomerge.checkpoints.source import Source
from evomerge.search.prepare import Prepared


def plan(prepared: Prepared) -> Table:
    """The plan of a search as a table of what and how much."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in _rows(prepared):
        table.add_row(what, text)
    return table


def _rows(prepared: Prepared) -> Iterator[tuple[str, str]]:
    file, setup = prepared.file, prepared.setup
    model = prepared.sources[file.tokenizer_source]
    yield "search", f"{file.name}, seed {file.seed}"
    for name, source in prepared.sources.items():
        marks = [mark for mark, is_so in (("base", name == file.base),) if is_so]
        yield "source", " ".join([f"{name}:", _size(source), *marks, f"({source.reference})"])
        for warning in source.warnings:
            yield "warning", f"{name}: {warning}"
    space = file.space.model_dump(exclude_defaults=True, mode="json") | {"kind": file.space.kind}
    yield "space", f"{len(setup.space.parameters)} parameters: {', '.join(f'{k} {v}' for k, v in space.items())}"
    for objective in setup.objectives:
        evaluator = setup.evaluators[objective.evaluator]
        way = "maximize" if objective.maximise else "minimize"
        counts = f"{objective.items} of {evaluator.search_items} search items, {evaluator.held_out_items} held out"
        yield "objective", f"{objective.name}: {way} {objective.metric} of {evaluator.name}, {counts}"
    yield "optimizer", ", ".join(f"{k} {v}" for k, v in file.optimizer.model_dump(exclude_none=True).items())
    yield "budget", _budget(prepared)
    yield (
        "memory",
        f"{_gigabytes(_live_bytes(prepared))} of weights a worker; the sources are mapped, not copied",
    )
    yield "disk", f"{_gigabytes(_bytes(model))} for each export, {_gigabytes(_store_bytes(prepared))} for the store"
    where = "this process" if file.pool == "in_process" else f"Ray, {file.cluster.address or 'started on this machine'}"
    yield "workers", where


def _budget(prepared: Prepared) -> str:
    file, setup = prepared.file, prepared.setup
    parts = [f"{value} {name}" for name, value in file.budget.model_dump(exclude_none=True).items()]
    per_candidate = sum(len(task.indices) for task in setup.tasks("search"))
    text = f"{', '.join(parts)}; {per_candidate} items a candidate"
    if file.budget.candidates:
        text += f", {file.budget.candidates * per_candidate:,} in all"
    return text


def _size(source: Source) -> str:
    count = sum(math.prod(entry.shape) for entry in source.tensors.values())
    return f"{count / 1e6:,.1f} M parameters, {str(source.dtype).removeprefix('torch.')}"


def _bytes(source: Source) -> int:
    return sum(entry.end - entry.begin for entry in source.tensors.values())


def _live_bytes(prepared: Prepared) -> int:
    """Of the live model: what is outside the layers, and as many layers as a path may be made of."""
    model = prepared.sources[prepared.file.tokenizer_source]
    layers = sum(e.end - e.begin for name, e in model.tensors.items() if model.roles[name].layer is not None)
    return _bytes(model) + layers * max(0, prepared.setup.space.shelves - model.layers) // model.layers


def _store_bytes(prepared: Prepared) -> int:
    """Per-item scores dominate: four bytes for the position and four for each metric."""
    evaluators = prepared.evaluators
    each = sum(len(t.indices) * 4 * (1 + len(evaluators[t.evaluator].metrics)) for t in prepared.setup.tasks("search"))
    return (each + 4000) * (prepared.file.budget.candidates or 1000)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 1e5) / 1e6:.1f} MB"
