"""How close models are, which indicates what will merge: facts, comparisons of task vectors, and warnings."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.checkpoints.checks import check_compatible, check_finite, text_model_problem
from evomerge.checkpoints.differences import warnings_across
from evomerge.checkpoints.places import split_reference
from evomerge.checkpoints.prompts import SourcePrompt
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.merging.adapters.low_rank_change import is_low_rank, low_rank_factors
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.measured.directions import Directions, Factors, of_matrices, work
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.measured.rounding import is_exact, share_lost, squared_loss
from evomerge.merging.site import Ref, Site
from evomerge.printable import printable
from evomerge.recipes.stack import Role
from evomerge.report.advice import advice_on, dispersion_of
from evomerge.report.cautions import beware
from evomerge.report.inspected import Advice, Closeness, Distance, Inspection, ModelFacts, Pair, SourceDistance

_MAX_NAME = 100  # characters

_MAX_WORK = 5e12
"""The number of operations above which singular values are not computed: a minute or two on one core."""

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


def inspect_models(
    references: Sequence[str],
    base: str | None,
    progress: Progress = lambda done, of: None,
    *,
    called: Mapping[str, str] | None = None,
) -> Inspection:
    """Open models and compare them with a base.

    Args:
        references: folders, hub ids or ``model+adapter``.
        base: another reference; if None and there are several, the first of ``references``.
        called: names of references, if given; by default the ends of the references.

    Raises:
        InputError: a model cannot be opened, or contains NaN or Inf.
    """
    wanted = dict.fromkeys([*([base] if base is not None else []), *references])
    names = _names(list(wanted), called or {})
    opened = {
        name: open_source(name, reference, place=reference, prompts=True)
        for name, reference in zip(names, wanted, strict=True)
    }
    for source in opened.values():
        check_finite(source)
    facts = [_facts(source) for source in opened.values()]
    if len(opened) == 1:
        return Inspection(models=facts)
    origin, *others = opened.values()
    warnings = [f"{f.name}: {warning}." for f in facts for warning in f.warnings]
    apart = {other.name: reason for other in others if (reason := _incomparable(origin, other))}
    warnings += [f"{name} cannot be merged with {origin.name}: {reason}." for name, reason in apart.items()]
    near = [other for other in others if other.name not in apart]
    for other in near:
        warnings += _unmergeable(origin, other)
    warnings += [f"{warning}." for warning in warnings_across({s.name: s for s in (origin, *near)}, origin.name)]
    shared, left_out = _shared_tensors([origin, *near])
    parts = _measure([origin, *near], shared, progress) if near else {}
    inspection = Inspection(
        models=facts,
        base=origin.name,
        parts=list(parts),
        sources=_distances(near, parts),
        pairs=_pairs(near, parts),
        apart=apart,
        left_out=left_out,
        warnings=warnings,
    )
    inspection.warnings += beware(inspection, opened)
    inspection.dispersion = dispersion_of(inspection.sources)
    if parts:
        advice = advice_on(inspection.sources, _whole(parts).products)
        inspection.advice = [Advice(text=text, source=source) for text, source in advice]
    return inspection


def _names(references: Sequence[str], called: Mapping[str, str]) -> list[str]:
    short = short_names(references)
    given = [called.get(reference, name) for reference, name in zip(references, short, strict=True)]
    return given if len(set(given)) == len(given) else short


def short_names(references: Sequence[str]) -> list[str]:
    """For each reference, the shortest end that distinguishes it from the others: maths for models/maths."""
    split = [[Path(part).parts or (part,) for part in split_reference(reference, None)] for reference in references]
    for depth in range(1, 1 + max(len(parts) for models in split for parts in models)):
        names = ["+".join("/".join(parts[-depth:]) for parts in models) for models in split]
        if len(set(names)) == len(names):
            return names
    return list(references)


def _facts(source: Source) -> ModelFacts:
    try:
        tokens = len(load_tokenizer(source))
    except InputError:
        tokens = None
    architectures = source.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else source.config["model_type"]
    return ModelFacts(
        name=source.name,
        reference=source.reference,
        architecture=printable(str(named), _MAX_NAME),
        layers=source.layers,
        hidden_size=source.settings["hidden_size"],
        parameters=sum(math.prod(entry.shape) for entry in source.tensors.values()),
        bytes=sum(entry.end - entry.begin for entry in source.tensors.values()),
        dtype=str(source.dtype).removeprefix("torch."),
        vocab_size=source.settings["vocab_size"],
        tokens=tokens,
        tied=source.tied,
        adapters=split_reference(source.reference, None)[1:],
        prompt=None if source.prompt is None else _prompt_text(source.prompt),
        warnings=list(source.warnings),
        seeing=_seeing(source) if source.takes_images else None,
    )


def _seeing(source: Source) -> int:
    """The number of parameters outside a source's text model."""
    return sum(math.prod(source.tensors[name].shape) for name, role in source.roles.items() if role.kind == "vision")


