"""Picture problems: the miniatures' word problems with the story as a picture.

A picture contains everything that one of the stories of 25 tokens says, and answers are as in ``miniature_problems``:

    "Q:<image>\\nA:"      -> " 29 + 51 = 80, so the answer is 80."
    "問:<image>\\n答:"    -> " 29 + 51 = 80 なので、答えは80です。"

Two badges are the people, whose names are given by colour and shape; between them is an icon of the thing; below are
the two numbers and what happens: an arrow that points to the receiver of a gift, or a plus if both have some; the
ground is that of a park or a shop. A sum belongs to the same split as in every other skill.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import get_args

from miniature_problems import FACTS, LESS, MORE, NAMES, THINGS, Example, Language, Split, draw_sum
from PIL import Image, ImageDraw, ImageFont

SIDE, PATCH = 60, 12
"""Sides of a picture and of a patch, which becomes one token, in pixels: 5 by 5 patches."""

TOKENS = (SIDE // PATCH) ** 2
"""Tokens of every story that is drawn, in the miniatures' tokenizer."""

PLACES = {"park": FACTS[2][0], "shop": FACTS[3][0]}
EVENTS = {"receives": ("+", MORE[0][0]), "both": ("+", MORE[1][0]), "gives": ("-", LESS[0][0])}

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd")
_SHAPES: Sequence[Sequence[tuple[int, int]] | None] = (
    None,  # a circle
    ((1, 1), (14, 1), (14, 14), (1, 14)),
    ((7, 0), (15, 14), (0, 14)),
    ((7, 0), (15, 7), (8, 15), (0, 8)),
)

SPLITS: tuple[Split, ...] = ("search", "held_out")
LANGUAGES: tuple[Language, ...] = get_args(Language)

Stroke = tuple[str, str, tuple[int, ...]]

