r"""The number that an answer to a word problem gives: as the original work reads it, and as a person does.

``last_number_sakana`` repeats the scorer of the original work with its faults. ``answer_number`` reads what is written,
by these rules:

- **Which number.** The one behind the last marker ("The answer is", "答えは", "####", "\boxed{"), or else the last of
  the text. Behind a marker it is the first of the line or sentence; after the last equals sign, if there is one; the
  last of a calculation ("5 + 6, so 11"). Labels ("Answer:") are markers where a number follows at once; at the start
  of the text, only where nothing is calculated later. English markers count in every language.
- **No numbers** are digits behind letters ("A4"). Numbers of lists ("3. Then"), of steps and of orders ("3rd", "第3")
  count only where nothing behind a marker and nothing else in the text is a number.
- **Separators.** In German, Spanish, French and Russian a point, comma, blank or apostrophe before groups of exactly
  three digits groups them, and any other point or comma begins decimals: "1.234" and "1,234" are 1234, and "0,125",
  "3.5", "1234,567" have decimals. In English, Japanese and Chinese a comma groups and a point begins decimals: "1.234"
  has decimals, "1,234" has none, "3,5" is two numbers, and an ordinary blank groups nothing. In all of them, narrow and
  no-break blanks group, and after a group the other of point and comma begins decimals ("1.234,5" and "1,234.5").
- **Signs.** A minus of any kind at the number or its currency sign, unless it stands between two numbers ("10-5");
  "minus 5" where it begins a clause or follows "is"; "マイナス5", "负五".
- **Kanji.** "三十五", "一万二千三百", "3万5千", "二〇二四". Short ones are parts of many words (十分, 一緒): they
  count with a counter (三個), alone behind a marker, from two characters on where one is 十 or more, or from three on.
  Chinese "一百五" is 150.
- **Fractions** of whole numbers: "3/4", "2 1/2", "½", "3分の2", "三分之二". A percentage is the number before its sign.

Numbers in letters ("eleven") are not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import Literal

Language = Literal["de", "en", "es", "fr", "ja", "ru", "zh"]


def last_number_sakana(text: str) -> float | None:
    """The last number as the original work's scorer reads it: "1,234" is 234, "-5" is 5, kanji are none.

    SakanaAI/evolutionary-model-merge, evomerge/eval/ja_mgsm.py, ``extract_answer_number``. That takes commas out of
    what it found as well, where none can be any more.
    """
    found = re.findall(r"\d*\.?\d+", text)
    return float(found[-1]) if found else None


def answer_number(text: str, language: Language) -> Decimal | None:
    """The number that the answer gives, by the rules above; None if there is none."""
    plain = _plain(text)
    numbers = _numbers(plain, language)
    for marker in reversed(list(_markers(language).finditer(plain))):
        if (found := _behind(marker, numbers)) is not None:
            return found.value
    return _last(numbers)


def last_number(text: str, language: Language) -> Decimal | None:
    """The last number of the text, whatever its markers; None if there is none."""
    return _last(_numbers(_plain(text), language))


@dataclass(frozen=True)
class _Number:
    """``start`` is that of its digits; ``aside``: of a list, a step or an order; ``weak``: maybe part of a word."""

    start: int
    end: int
    value: Decimal
    whole: bool
    aside: bool
    weak: bool = False


def _last(numbers: Sequence[_Number]) -> Decimal | None:
    sure = [number for number in numbers if not number.weak]
    proper = [number for number in sure if not number.aside]
    return (proper or sure)[-1].value if sure else None


# ---- markers ---------------------------------------------------------------------------------------------------------

_SENTENCES = {
    "de": r"\bdie (?:\w+ )?antwort (?:lautet|ist|beträgt)|\bdas (?:end)?ergebnis (?:lautet|ist|beträgt)",
    "en": r"\b(?:the|our|my) (?:final |correct |right )?answer (?:is|would be)\b",
    "es": r"\bla respuesta(?: \w+)? (?:es|sería)\b|\bel resultado(?: \w+)? es\b",
    "fr": r"\bla réponse(?: \w+)? (?:est|serait)\b|\ble résultat(?: \w+)? est\b",
    "ja": r"(?:答え|解答|回答|正解)は",
    "ru": r"\bответ(?: равен| будет|\s*[—–-](?=\s))",
    "zh": r"(?:答案|答数|答數)(?:是|为|為)",
}
_LABELS = {
    "de": r"\b(?:antwort|ergebnis|lösung)[\s*]*[:=]",
    "en": r"\banswer[\s*]*[:=]",
    "es": r"\b(?:respuesta|resultado)(?: final)?[\s*]*[:=]",
    "fr": r"\b(?:réponse|résultat)(?: finale?)?[\s*]*[:=]",
    "ja": r"(?:答え?|解答|回答|正解)[\s*]*[:=]",
    "ru": r"\bответ\b[\s*]*[:=]?",
    "zh": r"(?:答案?|解答)[\s*]*[:=]",
}
_END_OF_CLAUSE = re.compile(r"\n|[。！？!?]|\.(?=\s|$)")
_DIRECTLY = re.compile(r"\W*(?:US|USD|EUR|CHF|Rs|R|ca|etwa|about|約|约|大约|是|为)?\W*", re.IGNORECASE)
_CALCULATES = re.compile(r"\s*[-+*/×÷x−–]\s*[0-9$€£¥]")


@cache
def _markers(language: Language) -> re.Pattern[str]:
    def either(texts: dict[str, str]) -> str:
        return "|".join({texts[language]: None, texts["en"]: None})

    label = rf"(?<!step )(?<!-)(?<!ごとの)(?<!逐步)(?P<label>{either(_LABELS)})"
    return re.compile(rf"(?P<sentence>{either(_SENTENCES)}|\\boxed\s*\{{)|{label}|####", re.IGNORECASE)


def _behind(marker: re.Match[str], numbers: Sequence[_Number]) -> _Number | None:
    """The number that the marker points to, in its clause or, where that has none, in the next that is not empty."""
    text, start = marker.string, marker.end()
    first = marker["label"] is not None and not re.search(r"\w", text[: marker.start()])
    for begin, end in _clauses(text, start):
        inside = [number for number in numbers if begin <= number.start < end]
        proper = [n for n in inside if not n.aside and (not n.weak or _stands_alone(text, start, n))]
        if not proper:
            continue
        if not marker["sentence"] and not _DIRECTLY.fullmatch(text, start, proper[0].start):
            return None
        if first and "=" in text[end:]:
            return None  # the label is of all that follows
        if (equals := text.rfind("=", begin, proper[-1].start)) >= 0:
            return next(number for number in proper if number.start > equals)
        return proper[-1] if _CALCULATES.match(text, proper[0].end) else proper[0]
    return None


def _clauses(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The first two clauses from ``start`` on that hold letters or digits."""
    found = 0
    while start < len(text) and found < 2:
        ending = _END_OF_CLAUSE.search(text, start)
        end = ending.start() if ending else len(text)
        if re.search(r"\w", text[start:end]):
            found += 1
            yield start, end
        start = ending.end() if ending else len(text)


