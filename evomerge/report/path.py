"""The path of a recipe for people: runs of layers as text, and a picture of them as SVG.

A source's share of a hop is its share of the absolute weights in the blends of attention and mlp. The base of task
vectors is shown only if nothing is added to it, and a source without weight is not shown.
"""

from __future__ import annotations

import itertools
import textwrap
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.blends import shares_of
from evomerge.errors import InputError
from evomerge.printable import ranges
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.svg import COLOURS, DARK, LIGHT, bound, label, legible, shape, shortened

_PLOT, _LEFT, _RIGHT = 880.0, 40.0, 16.0  # the plot's usual width and its margins, in the picture's units
_BANDS = 420.0  # the usual height of all bands together
_TOP, _NAME, _GAP, _ROW = 58.0, 20.0, 12.0, 20.0  # title and hops; a source's name; below a band; a line of the legend
_KIND = "evomerge-path"
_GLUE = "\N{NO-BREAK SPACE}"  # textwrap does not break lines at it


@dataclass(frozen=True)
class _Step:
    """A hop as it is shown: the layer and the share of each of its sources; shares sum to 1."""

    number: int
    layers: Mapping[str, int]
    shares: Mapping[str, float]
    scale: float

    @property
    def main(self) -> str:
        """The source with the largest share; the first one if there are several."""
        return max(self.shares, key=self.shares.__getitem__)


def _steps(recipe: StackRecipe) -> list[_Step]:
    """Every hop of the path, in order."""
    by_blend = [_shares(blend) for blend in recipe.blends]
    steps = []
    for number, hop in enumerate(recipe.hops):
        parts = by_blend[hop.attention], by_blend[hop.mlp]
        shares = {name: sum(part.get(name, 0.0) for part in parts) / 2 for name in {**parts[0], **parts[1]}}
        steps.append(_Step(number, {name: hop.layer_of(name) for name in shares}, shares, hop.scale))
    return steps


def _shares(blend: Blend) -> dict[str, float]:
    """The share of each source in a blend; shares sum to 1, and sources without a share are left out."""
    parts = {name: abs(share) for name, share in shares_of(blend).items()}
    total = sum(parts.values())
    if not total:  # nothing is added to the base
        parts = dict.fromkeys([blend.base] if blend.base else blend.sources, 1.0)
        total = sum(parts.values())
    return {name: part / total for name, part in parts.items() if part}