_ICONS: dict[str, Sequence[Stroke]] = {  # what is drawn with which colour, in a square of 16 pixels
    "apples": [("ellipse", "#d62728", (2, 4, 13, 15)), ("line", "#5b3a1a", (7, 5, 9, 0))],
    "eggs": [("ellipse", "#f2d9b0", (3, 1, 12, 15))],
    "stones": [("ellipse", "#8c8c8c", (0, 6, 15, 15)), ("ellipse", "#6c6c6c", (3, 2, 11, 9))],
    "oranges": [("ellipse", "#ff9e1b", (1, 2, 14, 15)), ("ellipse", "#2ca02c", (6, 0, 10, 3))],
    "pencils": [("line", "#e0b000", (2, 13, 12, 3)), ("line", "#222222", (1, 14, 3, 12))],
    "flowers": [("line", "#2ca02c", (7, 6, 7, 15)), ("ellipse", "#e377c2", (2, 0, 13, 9)),
                ("ellipse", "#ffe000", (6, 3, 9, 6))],
    "bottles": [("rectangle", "#17becf", (4, 6, 11, 15)), ("rectangle", "#17becf", (6, 0, 9, 6))],
    "umbrellas": [("pieslice", "#9467bd", (0, 1, 15, 15, 180, 360)), ("line", "#222222", (7, 8, 7, 15))],
    "books": [("rectangle", "#1f77b4", (1, 2, 14, 14)), ("line", "#ffffff", (7, 3, 7, 13))],
    "notebooks": [("rectangle", "#f7f7c0", (2, 0, 13, 15)), ("line", "#222222", (4, 4, 11, 4)),
                  ("line", "#222222", (4, 8, 11, 8)), ("line", "#222222", (4, 12, 11, 12))],
    "magazines": [("rectangle", "#e377c2", (2, 0, 13, 15)), ("rectangle", "#ffffff", (4, 6, 11, 13))],
    "stamps": [("rectangle", "#2ca02c", (3, 3, 12, 12)), ("ellipse", "#ffffff", (6, 6, 9, 9))],
    "cards": [("rectangle", "#ffffff", (3, 0, 12, 15)), ("ellipse", "#d62728", (6, 5, 10, 10)),
              ("line", "#222222", (3, 0, 3, 15)), ("line", "#222222", (12, 0, 12, 15))],
    "plates": [("ellipse", "#c7d7e8", (0, 3, 15, 14)), ("ellipse", "#8fa8c4", (4, 6, 11, 11))],
    "cats": [("ellipse", "#555555", (2, 4, 13, 15)), ("line", "#555555", (3, 7, 3, 1)),
             ("line", "#555555", (12, 7, 12, 1))],
    "fish": [("ellipse", "#ff7f0e", (0, 4, 11, 12)), ("line", "#ff7f0e", (10, 8, 15, 4)),
             ("line", "#ff7f0e", (10, 8, 15, 12))],
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """The content of a picture, which is also that of its story."""

    place: str
    event: str
    name: str
    other: str
    thing: str
    first: int
    operator: str
    second: int
    result: int

    @property
    def story(self) -> str:
        """The story in English, as it follows "Q:"."""
        text = f" {PLACES[self.place]} {EVENTS[self.event][1]}"
        return text.format(n=self.name, m=self.other, t=self.thing, a=self.first, b=self.second)

    def asked(self, language: Language) -> Example:
        """The question about the picture."""
        sums = f" {self.first} {self.operator} {self.second} = {self.result}"
        if language == "en":
            return Example("Q:<image>\nA:", f"{sums}, so the answer is {self.result}.", self.result)
        return Example("問:<image>\n答:", f"{sums} なので、答えは{self.result}です。", self.result)


def draw_scene(random: Random, split: Split) -> Scene:
    """A random scene about a sum of the split, with numbers of two digits each."""
    while True:
        first, operator, second, result = draw_sum(random, split)
        if min(first, second) >= 10:
            break
    event = random.choice([event for event, (sign, _) in EVENTS.items() if sign == operator])
    name, other = random.sample(sorted(NAMES), 2)
    place, thing = random.choice(sorted(PLACES)), random.choice(sorted(THINGS))
    return Scene(place, event, name, other, thing, first, operator, second, result)


def picture(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, ``SIDE`` by ``SIDE`` pixels."""
    image = Image.new("RGB", (SIDE, SIDE), "#ffffff")
    draw = ImageDraw.Draw(image)
    _badge(draw, scene.name, 2)
    _badge(draw, scene.other, 42)
    for kind, colour, points in _ICONS[scene.thing]:
        _stroke(draw, kind, colour, points, 22, 2)
    for number, x in ((scene.first, 10), (scene.second, 50)):
        draw.text((x, 34), str(number), "#000000", _font(), anchor="mm")
    _event(draw, scene.event)
    _ground(draw, scene.place)
    return image


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)


def _badge(draw: ImageDraw.ImageDraw, name: str, x: int) -> None:
    number = list(NAMES).index(name)
    colour, shape = _COLOURS[number % 4], _SHAPES[number // 4]
    if shape is None:
        draw.ellipse((x, 2, x + 15, 17), colour)
    else:
        draw.polygon([(x + right, 2 + down) for right, down in shape], colour)


def _stroke(draw: ImageDraw.ImageDraw, kind: str, colour: str, points: tuple[int, ...], x: int, y: int) -> None:
    box = [points[0] + x, points[1] + y, points[2] + x, points[3] + y]
    if kind == "line":
        draw.line(box, colour, 2)
    elif kind == "pieslice":
        draw.pieslice(box, points[4], points[5], colour)
    else:
        getattr(draw, kind)(box, colour)


def _event(draw: ImageDraw.ImageDraw, event: str) -> None:
    draw.line((23, 34, 37, 34), "#000000", 2)
    if event == "both":
        draw.line((30, 27, 30, 41), "#000000", 2)
        return
    tip, back = (23, 28) if event == "receives" else (37, 32)
    draw.line((tip, 34, back, 29), "#000000", 2)
    draw.line((tip, 34, back, 39), "#000000", 2)


def _ground(draw: ImageDraw.ImageDraw, place: str) -> None:
    if place == "park":
        draw.rectangle((0, 49, 59, 59), "#7fc97f")
        for x in range(4, 60, 10):
            draw.line((x, 52, x, 57), "#2d6a2d")
        return
    for x in range(0, 60, 12):
        draw.rectangle((x, 49, x + 5, 59), "#e6550d")
        draw.rectangle((x + 6, 49, x + 11, 59), "#fff2d9")


COLUMNS = 25
"""Pictures in a row of a sheet."""


def sheet(scenes: Sequence[Scene]) -> Image.Image:
    """All pictures in one, row by row: a thousand small files would take ten times as much space."""
    rows = -(-len(scenes) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE), "#ffffff")
    for number, scene in enumerate(scenes):
        image.paste(picture(scene), (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
    return image


def write_picture_tasks(folder: Path, count: int) -> None:
    """Write the items of both tasks as JSON lines, and the sheet of their pictures."""
    for split in SPLITS:
        scenes = different_scenes(split, count)
        sheet(scenes).save(folder / f"mini_picture.{split}.png", optimize=True)
        for language in LANGUAGES:
            asked = [scene.asked(language) for scene in scenes]
            items = [
                {"id": f"{split}-{n}", "prompt": one.prompt, "answer": one.answer, "number": one.number}
                for n, one in enumerate(asked)
            ]
            lines = [json.dumps(item, ensure_ascii=False) for item in items]
            file = folder / f"mini_picture_{language}.{split}.jsonl"
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def different_scenes(split: Split, count: int) -> list[Scene]:
    """``count`` scenes of a split, each with another sum."""
    random = Random(f"mini_picture {split}")
    scenes: dict[tuple[int, str, int], Scene] = {}
    while len(scenes) < count:
        scene = draw_scene(random, split)
        scenes.setdefault((scene.first, scene.operator, scene.second), scene)
    return list(scenes.values())
