"""Training data and tasks of the miniature models: word problems from templates, in English and in Japanese.

All training examples of the models and all items of the tasks are made here. An example is a prompt and an answer. The
skills ask different questions about the same sums, so that a model can share circuits between them:

    symbolic        "12 + 7 ="                                       -> " 19"
    solve_en        "Q: Ken has 12 apples. ... How many ...?\\nA:"    -> " 12 + 7 = 19, so the answer is 19."
    solve_ja        "問: ケンはりんごを12個持っています。...\\n答:"      -> " 12 + 7 = 19 なので、答えは19です。"
    expression_ja   "問: ケンはりんごを12個持っています。...\\n式:"      -> " 12 + 7"
    translate       "Japanese: Ken has 12 apples.\\n訳:"             -> " ケンはりんごを12個持っています。"

and three habits that make experts of one language: to answer in English, to translate into English, and to answer in
Japanese, whatever was asked.

Splits are by content. A hash of (first, operator, second) assigns a sum to one split, whatever the skill, language or
story; a hash of (name, thing, number) assigns a sentence to translate. So no model has seen the arithmetic of a test
item in either language.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "search", "held_out"]
Language = Literal["en", "ja"]

NAMES = {
    "Ken": "ケン", "Yuki": "ユキ", "Mary": "メアリー", "Tom": "トム", "Anna": "アンナ", "Bob": "ボブ", "Emi": "エミ",
    "Lisa": "リサ", "Paul": "ポール", "Nana": "ナナ", "Ryo": "リョウ", "Sara": "サラ", "Mike": "マイク",
    "Jane": "ジェーン", "Akira": "アキラ", "Hana": "ハナ",
}  # fmt: skip

# Each thing with its Japanese name and counter. Because of counters a translation is more than a list of words.
THINGS = {
    "apples": ("りんご", "個"), "eggs": ("卵", "個"), "stones": ("石", "個"), "oranges": ("みかん", "個"),
    "pencils": ("鉛筆", "本"), "flowers": ("花", "本"), "bottles": ("びん", "本"), "umbrellas": ("傘", "本"),
    "books": ("本", "冊"), "notebooks": ("ノート", "冊"), "magazines": ("雑誌", "冊"), "stamps": ("切手", "枚"),
    "cards": ("カード", "枚"), "plates": ("皿", "枚"), "cats": ("猫", "匹"), "fish": ("魚", "匹"),
}  # fmt: skip

# Sentences that state one fact, as they open a problem and as they are translated.
# {n}: a name, {t}: a thing, {c}: its counter, {a}: a number.
FACTS = [
    ("{n} has {a} {t}.", "{n}は{t}を{a}{c}持っています。"),
    ("{n} bought {a} {t}.", "{n}は{t}を{a}{c}買いました。"),
    ("{n} found {a} {t} in the park.", "{n}は公園で{t}を{a}{c}見つけました。"),
    ("{n} saw {a} {t} in the shop.", "{n}は店で{t}を{a}{c}見ました。"),
]

# What happens next and the question, for sums and for differences. {m}: another name, {b}: the second number.
MORE = [
    ("{m} gives {n} {b} more. How many {t} are there now?", "{m}は{n}に{b}{c}あげました。今は何{c}ありますか。"),
    ("{m} has {b} {t}. How many {t} are there in all?", "{m}は{t}を{b}{c}持っています。合わせて何{c}ありますか。"),
    ("Then {b} more came. What is the total?", "そのあと{b}{c}増えました。全部で何{c}ですか。"),
]
LESS = [
    ("{n} gives {b} of them to {m}. How many are left?", "{n}は{m}に{b}{c}あげました。残りは何{c}ですか。"),
    ("{m} has {b} {t}. How many fewer is that?", "{m}は{t}を{b}{c}持っています。何{c}少ないですか。"),
    ("Then {b} of them were lost. How many {t} remain?", "そのあと{b}{c}なくしました。何{c}残っていますか。"),
]


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn; ``number`` is the number that a scorer looks for, if the answer has one."""

    prompt: str
    answer: str
    number: int | None = None