def _used(path: Sequence[_Step], depths: Mapping[str, int]) -> dict[str, int]:
    """The depths of the sources that the path uses, in the order of ``depths``.

    Sources of unknown depth come last, with the depth of the deepest layer that the path uses.
    """
    seen: dict[str, int] = {}
    for step in path:
        for name, layer in step.layers.items():
            seen[name] = max(seen.get(name, 0), layer + 1)
    return {name: depth for name, depth in depths.items() if name in seen} | {
        name: depth for name, depth in seen.items() if name not in depths
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def is_plain(recipe: Recipe, depths: Mapping[str, int]) -> bool:
    """Whether hop i is the complete, unscaled layer i of the same sources, as in a merge of weights alone, or there is
    no path.
    """
    if not isinstance(recipe, StackRecipe):
        return True
    path = _steps(recipe)
    return _is_plain(path, _used(path, depths))


def path_text(recipe: Recipe, depths: Mapping[str, int], width: int = 100) -> list[str]:
    """The path in runs of layers, then what it skips and repeats of each source; empty for a recipe without a path.

    A single line if every hop takes its own layer of the same sources, as in a merge of weights alone.

    Args:
        recipe: the recipe.
        depths: the number of layers of each source, in the order of the lines.
        width: the maximum length of a line, unless a single run is longer.
    """
    if not isinstance(recipe, StackRecipe):
        return []
    path = _steps(recipe)
    sources = _used(path, depths)
    if _is_plain(path, sources):
        names = _listed(sources)
        what = f"all layers in order, {names} merged in each" if len(sources) > 1 else f"all layers of {names} in order"
        return _wrapped(f"{_hops(path)}: {what}", width)
    lines = _wrapped(f"{_hops(path)} through {_listed(sources)}{_scaling_words(recipe, path)}", width)
    lines += _wrapped(f"{_GLUE}→ ".join(_legs(path)), width, indent="  ")
    for name, depth in sources.items():
        lines += _wrapped(f"{name}: {_coverage(path, name, depth)}", width)
    return lines


def _coverage(path: Sequence[_Step], name: str, depth: int) -> str:
    """How much of a source the path uses: '20 of 24 layers; skips 6, 12-14; 2 times 3-5, 8'."""
    times = Counter(step.layers[name] for step in path if name in step.layers)
    parts = [f"{len(times)} of {depth} layers"]
    if skipped := [layer for layer in range(depth) if layer not in times]:
        parts.append(f"skips {ranges(skipped)}")
    for count in sorted(set(times.values()) - {1}):
        parts.append(f"{count} times {ranges(sorted(layer for layer, n in times.items() if n == count))}")
    return "; ".join(parts)


def _is_plain(path: Sequence[_Step], sources: Mapping[str, int]) -> bool:
    """Whether hop i is the complete, unscaled layer i of the same sources."""
    return all(depth == len(path) for depth in sources.values()) and all(
        step.scale == 1.0 and step.layers == dict.fromkeys(sources, step.number) for step in path
    )


def _legs(path: Iterable[_Step]) -> list[str]:
    """Stretches of the path in the same sources, as runs of layers: 'maths 0-5, 8' for hops through 0 to 5 and 8."""
    legs = []
    for _, hops in itertools.groupby(path, key=lambda step: list(step.layers)):
        runs: list[list[_Step]] = []
        for step in hops:
            if not runs or step.layers != {name: layer + 1 for name, layer in runs[-1][-1].layers.items()}:
                runs.append([])
            runs[-1].append(step)
        names = "+".join(runs[0][0].layers)
        legs.append(f"{names} ".replace(" ", _GLUE) + ", ".join(_run(run) for run in runs))
    return legs


def _run(run: Sequence[_Step]) -> str:
    """The layers of a run, '4-6', or '4-6+6-8' if its sources have different ones, and its scales."""
    ends = [(first, run[-1].layers[name]) for name, first in run[0].layers.items()]
    text = "+".join(_span(*end) for end in (ends if len(set(ends)) > 1 else ends[:1]))
    scales = [step.scale for step in run]
    return text if set(scales) == {1.0} else f"{text} (x{_scale_range(scales)})".replace(" ", _GLUE)


def _scaling_words(recipe: StackRecipe, path: Sequence[_Step]) -> str:
    if not recipe.is_scaled:
        return ""
    what = "the stream" if recipe.scaling == "stream" else "what a hop adds"
    return f"; x{_scale_range([step.scale for step in path])} scales {what}"


def _scale_range(scales: Sequence[float]) -> str:
    low, high = _number(min(scales)), _number(max(scales))
    return low if low == high else f"{low} to {high}"


def _number(scale: float) -> str:
    return f"{round(scale, 2) + 0.0:g}"  # + 0.0: no -0


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _hops(path: Sequence[_Step]) -> str:
    return "1 hop" if len(path) == 1 else f"{len(path)} hops"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent or "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace(_GLUE, " ") for line in lines]


# ---- picture ---------------------------------------------------------------------------------------------------------


def path_svg(recipe: Recipe, depths: Mapping[str, int], title: str) -> str:
    """The path as a picture: a band for each source, hops from left to right, layers in a band from bottom to top.

    A single source is one rising line. A hop that mixes sources has a dot in each of their bands, sized by the source's
    share and joined by a line. The line that leads to a hop is as thick as the hop's scale, and dashed if the scale is
    negative. Each hop has a description on hover; ``path_text`` is the description for screen readers.

    Args:
        recipe: the recipe.
        depths: the number of layers of each source, in the order of the bands.
        title: shown above, and the picture's name.

    Returns:
        A self-contained SVG element without scripts and fonts. It follows the reader's light or dark scheme.

    Raises:
        InputError: the recipe has no path.
    """
    if not isinstance(recipe, StackRecipe):
        raise InputError("recipe", f"is of the kind {recipe.kind}, which has no path through layers to draw")
    return _Picture(recipe, depths).draw(title)


class _Picture:
    """The layout and the drawing of the picture."""

    def __init__(self, recipe: StackRecipe, depths: Mapping[str, int]) -> None:
        self._recipe = recipe
        self._path = _steps(recipe)
        self._sources = _used(self._path, depths)
        self._words = path_text(recipe, depths, width=10_000)
        self._step_x = min(64.0, max(5.0, _PLOT / len(self._path)))
        self._step_y = min(11.0, max(3.0, _BANDS / sum(self._sources.values())))
        self._radius = min(5.0, max(1.8, 0.38 * self._step_x))
        self._plot = max(480.0, self._step_x * len(self._path))
        self._tops: dict[str, float] = {}
        bottom = _TOP
        for name in self._sources:
            self._tops[name] = bottom + _NAME
            bottom += _NAME + self._height(name) + _GAP
        self._bottom = bottom - _GAP
        scales = [abs(step.scale) for step in self._path]
        self._low, self._high = min(1.0, *scales), max(1.0, *scales)

    def _height(self, name: str) -> float:
        return self._step_y * self._sources[name] + 6.0

    def _x(self, number: float) -> float:
        return _LEFT + self._step_x * (number + 0.5)

    def _y(self, name: str, layer: int) -> float:
        return self._tops[name] + self._height(name) - 3.0 - self._step_y * (layer + 0.5)

    def _thickness(self, scale: float) -> float:
        """The line width for a scale, from hairline to almost a dot over the range of this path's scales."""
        if self._low == self._high:
            return 0.7 * self._radius
        return self._radius * (0.25 + (abs(scale) - self._low) / (self._high - self._low))

    def _colour(self, name: str) -> str:
        return f"s{list(self._sources).index(name) % len(COLOURS)}"

    def draw(self, title: str) -> str:
        mixed = any(len(step.shares) > 1 for step in self._path)
        legend = [self._scale_legend] * self._recipe.is_scaled + [self._share_legend] * mixed
        width, height = _LEFT + self._plot + _RIGHT, self._bottom + 26.0 + _ROW * len(legend)
        svg = ET.Element(
            "svg", {"class": _KIND}, xmlns="http://www.w3.org/2000/svg", role="img",
            viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}", height=f"{height:g}",
        )  # fmt: skip
        ET.SubElement(svg, "title").text = legible(title)
        ET.SubElement(svg, "desc").text = legible(". ".join(line.strip() for line in self._words))
        ET.SubElement(svg, "style").text = _style()
        shape(svg, "rect", "ground", width=width, height=height, rx=6)
        label(svg, shortened(title, width - 2 * _RIGHT, 8.2), "title", _RIGHT, 27)
        label(svg, shortened(self._words[0], width - 2 * _RIGHT, 6.2), "quiet", _RIGHT, 46)
        for name in self._sources:
            self._band(svg, name)
        self._hop_axis(svg)
        self._route(svg)
        for step in self._path:
            self._hop(svg, step)
        for name in self._sources:  # on top of the lines that cross them
            self._name(svg, name)
        for row, draw in enumerate(legend):
            draw(svg, self._bottom + 36.0 + _ROW * row)
        return ET.tostring(svg, encoding="unicode")

    def _band(self, svg: ET.Element, name: str) -> None:
        box = {"x": _LEFT, "y": self._tops[name], "width": self._plot, "height": self._height(name), "rx": 3.0}
        shape(svg, "rect", f"band {self._colour(name)}", **box)
        every = next((n for n in (1, 2, 5, 10, 20, 50) if n * self._step_y >= 16), 100)
        for layer in range(0, self._sources[name], every):
            y = self._y(name, layer)
            shape(svg, "line", "guide", x1=_LEFT, x2=_LEFT + self._plot, y1=y, y2=y)
            label(svg, str(layer), "tick end", _LEFT - 6, y + 3.5)

    def _name(self, svg: ET.Element, name: str) -> None:
        taken = len({step.layers[name] for step in self._path if name in step.layers})
        count = f"{taken} of {self._sources[name]} layers"
        shown = shortened(name, self._plot - 7.0 * len(count), 8.0)
        name_text = label(svg, shown, f"name {self._colour(name)}", _LEFT, self._tops[name] - 6)
        ET.SubElement(name_text, "tspan", {"class": "quiet", "dx": "8"}).text = count

    def _hop_axis(self, svg: ET.Element) -> None:
        every = next((n for n in (1, 2, 5, 10, 20, 50) if n * self._step_x >= 26), 100)
        for number in range(0, len(self._path), every):
            label(svg, str(number), "tick middle", self._x(number), self._bottom + 14)
        label(svg, "hop", "tick end", _LEFT - 6, self._bottom + 14)
        label(svg, "layer", "tick end", _LEFT - 6, min(self._tops.values()) - 6)

    def _route(self, svg: ET.Element) -> None:
        """The lines to each hop: along each source that continues, or else from one main source to the next."""
        for before, step in zip([None, *self._path], self._path, strict=False):
            if before is None:
                ways = [(name, name) for name in step.layers]
            else:
                ways = [(name, name) for name in step.layers if name in before.layers] or [(before.main, step.main)]
            for start, end in ways:
                layer = step.layers[end]
                came = layer if before is None else before.layers[start]
                runs_on = start == end and (before is None or layer == came + 1)
                line = shape(
                    svg, "line", f"route {self._colour(end)}" if runs_on else "route jump",
                    x1=self._x(step.number - (0.45 if before is None else 1)), y1=self._y(start, came),
                    x2=self._x(step.number), y2=self._y(end, layer),
                )  # fmt: skip
                self._set_thickness(line, step.scale)

    def _set_thickness(self, line: ET.Element, scale: float) -> None:
        line.set("stroke-width", f"{self._thickness(scale):.2f}")
        if scale < 0:
            line.set("stroke-dasharray", "2 2")

    def _hop(self, svg: ET.Element, step: _Step) -> None:
        group = ET.SubElement(svg, "g", {"class": "hop"})
        ET.SubElement(group, "title").text = legible(_hop_words(step))
        top, x = self._tops[next(iter(self._sources))], self._x(step.number)
        shape(group, "rect", "reach", x=x - self._step_x / 2, y=top, width=self._step_x, height=self._bottom - top)
        places = {name: self._y(name, layer) for name, layer in step.layers.items()}
        if len(places) > 1:
            shape(group, "line", "join", x1=x, x2=x, y1=min(places.values()), y2=max(places.values()))
        for name, y in places.items():
            _dot(group, self._colour(name), x, y, self._radius, step.shares[name])

    def _scale_legend(self, svg: ET.Element, y: float) -> None:
        x = _LEFT
        for scale in sorted({self._low, 1.0, self._high}):
            line = shape(svg, "line", "route plain", x1=x, x2=x + 24, y1=y - 4, y2=y - 4)
            self._set_thickness(line, scale)
            label(svg, f"x{_number(scale)}", "tick", x + 32, y)
            x += 80
        what = "the stream before a hop" if self._recipe.scaling == "stream" else "what a hop adds"
        broken = "; broken: negative" if any(step.scale < 0 for step in self._path) else ""
        label(svg, f"scales {what}{broken}", "tick", x, y)

    def _share_legend(self, svg: ET.Element, y: float) -> None:
        x = _LEFT
        for share in (0.25, 0.5, 1.0):
            _dot(svg, "plain", x + 12, y - 4, self._radius, share)
            label(svg, f"{share:.0%}", "tick", x + 32, y)
            x += 80
        label(svg, "of the hop is this source", "tick", x, y)


