"""The plan of a search: what it will do and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from rich.table import Table

from evaluators.base import Evaluator, prompts_of
from evaluators.cost import COUNTED
from evomerge.blends import observed
from evomerge.checkpoints.differences import warnings_across
from evomerge.checkpoints.source import Source
from evomerge.genome import Refitting
from evomerge.merging.measured.kept import evidence_bytes
from evomerge.merging.measured.rounding import LOSSY, rounding_warning, shares_lost
from evomerge.prices import amount_text
from evomerge.report.entries import Constraint
from evomerge.report.hardware import (
    ModelShape,
    Work,
    descent_bytes,
    host_bytes,
    layout_lines,
    lines,
    model_shape,
    work_of,
)
from evomerge.report.outlook import Outlook, outlook_lines, outlook_of
from evomerge.search.estimation.preference import Preference
from evomerge.search.estimation.screening import MIN_PAIRS
from evomerge.search.preparing.measured import planned_baselines, plans_soups
from evomerge.search.preparing.mixtures import mixture_bytes
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Workers
from evomerge.search.settings.selecting import choices

MIN_GAIN = 2
"""A race saves little if its first rung is more than one over this number of all items."""

FEW_ITEMS = 30
"""With fewer items, a mean is so uncertain that users should be warned before they spend anything."""

SOUPS = 2
"""The maximum number of baselines by losses on calibration texts: the greedy soup may be a single source."""

MAX_TOGETHER = 50
"""With more items per candidate, a processor scores several candidates in one batch no faster than one by one."""

MIN_ESTIMATED = 10**9
"""The bytes of weights above which it matters which GPU a worker has."""


def plan(prepared: Prepared) -> Table:
    """The plan of a search as a table."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in plan_rows(prepared):
        table.add_row(what, text)
    return table


def expected(prepared: Prepared) -> Outlook:
    """What to expect from a search."""
    return outlook_of(prepared, _baselines(prepared) + len(prepared.setup.start))


