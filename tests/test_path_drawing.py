"""The path of a recipe as people see it: the lines of text, and the picture, read back as XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.recipes.stack import Blend, Scaling, StackRecipe
from evomerge.report.path import path_svg, path_text

SVG = "{http://www.w3.org/2000/svg}"
TWO = {"maths": 8, "ja": 12}
FOUR = dict.fromkeys(("one", "two", "three", "four"), 40)


def alone(source: str) -> Blend:
    return Blend(method="passthrough", sources=(source,), parameters={"scale": {source: 1.0}})


def mixed(**weights: float) -> Blend:
    return Blend(method="linear", sources=tuple(weights), parameters={"weight": dict(weights)})


def recipe_of(
    hops: Sequence[tuple[int | Mapping[str, int], Blend]],
    scales: Sequence[float] | None = None,
    scaling: Scaling = "stream",
) -> StackRecipe:
    first = hops[0][1]
    names = {name for _, blend in hops for name in (*blend.sources, *((blend.base,) if blend.base else ()))}
    return StackRecipe.compose(
        sources={name: name for name in names}, tokenizer=first.sources[0], embedding=first, norm=first, head=first,
        hops=((layer, blend, blend, blend) for layer, blend in hops), scales=scales, scaling=scaling,
    )  # fmt: skip


def path_of(hops: str, scales: Sequence[float] | None = None, scaling: Scaling = "stream") -> StackRecipe:
    """'m0 m1 j4': layers 0 and 1 of maths, then 4 of ja."""
    names = {"m": "maths", "j": "ja"}
    return recipe_of([(int(hop[1:]), alone(names[hop[0]])) for hop in hops.split()], scales, scaling)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [{}, {"maths": 8}, {"ja": 12}, {"other": 3}])
def test_a_path_through_a_source_of_unknown_depth_is_told_and_drawn(known: Mapping[str, int]) -> None:
    path = path_of("m0 m1 j4 m5")
    lines = path_text(path, known)
    assert f"maths: 3 of {known.get('maths', 6)} layers" in lines[-1 if "ja" in known else -2]
    assert f"ja: 1 of {known.get('ja', 5)} layers" in lines[-2 if "ja" in known else -1]
    assert lines[0] in {"4 hops through maths and ja", "4 hops through ja and maths"}
    assert ET.fromstring(path_svg(path, known, "a path")).find(f"{SVG}desc") is not None


def test_a_path_is_told_in_runs_and_what_they_leave_out() -> None:
    found = path_text(path_of("m0 m1 m2 m3 j4 j5 j8 m2 m3 m7", [1, 1, 1, 1, 1.05, 1.05, 1, 0.9, 1.104, 1]), TWO)
    assert found == [
        "10 hops through maths and ja; x0.9 to 1.1 scales the stream",
        "  maths 0-3 → ja 4-5 (x1.05), 8 → maths 2-3 (x0.9 to 1.1), 7",
        "maths: 5 of 8 layers; skips 4-6; 2 times 2-3",
        "ja: 3 of 12 layers; skips 0-3, 6-7, 9-11",
    ]


def test_a_hop_may_be_there_again_and_again() -> None:
    found = path_text(path_of("m0 m1 m1 m1 m0 m2", [1, 1, -1, 1, 1, 1], "update"), {"maths": 3})
    assert found == [
        "6 hops through maths; x-1 to 1 scales what a hop adds",
        "  maths 0-1, 1 (x-1), 1, 0, 2",
        "maths: 3 of 3 layers; 2 times 0; 3 times 1",
    ]


def test_a_merge_of_weights_alone_is_one_line() -> None:
    both = recipe_of([(i, mixed(maths=0.2 * i + 0.1, ja=0.5)) for i in range(6)])
    assert path_text(both, {"maths": 6, "ja": 6}) == ["6 hops: all layers in order, maths and ja merged in each"]
    one = recipe_of([(i, alone("maths")) for i in range(6)])
    assert path_text(one, {"maths": 6, "ja": 6}) == ["6 hops: all layers of maths in order"]
    assert len(path_text(one, {"maths": 7})) > 1  # the last layer is skipped


def test_merged_hops_name_their_sources_and_their_layers() -> None:
    both = mixed(maths=1, ja=1)
    found = path_text(recipe_of([(0, both), (1, both), ({"maths": 2, "ja": 4}, both), (5, alone("ja"))]), TWO)
    assert found[1] == "  maths+ja 0-1, 2+4 → ja 5"


def test_a_weight_of_nothing_is_no_source_and_no_weight_at_all_is_the_base() -> None:
    def tasks(maths: float, ja: float) -> Blend:
        weights = {"maths": maths, "ja": ja}
        return Blend(
            method="task_arithmetic", sources=("maths", "ja"), base="base", parameters={"weight": weights, "lambda": 1}
        )

    found = path_text(recipe_of([(0, tasks(0, 1)), (1, tasks(-2, 0)), (2, tasks(0, 0))]), {"base": 3, **TWO})
    assert found[1] == "  ja 0 → maths 1 → base 2"


@given(st.lists(st.tuples(st.sampled_from(["maths", "ja"]), st.integers(0, 7)), min_size=1, max_size=60))
def test_the_runs_give_the_path_back(hops: list[tuple[str, int]]) -> None:
    recipe = recipe_of([(layer, alone(name)) for name, layer in hops])
    lines, narrow = path_text(recipe, TWO, width=10_000), path_text(recipe, TWO, width=60)
    assert max(len(line) for line in narrow) <= 60
    assert " ".join(line.strip() for line in narrow) == " ".join(line.strip() for line in lines)
    if len(lines) == 1:
        assert hops == [("maths", layer) for layer in range(8)]
        return
    told = []
    for leg in lines[1].strip().split(" → "):
        name, layers = leg.split(" ", 1)
        for run in layers.split(", "):
            first, _, last = run.partition("-")
            told += [(name, layer) for layer in range(int(first), int(last or first) + 1)]
    assert told == hops


# ---- picture ---------------------------------------------------------------------------------------------------------


def drawn(recipe: StackRecipe, depths: Mapping[str, int], title: str = "a path") -> ET.Element:
    return ET.fromstring(path_svg(recipe, depths, title))


def of_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def number(element: ET.Element, name: str) -> float:
    return float(element.attrib[name])


def tooltips(root: ET.Element) -> list[str]:
    return [hop.findtext(f"{SVG}title") or "" for hop in of_class(root, "hop")]


def long_path(hops: int) -> StackRecipe:
    path = [(i * 7 % 40 if i % 5 else i % 40, alone(list(FOUR)[i // 9 % 4])) for i in range(hops)]
    return recipe_of(path, [0.5 + i % 11 / 10 for i in range(hops)])


def test_every_hop_is_a_dot_that_says_what_it_is() -> None:
    root = drawn(path_of("m0 m1 j4 m1", [1, 1, 1.08, 1]), TWO)
    assert tooltips(root) == [
        "hop 0: layer 0 of maths", "hop 1: layer 1 of maths", "hop 2: layer 4 of ja, scale 1.08",
        "hop 3: layer 1 of maths",
    ]  # fmt: skip
    for hop in of_class(root, "hop"):
        assert len(of_class(hop, "dot")) == 1
        assert of_class(hop, "join") == []


@pytest.mark.parametrize("hops", [1, 24, 130, 300])
def test_everything_is_within_the_picture_and_its_own_band(hops: int) -> None:
    root = drawn(long_path(hops), FOUR)
    width, height = number(root, "width"), number(root, "height")
    bands = [(number(band, "y"), number(band, "y") + number(band, "height")) for band in of_class(root, "band")]
    assert all(above[1] < below[0] for above, below in pairwise(bands))
    dots = [of_class(hop, "dot")[0] for hop in of_class(root, "hop")]
    assert len(dots) == hops
    for dot in dots:
        x, y, r = (number(dot, name) for name in ("cx", "cy", "r"))
        assert r < x < width - r
        (low, high) = bands[int(dot.attrib["class"].split()[-1][1:])]
        assert low <= y - r + 1.5
        assert y + r - 1.5 <= high
    assert max(high for _, high in bands) < height
    steps = [number(b, "cx") - number(a, "cx") for a, b in pairwise(dots)]
    assert all(step > 2 * number(dots[0], "r") for step in steps)  # dots never cover each other
    for label in root.iter(f"{SVG}text"):
        assert 0 < number(label, "x") < width
        assert 0 < number(label, "y") < height


def test_a_source_alone_is_one_rising_line() -> None:
    root = drawn(recipe_of([(i, alone("maths")) for i in range(24)]), {"maths": 24, "unused": 24})
    assert len(of_class(root, "band")) == 1
    dots = of_class(root, "dot")
    rises = [number(a, "cy") - number(b, "cy") for a, b in pairwise(dots)]
    assert min(rises) > 0
    assert max(rises) - min(rises) < 0.02
    assert of_class(root, "jump") == []
    assert len({line.attrib["stroke-width"] for line in of_class(root, "route")}) == 1


def test_the_route_goes_through_every_hop() -> None:
    root = drawn(path_of("m0 m1 j4 m1 m1"), TWO)
    dots = [(number(dot, "cx"), number(dot, "cy")) for dot in of_class(root, "dot")]
    lines = of_class(root, "route")
    assert [(number(line, "x2"), number(line, "y2")) for line in lines] == dots
    assert [(number(line, "x1"), number(line, "y1")) for line in lines[1:]] == dots[:-1]
    assert ["jump" in line.attrib["class"] for line in lines] == [False, False, True, True, True]


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=30))
def test_a_line_is_as_thick_as_its_scale_is_large(scales: list[float]) -> None:
    root = drawn(recipe_of([(i, alone("maths")) for i in range(len(scales))], scales, "update"), {"maths": 30})
    lines = of_class(root, "route")[: len(scales)]
    widths = [number(line, "stroke-width") for line in lines]
    by_size = sorted(zip(map(abs, scales), widths, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(by_size))
    assert min(width for _, width in by_size) > 0
    if max(map(abs, scales)) > 1.01 + min(map(abs, scales)):
        assert by_size[0][1] < by_size[-1][1]
    assert ["stroke-dasharray" in line.attrib for line in lines] == [scale < 0 for scale in scales]


def test_a_merged_hop_is_in_the_band_of_each_source_by_its_share() -> None:
    root = drawn(recipe_of([(0, mixed(maths=3, ja=1)), ({"maths": 1, "ja": 5}, mixed(maths=-1, ja=1))]), TWO)
    assert tooltips(root) == [
        "hop 0: layer 0 of maths (75%), layer 0 of ja (25%)",
        "hop 1: layer 1 of maths (50%), layer 5 of ja (50%)",
    ]
    for hop, share in zip(of_class(root, "hop"), (0.75, 0.5), strict=True):
        maths, ja = of_class(hop, "dot")
        (join,) = of_class(hop, "join")
        assert number(maths, "cx") == number(ja, "cx") == number(join, "x1") == number(join, "x2")
        assert sorted((number(join, "y1"), number(join, "y2"))) == [number(maths, "cy"), number(ja, "cy")]
        areas = number(maths, "r") ** 2, number(ja, "r") ** 2
        assert areas[0] / sum(areas) == pytest.approx(share, abs=0.01)


def test_attention_and_mlp_of_two_sources_are_half_and_half() -> None:
    one, two, third = alone("maths"), alone("ja"), mixed(maths=1, ja=3)
    recipe = StackRecipe.compose(
        sources={"maths": "m", "ja": "j"}, tokenizer="maths", embedding=one, norm=one, head=one,
        hops=[(0, one, two, one), (1, one, third, one)],
    )  # fmt: skip
    assert tooltips(drawn(recipe, TWO)) == [
        "hop 0: layer 0 of maths (50%), layer 0 of ja (50%)",
        "hop 1: layer 1 of maths (62%), layer 1 of ja (38%)",
    ]


def test_slerp_shares_by_its_t() -> None:
    blend = Blend(method="slerp", sources=("maths", "ja"), parameters={"t": 0.2})
    assert tooltips(drawn(recipe_of([(3, blend)]), TWO)) == ["hop 0: layer 3 of maths (80%), layer 3 of ja (20%)"]


def test_names_are_text_and_never_markup() -> None:
    name, title = '<b onload="x()">&amp;', "</title><script>alert(1)</script>\x00 ]]>"
    root = drawn(recipe_of([(0, alone(name)), (1, alone(name))]), {name: 2}, title)
    assert root.findtext(f"{SVG}title") == title.replace("\x00", "\ufffd")
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "rect", "text", "tspan", "line", "g", "circle",
    }  # fmt: skip
    assert tooltips(root)[1] == f"hop 1: layer 1 of {name}"


def test_it_can_be_read_aloud_and_in_the_dark() -> None:
    recipe = path_of("m0 m1 j4", [1, 1.5, 1])
    root = drawn(recipe, TWO, "candidate c0007")
    assert root.attrib["role"] == "img"
    assert [child.tag.removeprefix(SVG) for child in root][:2] == ["title", "desc"]
    assert root.findtext(f"{SVG}desc") == ". ".join(line.strip() for line in path_text(recipe, TWO, width=10_000))
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme:dark" in style
    assert "url(" not in style


def test_its_rules_leave_the_rest_of_a_page_alone() -> None:
    style = drawn(path_of("m0"), TWO).findtext(f"{SVG}style") or ""
    selectors = re.findall(r"([^{}]+){[^{}]", style.replace("@media(prefers-color-scheme:dark){", ""))
    assert len(selectors) > 20
    assert all(each.startswith(".evomerge-path ") for selector in selectors for each in selector.split(","))


def test_colours_can_be_read_on_their_grounds() -> None:
    """Contrast by WCAG 2.2: 4.5 to 1 for text."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = drawn(path_of("m0"), TWO).findtext(f"{SVG}style") or ""
    for scheme in style.split("@media"):
        ground = re.search(r"\.ground{fill:(#\w{6})}", scheme)
        assert ground
        colours = re.findall(r"\.s\d{color:(#\w{6})}|\.(?:tick|title|quiet)[^{]*{fill:(#\w{6})}", scheme)
        assert len(colours) >= 7
        for found in colours:
            bright, dim = sorted((luminance("".join(found)), luminance(ground[1])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, found