def _hop_words(step: _Step) -> str:
    """'hop 7: layer 12 of maths, scale 1.08'; with shares if sources are mixed."""
    parts = []
    for name, layer in step.layers.items():
        share = f" ({step.shares[name]:.0%})" if len(step.layers) > 1 else ""
        parts.append(f"layer {layer} of {name}{share}")
    scale = "" if step.scale == 1.0 else f", scale {_number(step.scale)}"
    return f"hop {step.number}: {', '.join(parts)}{scale}"


def _style() -> str:
    """Colours for light and dark; every rule is scoped to this kind of picture, which may be embedded in a page."""
    rules = [
        "text{font-family:system-ui,sans-serif;font-size:11px}",
        ".title{font-size:15px;font-weight:600}",
        ".name{font-size:13px;font-weight:600;fill:currentColor;paint-order:stroke;stroke-width:4}",
        ".name .quiet{font-weight:400;font-size:11px}.end{text-anchor:end}.middle{text-anchor:middle}",
        ".band{fill:currentColor;fill-opacity:.06}.guide{stroke-width:1}",
        ".route{stroke:currentColor;stroke-linecap:round}.jump{stroke-opacity:.6}",
        ".join{stroke-opacity:.35;stroke-width:1}.dot{fill:currentColor;stroke-width:.8}",
        ".reach{fill:transparent}.hop:hover .reach{fill:currentColor;fill-opacity:.12}",
    ]
    common = "".join(bound(rule, _KIND) for rule in rules)
    return common + _scheme(LIGHT, 0) + "@media(prefers-color-scheme:dark){" + _scheme(DARK, 1) + "}"


def _scheme(tones: Mapping[str, str], column: int) -> str:
    text = (
        f".ground{{fill:{tones['ground']}}}.dot,.name{{stroke:{tones['ground']}}}.title,.plain{{fill:{tones['ink']}}}"
        f".plain,.reach{{color:{tones['ink']}}}.quiet,.tick{{fill:{tones['quiet']}}}.jump{{color:{tones['quiet']}}}"
        f".guide{{stroke:{tones['guide']}}}.join{{stroke:{tones['ink']}}}"
    )
    sources = "".join(f".s{n}{{color:{pair[column]}}}" for n, pair in enumerate(COLOURS))
    return bound(text + sources, _KIND)


def _dot(parent: ET.Element, colour: str, x: float, y: float, radius: float, share: float) -> None:
    """A dot whose area is its share, with a visible minimum."""
    shape(parent, "circle", f"dot {colour}", cx=x, cy=y, r=radius * max(0.3, share**0.5))