def _prompt_text(prompt: SourcePrompt) -> str:
    """A prompt's description and initialisation, because only prompts with the same one can be averaged.

    Raises:
        InputError: it contains NaN or Inf.
    """
    prompt.check_finite()
    if prompt.facts.form == "prefix":
        return prompt.facts.text
    start = prompt.facts.start
    return f"{prompt.facts.text}, which began {'nobody knows how' if start is None else f'as {start!r}'}"


# ---- what can be compared --------------------------------------------------------------------------------------------


def _incomparable(base: Source, other: Source) -> str:
    """Why the layers of two models cannot be compared; empty if they can. Embedding and head may differ."""
    for one in (other, base):
        if one.prompt is not None:
            return f"{one.name} has {one.prompt.facts.text}, which changes no weights"
    if problem := text_model_problem(base, other):
        return problem
    if base.layers != other.layers:
        return f"it has {other.layers} layers, and {base.name} {base.layers}"
    roles = base.roles
    for name in sorted(base.tensors.keys() | other.tensors.keys()):
        if name not in base.tensors or name not in other.tensors:
            has, lacks = (base, other) if name in base.tensors else (other, base)
            if (roles.get(name) or other.roles[name]).layer is not None:
                return f"{has.name} has {name}, and {lacks.name} does not"
        elif roles[name].layer is not None and base.tensors[name].shape != other.tensors[name].shape:
            shapes = [list(source.tensors[name].shape) for source in (other, base)]
            return f"its {name} has shape {shapes[0]}, and that of {base.name} {shapes[1]}"
    return ""


def _unmergeable(base: Source, other: Source) -> list[str]:
    try:
        check_compatible({base.name: base, other.name: other})
    except InputError as error:
        return [f"{other.name} cannot be merged with {base.name} as it is: {error.problem}. {error.hint}".strip()]
    return []