# ---- numbers ---------------------------------------------------------------------------------------------------------

_BLANKS = "\u00a0\u2007\u2009\u202f"
_MINUS = "-−﹣‒–"
_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"
_SAME_DIGITS = ("〇零", "一壱", "二弐两兩", "三参", *"四五六七八九")
_DIGITS = {char: value for value, chars in enumerate(_SAME_DIGITS) for char in chars}
_UNITS = {"十": 10, "拾": 10, "百": 100, "千": 1000} | dict.fromkeys("万萬", 10**4) | dict.fromkeys("億亿", 10**8)
_UNITS["兆"] = 10**12
_KANJI_DIGIT = f"[{''.join(_DIGITS)}]"
_KANJI_UNIT = f"(?:(?!千[克米瓦卡]|百分[之比])[{''.join(_UNITS)}])"  # 千克 is a kilogram, 百分之 per cent
_COEFFICIENT = rf"(?:[0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|{_KANJI_DIGIT}+)"

_COUNTER = re.compile(
    r"\s*(?:[個箇个つ人円元枚本匹頭冊台杯回倍歳才岁歲羽袋箱組只隻张張条條件辆輛块塊天名份盒瓶颗顆株点點秒日年週周米克%]"
    r"|ドル|セント|ユーロ|ポンド|キロ|グラム|メートル|センチ|時間|分|パーセント|美元|美分|小时|小時|公斤|公里|英)"
)
_WORDS = ("一", "一一", "万一", "十分", "八百屋")
_CLOSES = re.compile(r"\s*(?:です|でし|だ|であ|とな|にな|[^\w\s]|\n|$)")

