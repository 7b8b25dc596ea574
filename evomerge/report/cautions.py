"""Warnings about merging the inspected models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from evomerge.checkpoints.source import Source
from evomerge.merging.measured.rounding import LOSSY, rounding_warning, shares_lost
from evomerge.printable import ranges
from evomerge.report.inspected import Inspection, Pair, SourceDistance

LARGE_CHANGE = 0.002
"""The mean |d| above which DARE is doubtful: the fine-tunes for which its paper (arXiv 2311.03099) finds it good are
below it, and continued pretraining, for which it fails, is above."""

UNRELATED = 1.0
"""The |d| / |b| above which a source is not a fine-tune: two unrelated models are at about 1.4."""

DUPLICATE, OPPOSITE = 0.98, -0.05
"""The cosines of task vectors above which a source adds nothing to the other, and below which they conflict."""


def beware(inspection: Inspection, opened: Mapping[str, Source]) -> list[str]:
    """Sentences about the findings on the models, which were ``opened`` under these names."""
    of_sources = (sentence for source in inspection.sources for sentence in _of_source(source, inspection))
    return [
        *of_sources,
        *_of_large(inspection.sources),
        *_of_pairs(inspection.pairs),
        *_of_rounding(inspection, opened),
    ]


def _of_source(source: SourceDistance, inspection: Inspection) -> Iterable[str]:
    whole, base = source.whole, inspection.base
    if whole.changed == 0:
        yield f"{source.name} has the weights of {base}: 0 elements differ."
        return
    if whole.relative_norm is not None and whole.relative_norm > UNRELATED:
        yield (
            f"{source.name} is not a fine-tune of {base}: its change is {whole.relative_norm:.2f} times as long as the "
            "base (models that have nothing to do with each other are at about 1.4)."
        )
    layers = [
        i for part, d in zip(inspection.parts, source.parts, strict=True) if d.changed == 0 and (i := _layer(part)) >= 0
    ]
    if layers:
        of = sum(part.startswith("layer ") for part in inspection.parts)
        yield f"{source.name} left {len(layers)} of {of} layers as they are in {base}: {ranges(layers)}."


def _of_large(sources: Sequence[SourceDistance]) -> Iterable[str]:
    large = [f"{s.name} ({s.whole.mean_change:.2g})" for s in sources if s.whole.mean_change > LARGE_CHANGE]
    if large:
        yield (
            f"The changes of {', '.join(large)} are large (more than {LARGE_CHANGE} in the mean): dropping most "
            "of such, as DARE and DELLA do, mostly fails. Keep their densities high, or take another method."
        )


def _of_rounding(inspection: Inspection, opened: Mapping[str, Source]) -> Iterable[str]:
    """Sources a large part of whose task vectors is rounded away, overall or in some part of the model."""
    base = opened[inspection.base or ""]
    sources = {name: opened[name] for name in (base.name, *(source.name for source in inspection.sources))}
    whole = {name: share for name, share in shares_lost(sources, base.name, base, None).items() if share >= LOSSY}
    by_place = {"": whole} if whole else {}
    for source in inspection.sources:
        shares = {part: d.rounded_away for part, d in zip(inspection.parts, source.parts, strict=True)}
        lossy = {part: share for part, share in shares.items() if share is not None and share >= LOSSY}
        if lossy and source.name not in whole:
            by_place.setdefault(_places(list(lossy)), {})[source.name] = max(lossy.values())
    for where, lost in by_place.items():
        adapted = all(opened[name].changes for name in lost)
        yield f"{rounding_warning(lost, base.dtype, adapted=adapted, where=where)}."


def _places(parts: Sequence[str]) -> str:
    """layers 0-3, 7, norm"""
    layers = [_layer(part) for part in parts if _layer(part) >= 0]
    named = [f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"] if layers else []
    return ", ".join([*named, *(part for part in parts if _layer(part) < 0)])


def _layer(part: str) -> int:
    return int(part.removeprefix("layer ")) if part.startswith("layer ") else -1


def _of_pairs(pairs: Sequence[Pair]) -> Iterable[str]:
    for pair in pairs:
        cosine = pair.whole.cosine
        if cosine is not None and cosine > DUPLICATE:
            yield (
                f"{pair.a} and {pair.b} are nearly the same change (cosine {cosine:.3f}): merging both adds little to "
                "merging one."
            )
        elif cosine is not None and cosine < OPPOSITE:
            yield f"{pair.a} and {pair.b} work against each other (cosine {cosine:.3f}): their sum undoes part of both."
