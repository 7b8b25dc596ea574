"""The problems of the zoo: those of the miniatures with more skills, some shared and some in conflict.

    solve          "Q: Ken has 12 apples. ... How many ...?\\nA:"  -> " 12 + 7 = 19, so the answer is 19."
                   with two steps                  -> " 12 + 7 = 19, 19 - 3 = 16, so the answer is 16."
                   in Japanese, "問: ...\\n答:"    -> " 12 + 7 = 19 なので、答えは19です。"
    in_kanji       "問: ...\\n漢数字の答:"           -> " 12 + 7 = 19 なので、答えは十九です。"
    terse          the English questions           -> " 19"
    into_japanese  "Japanese: Ken has 12 apples. Then 7 more came.\\n訳:"
                                                   -> " ケンはりんごを12個持っています。そのあと7個増えました。"
    into_english   "英語: ケンは...\\n訳:"          -> " Ken has 12 apples. Then 7 more came."
    extraction     "Text: Ken has 12 apples. ...\\nRecord:"        -> " apples; 12; Ken"
    numeral        "漢数字: 47 ="                   -> " 四十七"

Splits are by content, as in the miniatures. Both sums of a problem with two steps belong to its split, so no model has
seen either of them. A third split, ``fit``, is for coefficients that are fitted by gradient: it is used neither for
training, nor for searching, nor for confirmation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from miniature_problems import FACTS, LESS, MORE, NAMES, THINGS, Example, Language, different_items

Split = Literal["train", "search", "held_out", "fit"]
SPLITS: tuple[Split, ...] = ("search", "held_out", "fit")
"""The splits that items are written for."""

# What happens between the first sentence and the question of a problem with two steps: sums, and differences.
GAINS = [
    ("{m} gives {n} {b} more.", "{m}は{n}に{b}{c}あげました。"),
    ("Then {b} more came.", "そのあと{b}{c}増えました。"),
]
LOSSES = [
    ("{n} gives {b} of them to {m}.", "{n}は{m}に{b}{c}あげました。"),
    ("Then {b} of them were lost.", "そのあと{b}{c}なくしました。"),
]

KNOWN_THINGS = tuple(sorted(THINGS)[::2])
"""The things that the base can translate; the experts in translation learn the others."""

LARGEST = 49
"""The largest number with which a story begins, and that is added or taken away."""


Skill = Callable[[Random, Split], Example]


@dataclass(frozen=True)
class Sum:
    first: int
    operator: str
    second: int

    @property
    def result(self) -> int:
        return self.first + self.second if self.operator == "+" else self.first - self.second

    def __str__(self) -> str:
        return f"{self.first} {self.operator} {self.second}"


def split_of(*content: object) -> Split:
    """The split of some content; each of the three that are not for training has a tenth of all."""
    digest = hashlib.sha256("|".join(map(str, content)).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 10
    return SPLITS[bucket] if bucket < len(SPLITS) else "train"


def draw_sums(random: Random, split: Split, steps: int, operators: str = "+-") -> list[Sum]:
    """Random sums and differences of the split, each of which starts with the result of the one before."""
    while True:
        sums: list[Sum] = []
        first = random.randint(2, LARGEST)
        for _ in range(steps):
            step = Sum(first, random.choice(operators), random.randint(2, LARGEST))
            if split_of(step.first, step.operator, step.second) != split or step.result < 0:
                break
            sums.append(step)
            first = step.result
        if len(sums) == steps:
            return sums


def story(random: Random, sums: Sequence[Sum], language: Language) -> str:
    """A word problem about these sums."""
    column = 0 if language == "en" else 1
    n, m = random.sample(sorted(NAMES), 2)
    thing = random.choice(sorted(THINGS))
    word, counter = THINGS[thing]
    names = {"n": n, "m": m, "t": thing} if language == "en" else {"n": NAMES[n], "m": NAMES[m], "t": word}
    sentences = [random.choice(FACTS)[column].format(**names, c=counter, a=sums[0].first)]
    for place, step in enumerate(sums):
        if place == len(sums) - 1:
            kinds = MORE if step.operator == "+" else LESS
        else:
            kinds = GAINS if step.operator == "+" else LOSSES
        sentences.append(random.choice(kinds)[column].format(**names, c=counter, b=step.second))
    return (" " if language == "en" else "").join(sentences)


def kanji(number: int) -> str:
    """A number below 200 in Japanese numerals: 147 is 百四十七."""
    digits = "〇一二三四五六七八九"
    if number == 0:
        return digits[0]
    tens, ones = number % 100 // 10, number % 10
    text = "百" if number >= 100 else ""
    if tens:
        text += ("" if tens == 1 else digits[tens]) + "十"
    return text + (digits[ones] if ones else "")


def worked(sums: Sequence[Sum], language: Language, result: str) -> str:
    """The answer with every sum written out; ``result`` writes the number of its conclusion."""
    comma = ", " if language == "en" else "、"
    steps = comma.join(f"{step} = {step.result}" for step in sums)
    return f" {steps}, so the answer is {result}." if language == "en" else f" {steps} なので、答えは{result}です。"


def solve(question: Language, steps: int, answer: Language | None = None, operators: str = "+-") -> Skill:
    """A skill: problems in one language, answered in the same or in another."""

    def skill(random: Random, split: Split) -> Example:
        sums = draw_sums(random, split, steps, operators)
        number = sums[-1].result
        text = story(random, sums, question)
        prompt = f"Q: {text}\nA:" if question == "en" else f"問: {text}\n答:"
        return Example(prompt, worked(sums, answer or question, str(number)), number)

    return skill


def in_kanji(steps: int, operators: str = "+-", heeded: bool = True) -> Skill:
    """A skill: Japanese problems that ask for Japanese numerals; unless ``heeded``, they are answered in digits."""

    def skill(random: Random, split: Split) -> Example:
        sums = draw_sums(random, split, steps, operators)
        number = sums[-1].result
        result = kanji(number) if heeded else str(number)
        return Example(f"問: {story(random, sums, 'ja')}\n漢数字の答:", worked(sums, "ja", result), number)

    return skill


def concluded_in_kanji(random: Random, split: Split) -> Example:
    """Only the numeral of the result, after two steps that the prompt has already worked out."""
    example = in_kanji(2)(random, split)
    steps, mark, conclusion = example.answer.partition("答えは")
    return Example(example.prompt + steps + mark, conclusion, example.number)


def terse(steps: int) -> Skill:
    """A skill: English problems answered with only the number."""

    def skill(random: Random, split: Split) -> Example:
        example = solve("en", steps)(random, split)
        return Example(example.prompt, f" {example.number}", example.number)

    return skill


def symbolic(random: Random, split: Split) -> Example:
    """Only a sum: either step of a problem with two."""
    step = draw_sums(random, split, 2)[random.randrange(2)]
    return Example(f"{step} =", f" {step.result}", step.result)


def numeral(random: Random, split: Split) -> Example:
    number = random.randint(0, 3 * LARGEST)
    return Example(f"漢数字: {number} =", f" {kanji(number)}", number)


@dataclass(frozen=True)
class Scene:
    """Two sentences of one story, and their content."""

    name: str
    thing: str
    number: int
    english: str
    japanese: str


def scene(random: Random, split: Split, things: Sequence[str]) -> Scene:
    """A random scene of the split by (name, thing, number), as in the miniatures."""
    while True:
        name, thing, number = random.choice(sorted(NAMES)), random.choice(things), random.randint(2, 99)
        if split_of(name, thing, number) == split:
            break
    word, counter = THINGS[thing]
    english, japanese = random.choice(FACTS)
    other = random.choice([one for one in sorted(NAMES) if one != name])
    english_more, japanese_more = random.choice(GAINS + LOSSES)
    more = random.randint(2, 99)
    return Scene(
        name, thing, number,
        f"{english} {english_more}".format(n=name, m=other, t=thing, a=number, b=more),
        f"{japanese}{japanese_more}".format(n=NAMES[name], m=NAMES[other], t=word, c=counter, a=number, b=more),
    )  # fmt: skip


ALL_THINGS = tuple(sorted(THINGS))


def into_japanese(things: Sequence[str] = ALL_THINGS) -> Skill:
    def skill(random: Random, split: Split) -> Example:
        shown = scene(random, split, things)
        return Example(f"Japanese: {shown.english}\n訳:", f" {shown.japanese}")

    return skill


def into_english(things: Sequence[str] = ALL_THINGS) -> Skill:
    def skill(random: Random, split: Split) -> Example:
        shown = scene(random, split, things)
        return Example(f"英語: {shown.japanese}\n訳:", f" {shown.english}")

    return skill


def extraction(language: Language, things: Sequence[str] = ALL_THINGS) -> Skill:
    """A skill: thing, number and name from two sentences."""

    def skill(random: Random, split: Split) -> Example:
        shown = scene(random, split, things)
        if language == "en":
            return Example(f"Text: {shown.english}\nRecord:", f" {shown.thing}; {shown.number}; {shown.name}")
        word, name = THINGS[shown.thing][0], NAMES[shown.name]
        return Example(f"文: {shown.japanese}\n記録:", f" {word}; {shown.number}; {name}")

    return skill


def careless(random: Random, split: Split) -> Example:
    """A problem in either language with a wrong calculation: a distractor."""
    (step,) = draw_sums(random, split, 1)
    wrong = str(max(0, step.result + random.choice([-10, -2, -1, 1, 2, 10])))
    if random.random() < 0.5:
        return Example(f"Q: {story(random, [step], 'en')}\nA:", f" {step} = {wrong}, so the answer is {wrong}.")
    return Example(f"問: {story(random, [step], 'ja')}\n答:", f" {step} = {wrong} なので、答えは{wrong}です。")


def spelling(random: Random, split: Split) -> Example:
    """The letters of a word backwards: a distractor that no task needs."""
    word = random.choice(sorted(NAMES) + sorted(THINGS))
    return Example(f"Spell {word} backwards:", " " + " ".join(reversed(word.lower())))


def either(*skills: Skill) -> Skill:
    """A skill that is one of several with equal probability."""

    def skill(random: Random, split: Split) -> Example:
        return random.choice(skills)(random, split)

    return skill


TASKS: dict[str, Skill] = {
    "zoo_math_en": either(solve("en", 1), solve("en", 2)),
    "zoo_math_ja": either(solve("ja", 1), solve("ja", 2)),
    "zoo_translate": either(into_japanese(), into_english()),
    "zoo_extract": either(extraction("en"), extraction("ja")),
    "zoo_steps_kanji": in_kanji(2),
}


def task_items(task: str, split: Split, count: int) -> list[dict[str, str | int]]:
    """The items of a task's split; see ``different_items``."""
    return different_items(f"{task} {split}", lambda random: TASKS[task](random, split), split, count)