_LISTED = re.compile(r"(?:^|\n)[\s#>*_(-]*$")
_LIST_ENDS = re.compile(r"[.):、](?:[ \t]+\S|[^\s\d])")
_STEP = re.compile(
    r"(?:step|schritt|paso|étape|шаг|question|frage|pregunta|задача|ステップ|手順|問題?|问题|步骤|步驟|第|№|n[or]\.)\s*$",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"(?:st|nd|rd|th|er|ère|e|ème|[.]?[ºª]|ro|ra|do|da|to|ta|mo|ma|vo|va|no|na|-[а-я]{1,3})\b|[つ番回日年人個]目",
    re.IGNORECASE,
)
_CODES = frozenset({"USD", "EUR", "GBP", "JPY", "CHF", "RUB", "CNY", "RMB", "MXN", "RS"})
_NEGATIVE = re.compile(r"(?P<latin>\b(?:minus|negative|menos|moins|минус)\s+)$|(?:マイナス|负|負)\s*$", re.IGNORECASE)
_CLAUSE_BEGINS = re.compile(
    r"(?:^|[:=(,;\n—]|\b(?:is|be|equals|ist|lautet|beträgt|es|est|равно|равен|будет))\s*$", re.I
)
_AFTER_NUMBER = re.compile(r"[0-9)\]%][一-鿿ァ-ヶー]{0,4}[ \t]*$")


