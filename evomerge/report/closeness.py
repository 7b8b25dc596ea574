"""An inspection as shown to people: tables, a matrix and a heat map that fit a terminal of 80 columns."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence

from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from evomerge.report.entries import percent
from evomerge.report.inspected import Closeness, Inspection, ModelFacts, Pair

_COLUMN = 6  # the column width of the heat map: five characters and a space
_DARK, _WARM, _COLD, _AGAINST = (40, 40, 40), (255, 170, 40), (70, 170, 255), (240, 70, 60)

Cell = tuple[str, Style]


def shown(inspection: Inspection, width: int) -> RenderableType:
    """The whole inspection, no wider than ``width``."""
    if inspection.base is None:
        return _alone(inspection.models[0])
    parts: list[RenderableType] = [_models(inspection)]
    if inspection.sources:
        title = f"task vectors d: each source less {inspection.base}, which is b"
        parts += [Text(""), Text(title, style="italic"), _sources(inspection)]
    if inspection.pairs:
        title = "cosine of task vectors; above the diagonal, share of equal signs (by chance 0.5)"
        parts += [Text(""), Text(title, style="italic"), _matrix(inspection)]
    if any(pair.whole.overlap is not None for pair in inspection.pairs):
        title = "overlap of the directions that task vectors change (1: the same ones; by chance 0)"
        parts += [Text(""), Text(title, style="italic"), _overlaps(inspection)]
    for table in _heat_maps(inspection, width):
        parts += [Text(""), table]
    if inspection.left_out:
        left_out = inspection.left_out
        names = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if left_out[3:] else "")
        parts += [Text(""), Text(f"not compared, since not all have them in one shape: {names}")]
    if inspection.warnings:
        parts += [Text(""), _listed(inspection.warnings)]
    elif inspection.sources:
        parts += [Text(""), Text("Nothing speaks against merging these.", style="green")]
    if inspection.advice:
        parts += [Text(""), _listed([f"{advice.text} ({advice.source})" for advice in inspection.advice], style="")]
    return Group(*parts)


def _alone(facts: ModelFacts) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", facts.reference)
    table.add_row("architecture", f"{facts.architecture}, {facts.layers} layers, hidden size {facts.hidden_size:,}")
    table.add_row("parameters", f"{_count(facts.parameters)}, {facts.dtype}, {_size(facts.bytes)}")
    if facts.seeing is not None:
        table.add_row("reads images", f"{_count(facts.seeing)} of the parameters stand beside the text model for that")
    head = "the head is the embedding" if facts.tied else "the head has weights of its own"
    table.add_row("vocabulary", f"{facts.vocab_size:,} rows, {_tokens(facts)} tokens; {head}")
    for adapter in facts.adapters:
        table.add_row("adapter", adapter)
    if facts.prompt is not None:
        table.add_row("prompt", facts.prompt)
    for warning in facts.warnings:
        table.add_row("warning", warning)
    return table


def _models(inspection: Inspection) -> Table:
    table = _table("model", "architecture", "layers", "parameters", "dtype", "tokens")
    for facts in inspection.models:
        name = f"{facts.name} (base)" if facts.name == inspection.base else facts.name
        table.add_row(
            name, facts.architecture.removesuffix("ForCausalLM"), str(facts.layers), _count(facts.parameters),
            facts.dtype, _tokens(facts),
        )  # fmt: skip
    return table


def _sources(inspection: Inspection) -> Table:
    table = _table("", "source", "|d| / |b|", "mean |d|", "changed", "effective rank")
    for letter, source in zip(_letters(inspection), inspection.sources, strict=True):
        whole = source.whole
        table.add_row(
            letter, source.name, percent(whole.relative_norm), f"{whole.mean_change:.2g}", percent(whole.changed),
            _rank(whole.effective_rank)[0],
        )  # fmt: skip
    return table


def _matrix(inspection: Inspection) -> Table:
    letters = _letters(inspection)
    table = _table("", *letters, texts=1)
    pairs = {frozenset((pair.a, pair.b)): pair.whole for pair in inspection.pairs}
    for k, (letter, source) in enumerate(zip(letters, inspection.sources, strict=True)):
        cells = []
        for m, other in enumerate(inspection.sources):
            if m == k:
                cells.append(Text(""))
                continue
            near = pairs[frozenset((source.name, other.name))]
            cells.append(Text(*(_cosine(near.cosine) if m < k else _agreement(near))))
        table.add_row(letter, *cells)
    return table


def _overlaps(inspection: Inspection) -> Table:
    letters = _letters(inspection)
    table = _table("", *letters[:-1], texts=1)
    pairs = {frozenset((pair.a, pair.b)): pair.whole for pair in inspection.pairs}
    for k, (letter, source) in enumerate(zip(letters, inspection.sources, strict=True)):
        if k:
            others = [pairs[frozenset((source.name, other.name))] for other in inspection.sources[:k]]
            table.add_row(letter, *(Text(*_cosine(near.overlap)) for near in others))
    return table


def _heat_maps(inspection: Inspection, width: int) -> Iterator[Table]:
    """Parts of the model by sources (their relative norms) and pairs, in as many tables as the width requires."""
    letters = dict(zip((source.name for source in inspection.sources), _letters(inspection), strict=True))
    most = max((d.relative_norm or 0.0 for source in inspection.sources for d in source.parts), default=0.0)
    columns: list[tuple[str, Sequence[Cell]]] = [
        (f"d/b\n{letters[source.name]}", [_norm(d.relative_norm, most) for d in source.parts])
        for source in inspection.sources
    ]
    ranked = [d.effective_rank for source in inspection.sources for d in source.parts if d.effective_rank is not None]
    if ranked:
        columns += [
            (f"rank\n{letters[source.name]}", [_rank(d.effective_rank, max(ranked)) for d in source.parts])
            for source in inspection.sources
        ]
    columns += [
        (f"cos\n{_both(letters, pair)}", [_cosine(near.cosine) for near in pair.parts]) for pair in inspection.pairs
    ]
    label = max((len(part) for part in inspection.parts), default=0)
    at_once = max(1, (width - label - 1) // _COLUMN)
    for start in range(0, len(columns), at_once):
        some = columns[start : start + at_once]
        table = Table(box=None, pad_edge=False, padding=0)
        table.add_column("", min_width=label + 1)
        for title, _ in some:
            table.add_column(title, justify="right", no_wrap=True)
        for row, part in enumerate(inspection.parts):
            table.add_row(part, *(Text(f"{text:>{_COLUMN}}", style) for text, style in (c[row] for _, c in some)))
        yield table


def _both(letters: dict[str, str], pair: Pair) -> str:
    return f"{letters[pair.a]}·{letters[pair.b]}"


def _letters(inspection: Inspection) -> list[str]:
    alphabet = string.ascii_uppercase
    return [alphabet[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(len(inspection.sources))]


def _table(*titles: str, texts: int = 2) -> Table:
    """A table whose first ``texts`` columns are texts, and the others numbers."""
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < texts else "right", overflow="fold")
    return table


# ---- cells -----------------------------------------------------------------------------------------------------------


def _norm(value: float | None, most: float) -> Cell:
    share = value / most if value and most else 0.0
    return percent(value), _style(_WARM, share)


def _rank(value: float | None, most: float = 0.0) -> Cell:
    if value is None:
        return "·", Style()
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}", _style(_WARM, value / most if most else 0.0)


def _cosine(value: float | None) -> Cell:
    """Blue for changes that agree, red for changes that conflict."""
    if value is None:
        return "·", Style()
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00", _style(
        _COLD if value >= 0 else _AGAINST, abs(value) ** 0.5
    )  # most are small


def _agreement(near: Closeness) -> Cell:
    return ("·" if near.sign_agreement is None else f"{near.sign_agreement:.2f}"), Style()


def _style(colour: tuple[int, int, int], share: float) -> Style:
    red, green, blue = (round(dark + (bright - dark) * share) for dark, bright in zip(_DARK, colour, strict=True))
    luminance = 0.3 * red + 0.59 * green + 0.11 * blue
    text = Color.from_rgb(0, 0, 0) if luminance > 110 else Color.from_rgb(255, 255, 255)
    return Style(color=text.name, bgcolor=Color.from_rgb(red, green, blue).name)


def _tokens(facts: ModelFacts) -> str:
    return "no" if facts.tokens is None else f"{facts.tokens:,}"


def _listed(sentences: Sequence[str], style: str = "yellow") -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        table.add_row("-", sentence, style=style)
    return table


def _size(count: int) -> str:
    """A number of bytes for people: 14.5 GB, 2.8 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _count(count: int) -> str:
    """A number of parameters for people: 7.24 B, 1.4 M, 33.9 k."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} B"
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.1f} k"