def _shared_tensors(sources: Sequence[Source]) -> tuple[dict[str, Role], list[str]]:
    """The roles of the tensors that all have in the same shape, and the names of the others."""
    roles = sources[0].roles
    every = dict.fromkeys(name for source in sources for name in source.tensors)
    shapes = {name: {s.tensors[name].shape if name in s.tensors else None for s in sources} for name in every}
    return {n: r for n, r in roles.items() if len(shapes[n]) == 1}, [n for n in every if len(shapes[n]) > 1]


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over elements, for n task vectors.

    Attributes:
        count: the number of elements.
        products: float64 [n + 1, n + 1], inner products of b, d_1, ..., d_n.
        signs: float64 [3, n, n]; see ``scans.delta_signs``.
        losses: float64 [n], squared norms of the rounded-away parts of d_1, ..., d_n.
        directions: the directions of the matrices among the tensors.
    """

    count: int
    products: NDArray[np.float64]
    signs: NDArray[np.float64]
    losses: NDArray[np.float64]
    directions: Directions

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.products + other.products,
            self.signs + other.signs,
            self.losses + other.losses,
            self.directions + other.directions,
        )

    def distance(self, k: int) -> Distance:
        length = self.products[0, 0]
        return Distance(
            relative_norm=math.sqrt(self.products[k + 1, k + 1] / length) if length else None,
            mean_change=self.signs[2, k, k] / self.count,
            changed=self.signs[0, k, k] / self.count,
            rounded_away=share_lost(self.losses[k], self.products[k + 1, k + 1]),
            effective_rank=self.directions.rank(k),
        )

    def closeness(self, k: int, m: int) -> Closeness:
        """The closeness of the task vectors k < m."""
        lengths = math.sqrt(self.products[k + 1, k + 1] * self.products[m + 1, m + 1])
        both, agreement = self.signs[:2, m, k]
        return Closeness(
            cosine=float(np.clip(self.products[k + 1, m + 1] / lengths, -1, 1)) if lengths else None,
            sign_agreement=(both + agreement) / (2 * both) if both else None,
            overlap=self.directions.overlap(k, m),
        )


def _measure(sources: Sequence[Source], tensors: Mapping[str, Role], progress: Progress) -> dict[str, _Sums]:
    """The sums of each part of the model, in the order of the forward pass.

    Args:
        sources: the sources, starting with the base.
        tensors: the tensors that all of them have, with their roles.
    """
    by_name = {source.name: source for source in sources}
    names = list(by_name)
    held: dict[Ref, Tensor] = {}  # of one name: read several times, and adapters are folded each time

    def read(ref: Ref) -> Tensor:
        if ref not in held:
            held[ref] = by_name[ref[0]].read(ref[1]).contiguous()
        return held[ref]

    weights = Weights(read, WorkerThreads(None))
    looks = _has_time(sources, tensors)
    sizes = {name: sum(s.tensors[name].end - s.tensors[name].begin for s in sources) for name in tensors}
    parts: dict[str, _Sums] = {}
    done = 0
    for name, role in tensors.items():
        shape = tuple(sources[0].tensors[name].shape)
        site = Site(name, role, shape, {source: (source, name) for source in by_name})
        facts, size = Facts(site, weights, Evidence(), seed=0), math.prod(shape)
        directions = _directions(sources, name, read) if looks else Directions.none(len(sources) - 1)
        sums = _Sums(size, facts.products(names), facts.signs(names), _losses(facts, sources, name), directions)
        held.clear()
        for source in sources:
            source.release(name)
        part = role.kind if role.layer is None else f"layer {role.layer}"
        if size:
            parts[part] = parts[part] + sums if part in parts else sums
        done += sizes[name]
        progress(done, sum(sizes.values()))
    return dict(sorted(parts.items(), key=lambda item: _position(item[0])))


def _has_time(sources: Sequence[Source], tensors: Mapping[str, Role]) -> bool:
    """Whether singular values take only minutes: always for adapters, up to half a billion parameters for models."""
    base, *others = sources
    whole = [other for other in others if not is_low_rank(base, other)]
    shapes = [base.tensors[name].shape for name in tensors if len(base.tensors[name].shape) > 1]
    return len(whole) * sum(map(work, shapes)) <= _MAX_WORK


def _directions(sources: Sequence[Source], name: str, read: Callable[[Ref], Tensor]) -> Directions:
    """The directions of the task vectors of a tensor; none for a vector."""
    base, *others = sources
    shape = tuple(base.tensors[name].shape)
    if len(shape) < 2 or not math.prod(shape):
        return Directions.none(len(others))

    def change(other: Source) -> Tensor | Factors:
        if len(shape) == 2 and not base.changes and is_low_rank(base, other):
            empty = torch.zeros(shape[0], 0), torch.zeros(0, shape[1])
            return low_rank_factors(other, name) or empty
        return read((other.name, name)).double() - read((base.name, name)).double()

    return of_matrices([change(other) for other in others])


def _losses(facts: Facts, sources: Sequence[Source], name: str) -> NDArray[np.float64]:
    """[n] the squared loss of each task vector of a tensor if a merge is stored in the base's dtype."""
    base, *others = sources
    dtype = base.dtype_of(name, None, base.dtype)
    lossy = [not (is_exact(base, name, dtype) and is_exact(other, name, dtype)) for other in others]
    return np.array(
        [
            float(facts.total("rounding", (base.name, other.name), lambda rows: squared_loss(rows[0], rows[1], dtype)))
            if rounds
            else 0.0
            for other, rounds in zip(others, lossy, strict=True)
        ]
    )


def _distances(sources: Sequence[Source], parts: Mapping[str, _Sums]) -> list[SourceDistance]:
    if not parts:
        return []
    whole = _whole(parts)
    return [
        SourceDistance(name=source.name, whole=whole.distance(k), parts=[sums.distance(k) for sums in parts.values()])
        for k, source in enumerate(sources)
    ]


def _pairs(sources: Sequence[Source], parts: Mapping[str, _Sums]) -> list[Pair]:
    if not parts:
        return []
    whole = _whole(parts)
    return [
        Pair(
            a=sources[k].name,
            b=sources[m].name,
            whole=whole.closeness(k, m),
            parts=[sums.closeness(k, m) for sums in parts.values()],
        )
        for k, m in combinations(range(len(sources)), 2)
    ]


def _whole(parts: Mapping[str, _Sums]) -> _Sums:
    return reduce(operator.add, parts.values())


def _position(part: str) -> tuple[int, int]:
    kind, _, layer = part.partition(" ")
    return ("vision", "embedding", "layer", "norm", "head").index(kind), int(layer or 0)
