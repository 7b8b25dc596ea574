r"""The number that an answer to a word problem gives: as the original work reads it, and as a person would.

``last_number_sakana`` reproduces the scorer of the original work, including its faults. ``answer_number`` reads what is
written, by these rules:

- **Which number.** The one after the last marker ("The answer is", "答えは", "####", "\boxed{"), or else the last of
  the text. After a marker it is the first of the line or sentence; after the last equals sign, if there is one; the
  last of a calculation ("5 + 6, so 11"). A reason ("because 3 + 2 = 5") is not part of the sentence. Labels ("Answer:")
  are markers if a number follows immediately; at the start of the text, only if nothing is calculated later. English
  markers count in every language.
- **Not numbers** are digits after letters ("A4"). Numbers of lists ("3. Then"), steps, ordinals ("3rd", "第3"), dates
  and times of day ("10:30") count only if there is no other number after a marker or anywhere else in the text.
- **Separators.** In German, Spanish, French and Russian a point, comma, space or apostrophe before groups of exactly
  three digits groups them, and any other point or comma begins decimals: "1.234" and "1,234" are 1234, and "0,125",
  "3.5", "1234,567" have decimals. In English, Japanese and Chinese a comma groups and a point begins decimals: "1.234"
  has decimals, "1,234" has none, "3,5" is two numbers, and an ordinary space groups nothing. In all of them, narrow and
  no-break spaces group, and after a group the other of point and comma begins decimals ("1.234,5" and "1,234.5").
- **Signs.** A minus of any kind before the number or its currency sign, unless it is between two numbers ("10-5");
  "minus 5" if it begins a clause or follows "is"; "マイナス5", "负五".
- **Kanji.** "三十五", "一万二千三百", "3万5千", "二〇二四". Short ones are parts of many words (十分, 一緒): they
  count with a counter (三個), alone after a marker, with two or more characters of which one is 十 or larger, or with
  three or more. Chinese "一百五" is 150.
- **Fractions** of whole numbers: "3/4", "2 1/2", "½", "\frac{3}{4}", "3分の2", "三分之二". A percentage is the number
  before its sign.
- **Scales** in words after digits: "1.5 million", "8 mil", "70 тыс.".

Other spelled-out numbers ("eleven") are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache

from evaluators.numerals import COUNTER, Language, Numeral, find_numbers, plain


def last_number_sakana(text: str) -> float | None:
    """The last number as the original work's scorer reads it: "1,234" is 234, "-5" is 5, kanji are ignored.

    SakanaAI/evolutionary-model-merge, evomerge/eval/ja_mgsm.py, ``extract_answer_number``. That also removes commas
    from the match, which can no longer contain any.
    """
    numbers = re.findall(r"\d*\.?\d+", text)
    return float(numbers[-1]) if numbers else None


def answer_number(text: str, language: Language) -> Decimal | None:
    """The number that the answer gives, by the rules above; None if there is none."""
    text = plain(text, language)
    numbers = find_numbers(text, language)
    for marker in reversed(list(_markers(language).finditer(text))):
        if (number := _behind(marker, numbers)) is not None:
            return number.value
    return _last(numbers)


def last_number(text: str, language: Language) -> Decimal | None:
    """The last number of the text, regardless of markers; None if there is none."""
    return _last(find_numbers(plain(text, language), language))


def _last(numbers: Sequence[Numeral]) -> Decimal | None:
    sure = [number for number in numbers if not number.weak]
    proper = [number for number in sure if not number.aside]
    return (proper or sure)[-1].value if sure else None


# ---- markers ---------------------------------------------------------------------------------------------------------

_SENTENCES = {
    "de": r"\b(?:die (?:\w+ )?(?:antwort|lösung)|das (?:end)?ergebnis) (?:lautet|ist|beträgt)"
    r"|\b(?:lautet|ist|beträgt) (?:also |daher |somit )?die antwort\b",
    "en": r"\b(?:the|our|my) (?:final |correct |right )?answer(?: to (?:the|this|your) \w+)?"
    r" (?:is|would be|should be)\b",
    "es": r"\bla (?:respuesta|solución)(?: \w+)? (?:es|sería)\b|\bel resultado(?: \w+)? es\b",
    "fr": r"\bla (?:réponse|solution)(?: \w+)? (?:est|serait)\b|\ble résultat(?: \w+)? est\b",
    "ja": r"(?:答え|解答|回答|正解)は",
    "ru": r"\bответ(?: равен| будет|ом (?:является|будет)|\s*[—–-](?=\s))",
    "zh": r"(?:答案|答数|答數)(?:是|为|為)",
}
_LABELS = {
    "de": r"\b(?:antwort|ergebnis|lösung)",
    "en": r"\banswer",
    "es": r"\b(?:respuesta|resultado)(?: final)?",
    "fr": r"\b(?:réponse|résultat)(?: finale?)?",
    "ja": r"(?:答え?|解答|回答|正解)",
    "ru": r"\bответ",
    "zh": r"(?:答案?|解答)",
}
_LABEL_ENDS = r"(?:[\s*]*[:=]|[ \t*]*\n)"
_REASON = r",?\s(?:because|since|weil|porque|parce que|puisque|потому что|так как)\b|,\s(?:car|denn|ya que)\b|因为|因為"
_REASON_BEGINS = re.compile(_REASON, re.IGNORECASE)
_END_OF_CLAUSE = re.compile(rf"\n|[。！？!?]|\.(?=\s|$)|{_REASON}", re.IGNORECASE)
_CLOSES = re.compile(r"\s*(?:です|でし|だ|であ|とな|にな|[^\w\s]|\n|$)")
_DIRECTLY = re.compile(r"\W*(?:US|USD|EUR|CHF|Rs|R|ca|etwa|about|約|约|大约|是|为)?\W*", re.IGNORECASE)
_CALCULATES = re.compile(r"\s*[-+*/×÷x−–]\s*[0-9$€£¥]")


@cache
def _markers(language: Language) -> re.Pattern[str]:
    def either(texts: dict[str, str]) -> str:
        return "|".join({texts[language]: None, texts["en"]: None})

    bare = r"|\bответ\b" if language == "ru" else ""
    label = rf"(?<!step )(?<!-)(?<!ごとの)(?<!逐步)(?P<label>(?:{either(_LABELS)}){_LABEL_ENDS}{bare})"
    return re.compile(rf"(?P<sentence>{either(_SENTENCES)}|\\boxed\s*\{{)|{label}|####", re.IGNORECASE)


def _behind(marker: re.Match[str], numbers: Sequence[Numeral]) -> Numeral | None:
    """The number that a marker points to, in its clause or, if that has none, in the next non-empty one."""
    text, start = marker.string, marker.end()
    first = marker["label"] is not None and not re.search(r"\w", text[: marker.start()])
    for begin, end in _clauses(text, start):
        inside = [number for number in numbers if begin <= number.start < end]
        proper = [n for n in inside if not n.aside and (not n.weak or _stands_alone(text, start, n))]
        if not proper:
            continue
        if not marker["sentence"] and not _DIRECTLY.fullmatch(text, start, proper[0].start):
            return None
        if first and "=" in text[end:] and not _REASON_BEGINS.match(text, end):
            return None  # the label applies to everything that follows
        if (equals := text.rfind("=", begin, proper[-1].start)) >= 0:
            return next(number for number in proper if number.start > equals)
        return proper[-1] if _CALCULATES.match(text, proper[0].end) else proper[0]
    return None


def _clauses(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The first two clauses from ``start`` on that contain letters or digits."""
    count = 0
    while start < len(text) and count < 2:
        ending = _END_OF_CLAUSE.search(text, start)
        end = ending.start() if ending else len(text)
        if re.search(r"\w", text[start:end]):
            count += 1
            yield start, end
        start = ending.end() if ending else len(text)


def _stands_alone(text: str, marker_end: int, number: Numeral) -> bool:
    """Whether a short numeral is the answer itself: directly after the marker, and not continued by a word."""
    directly = _DIRECTLY.fullmatch(text, marker_end, number.start)
    return bool(directly and (_CLOSES.match(text, number.end) or COUNTER.match(text, number.end)))