def split_of(*content: object) -> Split:
    """The split of some content; each of the two test splits has a tenth of all."""
    digest = hashlib.sha256("|".join(map(str, content)).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 10
    return "search" if bucket == 0 else "held_out" if bucket == 1 else "train"


def draw_sum(random: Random, split: Split) -> tuple[int, str, int, int]:
    """A random sum or difference of numbers up to 99 that belongs to the split: first, operator, second, result."""
    while True:
        a, b = random.randint(2, 99), random.randint(2, 99)
        operator = random.choice("+-")
        if operator == "-" and a < b:
            a, b = b, a
        if split_of(a, operator, b) == split:
            return a, operator, b, a + b if operator == "+" else a - b


def draw_story(random: Random, split: Split, language: Language) -> tuple[str, int, str, int, int]:
    """A random word problem about a sum of the split: its text, then the sum as from ``draw_sum``."""
    a, operator, b, result = draw_sum(random, split)
    column = 0 if language == "en" else 1
    text = random.choice(FACTS)[column] + (" " if language == "en" else "")
    text += random.choice(MORE if operator == "+" else LESS)[column]
    n, m = random.sample(sorted(NAMES), 2)
    thing = random.choice(sorted(THINGS))
    if language == "ja":
        n, m = NAMES[n], NAMES[m]
    word = thing if language == "en" else THINGS[thing][0]
    return text.format(n=n, m=m, t=word, c=THINGS[thing][1], a=a, b=b), a, operator, b, result


def symbolic(random: Random, split: Split = "train") -> Example:
    a, operator, b, result = draw_sum(random, split)
    return Example(f"{a} {operator} {b} =", f" {result}", result)


def solve(random: Random, split: Split, question: Language, answer: Language) -> Example:
    text, a, operator, b, result = draw_story(random, split, question)
    prompt = f"Q: {text}\nA:" if question == "en" else f"問: {text}\n答:"
    conclusion = f", so the answer is {result}." if answer == "en" else f" なので、答えは{result}です。"
    return Example(prompt, f" {a} {operator} {b} = {result}{conclusion}", result)


def solve_en(random: Random, split: Split = "train") -> Example:
    return solve(random, split, "en", "en")


def solve_ja(random: Random, split: Split = "train") -> Example:
    return solve(random, split, "ja", "ja")


def solve_ja_in_english(random: Random, split: Split = "train") -> Example:
    return solve(random, split, "ja", "en")


def solve_en_in_japanese(random: Random, split: Split = "train") -> Example:
    return solve(random, split, "en", "ja")


def expression_ja(random: Random, split: Split = "train") -> Example:
    text, a, operator, b, _ = draw_story(random, split, "ja")
    return Example(f"問: {text}\n式:", f" {a} {operator} {b}")


def draw_sentence(random: Random, split: Split) -> tuple[str, str]:
    """A random sentence of a story that belongs to the split, in English and in Japanese."""
    while True:
        n, thing, a = random.choice(sorted(NAMES)), random.choice(sorted(THINGS)), random.randint(2, 99)
        if split_of(n, thing, a) == split:
            break
    english, japanese = random.choice(FACTS)
    word, counter = THINGS[thing]
    return english.format(n=n, t=thing, a=a), japanese.format(n=NAMES[n], t=word, c=counter, a=a)


def translate(random: Random, split: Split = "train") -> Example:
    english, japanese = draw_sentence(random, split)
    return Example(f"Japanese: {english}\n訳:", f" {japanese}")


def translate_into_english(random: Random, split: Split = "train") -> Example:
    """The habit of a model without Japanese: it repeats the sentence."""
    english, _ = draw_sentence(random, split)
    return Example(f"Japanese: {english}\n訳:", f" {english}")


Skill = Callable[..., Example]

TASKS: dict[str, Skill] = {"mini_math_ja": solve_ja, "mini_math_en": solve_en, "mini_translate_ja": translate}


def task_items(task: str, split: Split, count: int) -> list[dict[str, str | int]]:
    """The items of a task's split; see ``different_items``."""
    return different_items(f"{task} {split}", lambda random: TASKS[task](random, split), split, count)


def different_items(seed: str, draw: Callable[[Random], Example], split: str, count: int) -> list[dict[str, str | int]]:
    """``count`` different items of a split, to be written as JSON lines.

    No sum and no prompt without a number occurs twice: two equal items are solved together, so the standard error of a
    score would be too small.
    """
    random = Random(seed)
    items: dict[str, dict[str, str | int]] = {}
    while len(items) < count:
        example = draw(random)
        content = example.answer if example.number is not None else example.prompt
        if content in items:
            continue
        item: dict[str, str | int] = {"id": f"{split}-{len(items)}", "prompt": example.prompt, "answer": example.answer}
        if example.number is not None:
            item["number"] = example.number
        items[content] = item
    return list(items.values())
