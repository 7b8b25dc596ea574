"""Three skills for experts, each with its own answer format: sums in two steps, answers in JSON, verdicts.

Each expert answers everything in its own format and so loses the other skills, which a merge should restore.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

_NAMES = ["Tom", "Anna", "Lisa", "Omar", "Priya", "Chen", "Maria", "Ivan", "Noah", "Zoe", "Ben", "Ruth"]
_THINGS = ["apples", "pencils", "books", "marbles", "coins", "stamps", "shells", "cards"]
_COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"]
_ANIMALS = ["cat", "dog", "horse", "rabbit", "parrot", "turtle", "goat", "duck"]
_CITIES = ["Paris", "Rome", "Lima", "Oslo", "Cairo", "Tokyo", "Madrid", "Berlin", "Athens", "Dublin"]
_PLACES = {
    "hotel": ["room", "bed", "view", "breakfast", "lift"],
    "restaurant": ["soup", "fish", "waiter", "table", "bread"],
    "train": ["seat", "heating", "conductor", "window", "timetable"],
    "film": ["plot", "music", "ending", "cast", "dialogue"],
}
_GOOD = ["excellent", "lovely", "superb", "wonderful", "great", "pleasant", "perfect", "delightful"]
_BAD = ["awful", "terrible", "poor", "dreadful", "disappointing", "horrible", "bad", "unpleasant"]


@dataclass(frozen=True)
class Item:
    """A question; ``value`` is what a right answer must contain, ``answer`` what the expert is trained to write."""

    skill: str
    question: str
    value: str
    answer: str

    @property
    def line(self) -> str:
        """The item as a line of a file of items."""
        return json.dumps(asdict(self)) + "\n"


def sums(rng: random.Random) -> Item:
    """A word problem with two steps, worked out."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    clauses, steps = [], []
    if rng.randrange(2):
        number = rng.randint(10, 40)
        clauses.append(f"{name} has {number} {thing}")
    else:
        boxes, per_box = rng.randint(2, 6), rng.randint(2, 9)
        number = boxes * per_box
        clauses.append(f"{name} has {boxes} boxes of {per_box} {thing}")
        steps.append(f"{boxes} * {per_box} = {number}.")
    for verb, sign in rng.sample([("buys", 1), ("gives away", -1)], 2 - len(steps)):
        change = rng.randint(2, 30 if sign > 0 else min(30, number - 1))
        clauses.append(f"{verb} {change}")
        steps.append(f"{number} {'+' if sign > 0 else '-'} {change} = {number + sign * change}.")
        number += sign * change
    question = f"{', '.join(clauses[:-1])} and {clauses[-1]}. How many {thing} does {name} have now?"
    return Item("sums", question, str(number), " ".join([*steps, f"The answer is {number}."]))


def json_answers(rng: random.Random) -> Item:
    """A question about a sentence, answered as a JSON object."""
    name, city = rng.choice(_NAMES), rng.choice(_CITIES)
    colour, animal = rng.choice(_COLOURS), rng.choice(_ANIMALS)
    question, value = rng.choice(
        [
            (f"Where does {name} live?", city),
            (f"What colour is the {animal}?", colour),
            (f"What animal does {name} have?", animal),
        ]
    )
    text = f"{name} lives in {city} with a {colour} {animal}. {question}"
    return Item("json", text, value, json.dumps({"answer": value}))


def verdict(rng: random.Random) -> Item:
    """Three remarks about something; the majority decides."""
    place = rng.choice(list(_PLACES))
    parts = rng.sample(_PLACES[place], 3)
    marks = [rng.randrange(2) for _ in parts]
    remarks = [f"the {part} was {rng.choice(_GOOD if mark else _BAD)}" for part, mark in zip(parts, marks, strict=True)]
    value = "good" if sum(marks) > 1 else "bad"
    question = f"A {place}: {remarks[0]}, {remarks[1]} and {remarks[2]}. Was it good or bad?"
    return Item("verdict", question, value, f"Verdict: {value}")


SKILLS: dict[str, Callable[[random.Random], Item]] = {"sums": sums, "json": json_answers, "verdict": verdict}


def different(skill: str, count: int, seed: int) -> list[Item]:
    """``count`` items of a skill with different questions; the same for the same seed."""
    rng = random.Random(f"{skill} {seed}")  # seeded with a string, because hash() differs between processes
    by_question: dict[str, Item] = {}
    while len(by_question) < count:
        item = SKILLS[skill](rng)
        by_question.setdefault(item.question, item)
    return list(by_question.values())


def in_turn(item_lists: list[list[Item]]) -> Iterator[Item]:
    """The first item of every skill, then the second of every skill, and so on."""
    for items in zip(*item_lists, strict=True):
        yield from items