def _plain(text: str) -> str:
    """Full-width letters, digits and signs as ASCII, and fractions of one character as three."""
    text = re.sub("(?<=[０-９])[，．](?=[０-９])", lambda found: ",."["，．".index(found[0])], text)
    text = re.sub("[！-＋－／-～]", lambda found: chr(ord(found[0]) - 0xFEE0), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0]), text).replace("⁄", "/")
    return re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d)", lambda found: "," if "{" in found[0] else "\u202f", text)  # LaTeX


@cache
def _pattern(language: Language) -> re.Pattern[str]:
    """Numbers of a language: sign, currency and numeral."""
    point = language in ("en", "ja", "zh")
    separator, decimal = (f"[,'’{_BLANKS}]", r"\.") if point else (f"[.,'’ {_BLANKS}]", "[.,]")
    groups = (
        rf"[1-9][0-9]{{0,2}}(?:(?P<sep>{separator})[0-9]{{3}}(?:(?P=sep)[0-9]{{3}})*(?![0-9])"
        rf"(?:(?!(?P=sep)){decimal}[0-9]+)?"
        r"|(?:\.[0-9]{3}){2,}(?![0-9])(?:,[0-9]+)?|\.[0-9]{3},[0-9]{1,2}(?![0-9]))"
    )
    numeral = rf"{groups}|[0-9]+(?:{decimal}[0-9]+)?|(?<![\w.,])\.[0-9]+"
    if language in ("ja", "zh"):
        numeral = rf"(?:(?:{_COEFFICIENT})?{_KANJI_UNIT})+(?:{_COEFFICIENT})?|{_KANJI_DIGIT}+|{numeral}"
    sign = f"[{_MINUS}]"
    currency = rf"(?P<currency>\\?[$€£¥￥₽₹]\s?)?(?(currency)(?P<inner>{sign})?)"
    return re.compile(rf"(?P<sign>{sign})?{currency}(?P<numeral>{numeral})")


def _numbers(text: str, language: Language) -> list[_Number]:
    """All numbers of the text in order, the parts of a fraction joined."""
    joined: list[_Number] = []
    for match in _pattern(language).finditer(text):
        if not _in_word(match):
            _append(text, joined, _number(match, language))
    return joined


def _in_word(match: re.Match[str]) -> bool:
    """Whether letters stand directly before it ("A4", "covid-19") that are no currency, LaTeX or "times"."""
    start = match.start()
    before = re.compile(rf"(\\?)([{_LETTERS}]+)[-‐‑_^]?$").search(match.string, max(0, start - 20), start)
    if before is None or before[1] or (match["currency"] and not match["sign"]):
        return False
    times = before[2] in "xXхХ" and re.search(r"[0-9)]\s?$", match.string[: before.start()])
    return not times and before[2].upper() not in _CODES


def _number(match: re.Match[str], language: Language) -> _Number:
    text, raw, start, end = match.string, match["numeral"], match.start("numeral"), match.end()
    kanji = any(char in _DIGITS or char in _UNITS for char in raw)
    value = _kanji(raw, language) if kanji else _arabic(raw, language)
    whole = kanji or raw.isdigit()
    listed = whole and value < 100 and _ends(_LISTED, text, start) and _LIST_ENDS.match(text, end)
    aside = bool(listed or _ends(_STEP, text, match.start()) or _ORDER.match(text, end))
    weak = kanji and not re.search("[0-9]", raw) and _is_weak(raw, text, end)
    return _Number(start, end, -value if _is_negative(match) else value, whole, aside, weak)


def _ends(pattern: re.Pattern[str], text: str, end: int) -> re.Match[str] | None:
    """The pattern, which must end in ``$``, right before ``end``. Only "^" can look further back than 40 characters."""
    return pattern.search(text, max(0, end - 40), end)


def _is_negative(match: re.Match[str]) -> bool:
    text, start = match.string, match.start()
    if match["sign"]:
        return not _ends(_AFTER_NUMBER, text, start)
    word = _ends(_NEGATIVE, text, start)
    if word is None:
        return match["inner"] is not None
    return (
        bool(_ends(_CLAUSE_BEGINS, text, word.start()))
        if word["latin"]
        else not _ends(_AFTER_NUMBER, text, word.start())
    )


def _arabic(raw: str, language: Language) -> Decimal:
    digits = re.sub(rf"['’ {_BLANKS}]", "", raw)
    separators = [char for char in digits if char in ".,"]
    if len(set(separators)) == 2:
        decimal = separators[-1]
    elif len(separators) != 1:
        decimal = ""
    elif language in ("en", "ja", "zh"):
        decimal = "."
    else:
        groups = digits == raw and re.fullmatch("[1-9][0-9]{0,2}[.,][0-9]{3}", raw)
        decimal = "" if groups else separators[0]
    return Decimal("".join("." if char == decimal else char for char in digits if char == decimal or char not in ".,"))


# ---- kanji and fractions ---------------------------------------------------------------------------------------------


def _kanji(raw: str, language: Language) -> Decimal:
    """The value of a numeral with kanji: coefficients before units, units of 10,000 and more after sums of smaller."""
    total = section = Decimal(0)
    pending: Decimal | None = None
    unit = 0
    parts = re.findall(rf"{_COEFFICIENT}|[{''.join(_UNITS)}]", raw)
    for part in parts:
        if part not in _UNITS:
            pending = Decimal("".join(str(_DIGITS.get(char, char)) for char in part if char != ","))
            continue
        unit = _UNITS[part]
        if unit < 10_000:
            section += unit * (1 if pending is None else pending)
        else:
            section += pending or 0
            total += unit * (section if section or pending is not None else 1)
            section = Decimal(0)
        pending = None
    if language == "zh" and unit >= 100 and len(parts[-1]) == 1 and pending is not None:
        pending *= unit // 10  # 一百五 is 150; 105 is 一百零五
    return total + section + (pending or 0)


def _is_weak(raw: str, text: str, end: int) -> bool:
    if any(raw + text[end : end + len(word) - len(raw)] == word for word in _WORDS):
        return True
    if len(raw) > 2 or (len(raw) == 2 and any(char in _UNITS for char in raw)):
        return False
    return _COUNTER.match(text, end) is None


def _stands_alone(text: str, marker_end: int, number: _Number) -> bool:
    """Whether a short numeral is the answer itself: right behind the marker, and no word goes on after it."""
    directly = _DIRECTLY.fullmatch(text, marker_end, number.start)
    return bool(directly and (_CLOSES.match(text, number.end) or _COUNTER.match(text, number.end)))


def _append(text: str, numbers: list[_Number], number: _Number) -> None:
    """Add a number to those found, as a part of the last where the two are a fraction."""
    last = numbers[-1] if numbers else None
    if last is None or not last.whole or not number.whole or not last.value or not number.value:
        numbers.append(number)
        return
    between = text[last.end : number.start].replace(" ", "")
    if between in ("分の", "分之"):
        numbers[-1] = replace(last, end=number.end, value=number.value / last.value, whole=False, weak=False)
    elif between == "/" and not _in_chain(text, last.start, number.end):
        value = last.value / number.value
        numbers[-1] = replace(last, end=number.end, value=value, whole=False)
        if len(numbers) > 1 and numbers[-2].whole and text[numbers[-2].end : last.start] == " ":
            units = numbers[-2]
            numbers[-2:] = [
                replace(units, end=number.end, value=units.value + value.copy_sign(units.value), whole=False)
            ]
    else:
        numbers.append(number)


def _in_chain(text: str, start: int, end: int) -> bool:
    """Whether a slash goes on before or after it, as in a date."""
    return text[:start].rstrip(" ").endswith("/") or text[end:].lstrip(" ").startswith("/")
