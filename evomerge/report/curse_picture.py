"""The winner's curse as an SVG plot: search score on the x axis, held-out score on the y axis."""

from __future__ import annotations

import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import numpy as np

from evomerge.report.curse import Curse, SplitScores, curse_text
from evomerge.report.entries import measure_text
from evomerge.report.svg import COLOURS, DARK, LIGHT, bound, label, legible, shape, shortened

_PLOT, _LEFT, _TOP, _RIGHT = 520.0, 66.0, 62.0, 24.0  # the square plot's side and its margins, in the picture's units
_AXIS, _ROW = (
    44.0,
    18.0,
)  # the room for an axis with ticks and title; the height of a line of text
_DOT, _MARK, _HALO = 4.2, 5.0, 8.5  # radii of a candidate, a baseline and the ring around the winner
_NEAR = 13.0  # from a mark to its name
_LETTER = 6.1  # the usual width of a letter of the text
_TICKS = 7  # the approximate number on an axis
_ROOM = 1.0  # how far baselines may extend the range of the candidates, relative to it; others are listed as text
_KIND = "evomerge-curse"
_FOUND, _BASELINE, _WINNER = (COLOURS[number] for number in (0, 1, 2))


def curse_svg(curse: Curse) -> str:
    """The winner's curse as an SVG: one plot, or for a front one plot per objective, stacked vertically.

    There is a dot for each candidate with both scores, filled if it could win and open if it was scored only for the
    plot; diamonds are baselines; bars are standard errors. A candidate on the diagonal is as good as it looked; one
    below it was lucky (above it if an objective is minimised). The line is the regression of held-out on search scores.
    Points have a description on hover; ``curse_text`` is the description for screen readers.

    Returns:
        A self-contained SVG element without scripts and fonts. It follows the reader's light or dark scheme.
    """
    plots = [_Picture(one).draw() for one in curse.all if one.candidates] or [_Picture(curse).draw()]
    if len(plots) == 1:
        return ET.tostring(plots[0], encoding="unicode")
    width = max(float(plot.get("width", "")) for plot in plots)
    svg = ET.Element("svg", {"class": _KIND}, xmlns="http://www.w3.org/2000/svg")
    height = 0.0
    for plot in plots:
        plot.set("y", f"{height:g}")
        height += float(plot.get("height", ""))
        svg.append(plot)
    for key, value in {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}.items():
        svg.set(key, value)
    return ET.tostring(svg, encoding="unicode")