def plan_rows(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """The plan as pairs of a title and a text."""
    file, setup = prepared.file, prepared.setup
    model = prepared.sources[file.tokenizer_source]
    yield "search", f"{file.name}, seed {file.seed}"
    for name, source in prepared.sources.items():
        role = ", the base" if name == file.base else ""
        yield "source", f"{name}: {_size(source)}{role} ({source.reference})"
        for warning in source.warnings:
            yield "warning", f"{name}: {warning}"
    for warning in warnings_across(prepared.sources, file.tokenizer_source):
        yield "warning", warning
    yield from _rounding(prepared)
    yield from _select(prepared)
    space = file.space.model_dump(exclude_defaults=True, mode="json") | {"kind": file.space.kind}
    if not isinstance(method := space.get("method", ""), str):
        space["method"] = " or ".join(method)
    yield "space", f"{len(setup.space.parameters)} parameters: {_settings_text(space)}"
    for sentence in getattr(setup.space, "left_out", ()):
        yield "baselines", sentence
    yield from _calibration(prepared)
    yield from _fit(prepared)
    for objective in setup.objectives:
        evaluator = setup.evaluators[objective.evaluator]
        way = "maximize" if objective.maximise else "minimize"
        counts = f"{objective.items} of {evaluator.search_items} search items, {evaluator.held_out_items} held out"
        yield "objective", f"{objective.name}: {way} {objective.metric} of {evaluator.name}, {counts}"
    yield from _constraints(setup)
    yield from _features(setup)
    yield from _screen(setup)
    yield from _proxy(setup)
    for warning in prepared.warnings:
        yield "warning", warning
    yield from _few_items(setup)
    yield from _racing(setup)
    yield from _together(prepared)
    if setup.start:
        yield "start", f"{len(setup.start)} candidates: {'; '.join(point.label for point in setup.start)}"
    yield "optimizer", _optimizer(prepared)
    yield "budget", _budget(prepared)
    yield from _cost(prepared)
    yield from outlook_lines(setup, expected(prepared))
    yield "confirmation", _confirmation(prepared)
    yield "memory", _memory(prepared)
    if _live_bytes(prepared) >= MIN_ESTIMATED and not model.is_table:
        yield from _hardware(prepared)
    largest = max(_bytes(model), mixture_bytes(setup.space, prepared.sources))
    export = _gigabytes(int(largest * _widened(prepared)))
    if model.is_table:
        yield "disk", f"{export} for the candidate of each worker, in the folder for temporary files ($TMPDIR)"
    yield "disk", f"{export} for each export, {_gigabytes(_store_bytes(prepared))} for the store{_evidence(prepared)}"
    where = "this process" if file.pool == "in_process" else f"Ray, {file.cluster.address or 'started on this machine'}"
    yield "workers", where


def _select(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """The selection among many sources, and its maximum effort."""
    if (section := prepared.file.select) is None:
        return
    names, maximised = choices(prepared.file), [o for o in prepared.setup.objectives if o.maximise]
    most = (len(names) + 1) * len({o.evaluator for o in maximised}) * section.rungs[-1]
    rest = {"measured": "as one where that is better", "average": "as one", "drop": "not at all"}[section.rest]
    taken = f"by up to {section.rungs[-1]} items of each, {most:,} in all; below, as if the first were chosen"
    yield "select", f"at most {section.keep} of {len(names)} sources, the others {rest}; {taken}"


def _rounding(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Sources a large part of whose changes is rounded away in every candidate."""
    file, sources = prepared.file, prepared.sources
    if file.together > 1:  # weights are not rounded
        return
    model = sources[file.tokenizer_source]
    dtype = getattr(torch, file.dtype) if file.dtype is not None else None
    lost = {name: share for name, share in shares_lost(sources, file.base, model, dtype).items() if share >= LOSSY}
    if lost:
        adapted = all(sources[name].changes for name in lost)
        yield "warning", rounding_warning(lost, dtype or model.dtype, adapted=adapted)


def _optimizer(prepared: Prepared) -> str:
    """The optimizer's settings in the search file, and what it learns."""
    settings = prepared.file.optimizer
    said = _settings_text(settings.model_dump(exclude_none=True))
    learns = settings.learns(prepared.setup.space.parameters, prepared.file.budget.candidates)
    return f"{said}; learns {learns}" if learns else said


def _settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line: name cma, sigma 0.167, x0 centre."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_settings_text(value)})"
        if isinstance(value, list | tuple):
            return " ".join(map(text, value))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(key if value == {} else f"{key} {text(value)}" for key, value in settings.items())


def _memory(prepared: Prepared) -> str:
    """The peak memory of a worker."""
    if prepared.sources[prepared.file.tokenizer_source].is_table:
        return "one tensor of every source at a time; what the function that scores holds is its own"
    files = {file: file.stat().st_size for source in prepared.sources.values() for file in source.files}
    (shape, works), proxy, fit = shape_and_works(prepared), prepared.setup.proxy, prepared.file.fit
    items = max(0 if proxy is None else proxy.drawn, 0 if fit is None else fit.drawn)
    descent = descent_bytes(shape, items, psutil.virtual_memory().available)
    peak = host_bytes(shape, works, sum(files.values()), descent)
    return (
        f"about {_gigabytes(peak)} at a worker's peak on a processor, of which {_gigabytes(_live_bytes(prepared))} are "
        "its model's weights; the sources are mapped, not copied"
    )


def _hardware(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """A worker on common GPUs, and other layouts of it: estimated, not measured."""
    (shape, works), free = shape_and_works(prepared), psutil.virtual_memory().available
    file = prepared.file
    for line in lines(shape, works, file.engine, free, file.cluster.devices):
        yield "estimate", line
    for line in layout_lines(shape, works, free):
        yield "layout", line


def shape_and_works(prepared: Prepared) -> tuple[ModelShape, list[Work]]:
    """The shape of a merged model, and the work of every evaluator."""
    model = prepared.sources[prepared.file.tokenizer_source]
    settings, tasks = prepared.opened.settings, prepared.setup.tasks("search")
    works = []
    for task in tasks:
        evaluator = prepared.evaluators[task.evaluator]
        seen = _tokens_with_images(prepared, evaluator)
        works.append(work_of(settings[task.evaluator], list(evaluator.metrics), len(task.indices), seen))
    sources = sum(_bytes(source) for source in prepared.sources.values())
    layers = max(model.layers, prepared.setup.space.layer_buffers)
    sizes = [int(size * _widened(prepared)) for size in layer_bytes(model, model.layers)]
    weights, itemsize = _live_bytes(prepared), int(model.dtype.itemsize * _widened(prepared))
    hops = max(layers, prepared.setup.space.hops)
    return model_shape(model.described, weights, sources, hops, itemsize, sizes), works


def _tokens_with_images(prepared: Prepared, evaluator: Evaluator) -> int | None:
    """The tokens of the first prompt of an evaluator with images, which dominate it; None for other evaluators."""
    first = next((n for n, item in enumerate(evaluator.items("search")) if item.media), None)
    if first is None:
        return None
    return max(len(prompt.ids) for prompt in prompts_of(evaluator, prepared.reader(), "search", first))


def layer_bytes(model: Source, layers: int) -> list[int]:
    """Bytes of each of this many layer buffers of a live model; those beyond its layers repeat them in order."""
    own = [0] * model.layers
    for name, entry in model.tensors.items():
        if (layer := model.roles[name].layer) is not None:
            own[layer] += entry.end - entry.begin
    return [own[number % model.layers] for number in range(layers)]


def _few_items(setup: Setup) -> Iterator[tuple[str, str]]:
    """Warnings about objectives and constraints with uncertain means because of few items."""
    for measure in (*setup.objectives, *setup.constraints):
        evaluator = setup.evaluators[measure.evaluator]
        if evaluator.name == "change" or (evaluator.name == "cost" and measure.metric in COUNTED):
            continue
        for split, items in (("search", measure.items), ("held-out", evaluator.held_out_items)):
            if items < FEW_ITEMS:
                said = "have an uncertain mean"
                if items == 1:
                    said = "says nothing of how sure its mean is, and names no winner"
                count = f"{items} {split} item{'s' * (items > 1)}"
                yield "warning", f"{measure.name}: {count} {said}; use {FEW_ITEMS} or more"


def _calibration(prepared: Prepared) -> Iterator[tuple[str, str]]:
    texts = prepared.file.calibration
    if texts is None:
        return
    needs = observed((mark.recipe for mark in prepared.setup.space.baselines()), prepared.sources)
    once = [name for name, of_source in needs.items() if of_source != {"merged_inputs"}]
    how = [f"through {once[0] if len(once) == 1 else f'{len(once)} sources'}, once"] if once else []
    if any("merged_inputs" in of_source for of_source in needs.values()):
        how.append("through sources and merge layer by layer, for every candidate")
    own = f"; of their own for {', '.join(texts.sources)}" if texts.sources else ""
    said = " and ".join(how) or "which nothing here needs"
    yield "calibration", f"{texts.prompts} texts of up to {texts.tokens} tokens {said}{own if how else ''}"


def _fit(prepared: Prepared) -> Iterator[tuple[str, str]]:
    if (split := prepared.file.fit_split) is None:
        return
    labels = [mark.label for mark in prepared.setup.space.baselines() if mark.recipe.is_fitted]
    fitted = [f"'{label}'" for label in labels]  # some have commas
    drawn, steps = min(split.section.drawn, split.count), split.section.steps
    said = f"for the baselines {', '.join(fitted)}" if fitted else "which nothing here needs"
    space = prepared.setup.space
    again = space.refits if isinstance(space, Refitting) else 0
    anew = f"; anew for the best {again} at the end, which are the last candidates" if again else ""
    yield "fit", f"{split.count} items of their own; {steps} steps, each on {drawn} of them, once, {said}{anew}"


def _constraints(setup: Setup) -> Iterator[tuple[str, str]]:
    for constraint in setup.constraints:
        evaluator = setup.evaluators[constraint.evaluator]
        limit = Constraint(threshold=constraint.threshold, at_least=constraint.maximise)
        counts = f"{constraint.items} of {evaluator.search_items} search items, {evaluator.held_out_items} held out"
        yield "constraint", f"{constraint.name}: {constraint.metric} of {evaluator.name} {limit.text}, {counts}"


def _features(setup: Setup) -> Iterator[tuple[str, str]]:
    for feature in setup.features:
        evaluator = setup.evaluators[feature.evaluator]
        bins = f"{feature.bins} bins from {feature.low:g} to {feature.high:g}"
        yield "feature", f"{feature.name}: {feature.metric} of {evaluator.name}, {bins}, {feature.items} search items"
    niches, candidates = math.prod(feature.bins for feature in setup.features), setup.budget.candidates
    if setup.features and candidates is not None and niches > candidates:
        problem = f"features: {niches:,} niches for {candidates:,} candidates, so that most are the only one of theirs"
        yield "warning", f"{problem}; use fewer bins"


def _proxy(setup: Setup) -> Iterator[tuple[str, str]]:
    if (proxy := setup.proxy) is None:
        return
    numbers = sum(parameter.differentiable for parameter in setup.space.parameters)
    yield (
        "proxy",
        f"likelihoods of {proxy.items} answers; {proxy.steps} steps down its gradient by {numbers} numbers beside each "
        f"generation, each on {proxy.drawn} of them; 2 points are scored",
    )


def _screen(setup: Setup) -> Iterator[tuple[str, str]]:
    if (screen := setup.screen) is None:
        return
    objective = setup.objectives[screen.objective].name
    yield (
        "screen",
        f"{screen.metric} of {setup.evaluators[screen.evaluator].name} on {screen.items} items; leaves out up to "
        f"{screen.drop:.0%} of a generation while its tau with {objective} is {screen.least_tau:g} or more "
        f"(of {MIN_PAIRS} candidates at least)",
    )


def _racing(setup: Setup) -> Iterator[tuple[str, str]]:
    """The rungs of a race in item scores, and warnings if it cannot save any."""
    if (racing := setup.racing) is None:
        return
    sizes = [sum(counts.values()) for counts in setup.rungs]
    shown = [str(size) for size in sizes]
    ordinary, beyond = shown[: setup.ordinary_rungs], shown[setup.ordinary_rungs :]
    for_the_best = f", then {', '.join(beyond)} for those that challenge the best" if beyond else ""
    by = "item response" if racing.estimate == "item_response" else "the best baseline"
    yield "racing", f"{', '.join(ordinary)} items a candidate{for_the_best}; the rest is estimated by {by}"
    items = max(setup.counts().values())
    if beyond_all := [str(rung) for rung in racing.rungs if rung >= items]:
        problem = f"racing: {', '.join(beyond_all)} of its rungs are not below the {items} items that there are"
        yield "warning", f"{problem}; each stands for all of them"
    if sizes[-1] < MIN_GAIN * sizes[0]:
        yield "warning", f"racing: the first rung is {sizes[0]} of all {sizes[-1]} items, so it can spare little"
    optimizer = setup.build_optimizer()
    if optimizer.keeps == "all":
        problem = f"racing: {setup.optimizer.name} learns from every candidate of a generation, so none is eliminated"
        yield "warning", f"{problem}; only the rungs bound what each is scored on"


def _together(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """How many candidates of adapters are scored in one batch, and a warning if that saves nothing."""
    file = prepared.file
    if file.together == 1:
        return
    yield "together", f"up to {file.together} candidates in one batch; each is exported in float32, as it was scored"
    first = sum(prepared.setup.rungs[0].values())
    if first > MAX_TOGETHER and not (torch.cuda.is_available() or file.cluster.gpus_per_worker):
        problem = f"together: on a processor it takes less time only with few items a candidate, not with {first}"
        yield "warning", f"{problem}; leave it out, or race on {MAX_TOGETHER} or fewer first"


def _budget(prepared: Prepared) -> str:
    file, setup = prepared.file, prepared.setup
    bounds = file.budget.model_dump(exclude_none=True, exclude={"cost"})
    parts = [f"{value} {name}" for name, value in bounds.items()]
    if file.budget.cost is not None:
        parts.append(amount_text(file.budget.cost, file.cluster.currency))
    least, usual, most = _items_each(setup)
    per_candidate = (
        f"{most} items a candidate" if least == most else f"{least} to {most} items a candidate, {usual} for most"
    )
    text = f"{', '.join(parts)}; {per_candidate}"
    if file.budget.candidates:
        baselines = _baselines(prepared)
        whole = sum(setup.all_counts().values())
        low, high = (baselines * whole + (file.budget.candidates - baselines) * bound for bound in (least, most))
        text += f", {high:,} in all" if low == high else f", {low:,} to {high:,} in all"
    return text


def _cost(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """The hourly cost of the workers, and what follows for the bounds of the budget."""
    cluster, budget = prepared.file.cluster, prepared.file.budget
    if (prices := cluster.prices) is None:
        return
    gpus = 1.0 if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    each = prices.cost_an_hour(1, gpus)
    text = f"{amount_text(each, prices.currency)} an hour a worker"
    if cluster.gpus_per_worker is None and cluster.gpu_hour is not None:
        text += ", if it has one GPU"
    most = cluster.workers.max if isinstance(cluster.workers, Workers) else cluster.workers
    count = 1 if prepared.file.pool == "in_process" else most
    if count is not None and (count > 1 or budget.hours or budget.cost):
        up_to = "up to " if isinstance(cluster.workers, Workers) else ""
        text += f"; {up_to}{amount_text(count * each, prices.currency)} an hour with {count} worker{'s' * (count > 1)}"
        if budget.hours is not None:
            text += f", {amount_text(count * each * budget.hours, prices.currency)} in {budget.hours:g} hours"
        if budget.cost is not None and each:
            text += f"; the budget of money is spent in {budget.cost / (count * each):.3g} hours"
    yield "cost", text


def _baselines(prepared: Prepared) -> int:
    """The number of models that are scored before the search begins."""
    soups = SOUPS if plans_soups(prepared) else 0
    return len(list(prepared.setup.space.baselines())) + planned_baselines(prepared) + soups


def _confirmation(prepared: Prepared) -> str:
    """The scores on held-out items at the end: up to 10 models x 350 items, 3,500 in all."""
    setup = prepared.setup
    baselines = _baselines(prepared)
    drawn = setup.confirm.drawn * len(Preference.of_setup(setup).parts)
    models = baselines + max(setup.confirm.top, drawn)
    items = sum(len(task.indices) for task in setup.tasks("held_out"))
    if len(setup.objectives) > 1:
        return f"up to {models} models and the front x {items:,} items"
    return f"up to {models} models x {items:,} items, {models * items:,} in all"


def _items_each(setup: Setup) -> tuple[int, str, int]:
    """Item scores per candidate: the minimum, the usual number ("125 to 175") and the maximum, including the screen."""
    screen = sum(setup.all_counts().values()) - sum(setup.counts().values())
    rungs = [screen + sum(counts.values()) for counts in setup.rungs]
    ordinary = rungs[: setup.ordinary_rungs]
    usual = f"{ordinary[0]} to {ordinary[-1]}" if len(ordinary) > 1 else str(ordinary[0])
    return (rungs[0] if setup.screen is None else setup.screen.items), usual, rungs[-1]


def _size(source: Source) -> str:
    count = sum(math.prod(entry.shape) for entry in source.tensors.values())
    return f"{count / 1e6:,.1f} M parameters, {str(source.dtype).removeprefix('torch.')}"


def _bytes(source: Source) -> int:
    return sum(entry.end - entry.begin for entry in source.tensors.values())


def _live_bytes(prepared: Prepared) -> int:
    """Bytes of the live models: tensors outside of the layers, the maximum number of layers of a path, and mixtures."""
    model = prepared.sources[prepared.file.tokenizer_source]
    outside = _bytes(model) - sum(layer_bytes(model, model.layers))
    buffers = layer_bytes(model, max(model.layers, prepared.setup.space.layer_buffers))
    mixture = mixture_bytes(prepared.setup.space, prepared.sources)
    return int((outside + sum(buffers) + mixture) * _widened(prepared))


def _widened(prepared: Prepared) -> float:
    """The size of a model relative to its source, due to the dtype in which it is computed and written."""
    from evomerge.search.workers.building import computing_dtype

    stored = prepared.sources[prepared.file.tokenizer_source].dtype
    return (computing_dtype(prepared.file) or stored).itemsize / stored.itemsize


def _store_bytes(prepared: Prepared) -> int:
    """Bytes of the store. Per-item scores dominate: four bytes for the position and four for each metric."""
    evaluators = prepared.evaluators
    per_candidate = sum(
        len(t.indices) * 4 * (1 + len(evaluators[t.evaluator].metrics)) for t in prepared.setup.tasks("search")
    )
    return (per_candidate + 4000) * (prepared.file.budget.candidates or 1000)


def _evidence(prepared: Prepared) -> str:
    """The size of stored evidence, if it is large."""
    kept = evidence_bytes([mark.recipe for mark in prepared.setup.space.baselines()], prepared.sources)
    return f", about {_gigabytes(kept)} for evidence, made once" if kept else ""


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 1e5) / 1e6:.1f} MB"