class _Picture:
    """The layout and the drawing of the picture."""

    def __init__(self, curse: Curse) -> None:
        self._curse = curse
        self._low, self._high = _range(curse)
        self._near = [point for point in curse.baselines if self._holds(point)]
        self._far = [point for point in curse.baselines if not self._holds(point)]
        width = int((_LEFT + _PLOT + _RIGHT - 32) / _LETTER)
        self._words = [row for line in self._sentences() for row in textwrap.wrap(line, width)]

    def _sentences(self) -> list[str]:
        if not self._far:
            return curse_text(self._curse)
        places = ", ".join(f"{p.label} ({p.search.mean:.3f}, {p.held_out.mean:.3f})" for p in self._far)
        return [*curse_text(self._curse), f"Outside the picture: {places}."]

    def _holds(self, point: SplitScores) -> bool:
        return all(self._low <= value.mean <= self._high for value in (point.search, point.held_out))

    def _x(self, value: float) -> float:
        return _LEFT + _PLOT * (value - self._low) / (self._high - self._low)

    def _y(self, value: float) -> float:
        return _TOP + _PLOT * (self._high - value) / (self._high - self._low)

    def draw(self) -> ET.Element:
        width, legend = _LEFT + _PLOT + _RIGHT, _TOP + _PLOT + _AXIS + _ROW
        height = legend + _ROW * (len(self._words) + 1.6)
        svg = ET.Element(
            "svg", {"class": _KIND}, xmlns="http://www.w3.org/2000/svg", role="img",
            viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}", height=f"{height:g}",
        )  # fmt: skip
        title = f"{self._curse.search}: do the best stay the best?"
        ET.SubElement(svg, "title").text = legible(title)
        ET.SubElement(svg, "desc").text = legible(" ".join(self._sentences()))
        ET.SubElement(svg, "style").text = _style()
        shape(svg, "rect", "ground", width=width, height=height, rx=6)
        label(svg, shortened(title, width - 32, 8.2), "title", 16, 27)
        arrow = "more is better" if self._curse.maximise else "less is better"
        label(svg, shortened(f"{self._curse.objective}; {arrow}", width - 32, _LETTER), "quiet", 16, 46)
        self._axes(svg)
        self._lines(svg)
        for point in reversed(self._curse.candidates):  # the best on top
            self._point(svg, point, "found" if point.confirmed else "found drawn")
        for point in self._near:
            self._point(svg, point, "baseline")
        self._names(svg)
        self._legend(svg, legend)
        for row, words in enumerate(self._words):
            label(svg, words, "quiet", 16, legend + _ROW * (row + 1.6))
        return svg

    def _axes(self, svg: ET.Element) -> None:
        left, bottom = _LEFT, _TOP + _PLOT
        shape(svg, "rect", "frame", x=left, y=_TOP, width=_PLOT, height=_PLOT, rx=3)
        step = _step(self._high - self._low)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        for n in range(math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9) + 1):
            x, y = self._x(n * step), self._y(n * step)
            shape(svg, "line", "guide", x1=x, x2=x, y1=_TOP, y2=bottom)
            shape(svg, "line", "guide", x1=left, x2=left + _PLOT, y1=y, y2=y)
            label(svg, f"{n * step:.{digits}f}", "tick middle", x, bottom + 16)
            label(svg, f"{n * step:.{digits}f}", "tick end", left - 7, y + 3.5)
        label(svg, "score on search items", "axis middle", left + _PLOT / 2, bottom + 36)
        upright = label(svg, "score on held-out items", "axis middle", 0, 0)
        upright.set("transform", f"translate(20 {_TOP + _PLOT / 2:g}) rotate(-90)")

    def _lines(self, svg: ET.Element) -> None:
        """The diagonal, and the regression over the range of the candidates."""
        ends = {
            "x1": self._x(self._low),
            "y1": self._y(self._low),
            "x2": self._x(self._high),
            "y2": self._y(self._high),
        }
        shape(svg, "line", "diagonal", **ends)
        if self._curse.slope is None:
            return
        x = [point.search.mean for point in self._curse.candidates]
        y = [point.held_out.mean for point in self._curse.candidates]
        at = [float(np.mean(y) + self._curse.slope * (end - np.mean(x))) for end in (min(x), max(x))]
        line = {"x1": self._x(min(x)), "y1": self._y(at[0]), "x2": self._x(max(x)), "y2": self._y(at[1])}
        shape(svg, "line", "trend", **line)

    def _point(self, svg: ET.Element, point: SplitScores, kind: str) -> None:
        group = ET.SubElement(svg, "g", {"class": f"{kind} winner" if point.winner else kind})
        name = f"{point.id} {point.label}".strip()
        scores = [f"{where} {measure_text(v.mean, v.stderr)}" for where, v in
                (("search", point.search), ("held out", point.held_out))]  # fmt: skip
        ET.SubElement(group, "title").text = legible(f"{name}: {', '.join(scores)}")
        x, y = self._x(point.search.mean), self._y(point.held_out.mean)
        reach = [_PLOT * (value.stderr or 0.0) / (self._high - self._low) for value in (point.search, point.held_out)]
        right, bottom = _LEFT + _PLOT, _TOP + _PLOT
        shape(group, "line", "bar", x1=max(_LEFT, x - reach[0]), x2=min(right, x + reach[0]), y1=y, y2=y)
        shape(group, "line", "bar", x1=x, x2=x, y1=max(_TOP, y - reach[1]), y2=min(bottom, y + reach[1]))
        _dot(group, x, y, baseline=point.baseline)
        if point.winner:
            shape(group, "circle", "ring", cx=x, cy=y, r=_HALO)

    def _names(self, svg: ET.Element) -> None:
        """The names of baselines and the winner, stacked if they are close, and kept inside the plot."""
        named = [point for point in [*self._curse.candidates, *self._near] if point.winner or point.baseline]
        taken = -math.inf
        for point in sorted(named, key=lambda point: self._y(point.held_out.mean)):
            name = point.label or point.id
            x, y = self._x(point.search.mean), max(self._y(point.held_out.mean) + 3.5, taken + 12)
            taken = y
            text = shortened(f"{name}, winner" if point.winner else name, _PLOT / 2, _LETTER)
            fits = x - _NEAR - 1.1 * _LETTER * len(text) > _LEFT  # bold letters are a little wider
            kind = "name winner" if point.winner else "name baseline"
            label(svg, text, f"{kind} end" if fits else kind, x - _NEAR if fits else x + _NEAR, y)

    def _legend(self, svg: ET.Element, y: float) -> None:
        x = 22.0
        groups = {
            "found": "found",
            "found drawn": "drawn only",
            "baseline": "baseline",
            "found winner": "winner",
            "diagonal": "as good as it looked",
            "trend": "regression",
        }
        for kind, words in groups.items():
            if not self._shows(kind):
                continue
            if kind in ("diagonal", "trend"):
                shape(svg, "line", kind, x1=x - 6, x2=x + 14, y1=y - 4, y2=y - 4)
                x += 8
            else:
                group = ET.SubElement(svg, "g", {"class": kind})
                _dot(group, x, y - 4, baseline=kind == "baseline")
                if kind == "found winner":
                    shape(group, "circle", "ring", cx=x, cy=y - 4, r=_HALO)
            label(svg, words, "tick", x + 12, y)
            x += 36 + _LETTER * len(words)

    def _shows(self, kind: str) -> bool:
        """Whether the picture has an element of this kind."""
        candidates = self._curse.candidates
        has = {"found drawn": any(not p.confirmed for p in candidates), "baseline": bool(self._near),
               "found winner": any(p.winner for p in candidates), "trend": self._curse.slope is not None}  # fmt: skip
        return has.get(kind, True)


def _dot(parent: ET.Element, x: float, y: float, *, baseline: bool) -> None:
    if not baseline:
        shape(parent, "circle", "dot", cx=x, cy=y, r=_DOT)
        return
    corners = ((x, y - _MARK), (x + _MARK, y), (x, y + _MARK), (x - _MARK, y))
    diamond = shape(parent, "polygon", "dot")
    diamond.set("points", " ".join(f"{a:.2f},{b:.2f}" for a, b in corners))


def _range(curse: Curse) -> tuple[float, float]:
    """The range of both axes: all candidates with their errors, and the baselines that are not far away."""
    ends = [
        value.mean + sign * (value.stderr or 0.0)
        for point in curse.candidates
        for value in (point.search, point.held_out)
        for sign in (-1, 1)
    ]
    low, high = min(ends), max(ends)
    room = _ROOM * (high - low)
    for point in curse.baselines:
        means = (point.search.mean, point.held_out.mean)
        if low - room <= min(means) and max(means) <= high + room:
            ends += means
    margin = 0.04 * (max(ends) - min(ends)) or 0.05 * abs(low) or 1.0  # a single score has no range of its own
    return min(ends) - margin, max(ends) + margin


def _step(span: float) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * _TICKS >= span)


def _style() -> str:
    """Colours for light and dark; every rule is scoped to this kind of picture, which may be embedded in a page."""
    rules = [
        "text{font-family:system-ui,sans-serif;font-size:11px}",
        ".title{font-size:15px;font-weight:600}.axis{font-size:12px}.end{text-anchor:end}.middle{text-anchor:middle}",
        ".name{fill:currentColor;font-weight:600;paint-order:stroke;stroke-width:4}",
        ".frame{fill:none;stroke-width:1}.guide{stroke-width:1;stroke-opacity:.5}",
        ".diagonal{stroke-width:1.2;stroke-dasharray:5 4}.trend{stroke:currentColor;stroke-width:2}",
        ".bar{stroke:currentColor;stroke-width:1;stroke-opacity:.28}.dot{fill:currentColor;stroke:currentColor}",
        ".ring{fill:none;stroke:currentColor;stroke-width:2}g:hover .bar{stroke-opacity:1;stroke-width:1.5}",
    ]
    common = "".join(bound(rule, _KIND) for rule in rules)
    return common + _scheme(LIGHT, 0) + "@media(prefers-color-scheme:dark){" + _scheme(DARK, 1) + "}"


def _scheme(tones: Mapping[str, str], column: int) -> str:
    text = (
        f".ground,.drawn .dot{{fill:{tones['ground']}}}.name{{stroke:{tones['ground']}}}"
        f".title{{fill:{tones['ink']}}}.quiet,.tick,.axis{{fill:{tones['quiet']}}}"
        f".guide,.frame{{stroke:{tones['guide']}}}.diagonal{{stroke:{tones['quiet']}}}"
        f".found,.trend{{color:{_FOUND[column]}}}.baseline{{color:{_BASELINE[column]}}}"
        f".winner{{color:{_WINNER[column]}}}"
    )
    return bound(text, _KIND)
