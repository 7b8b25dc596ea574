"""Finds the numbers in a text in seven languages: every numeral in common notation, with its position and value.

The rules are described in ``evaluators.numbers``, which decides which of these numbers is the answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import Literal

Language = Literal["de", "en", "es", "fr", "ja", "ru", "zh"]


@dataclass(frozen=True)
class Numeral:
    """A number in a text.

    Attributes:
        start, end: its position; the start is that of its digits.
        whole: whether it is written as a whole number.
        aside: whether it belongs to a list, a step, an ordinal or a date.
        weak: whether it may be part of a word.
    """

    start: int
    end: int
    value: Decimal
    whole: bool
    aside: bool
    weak: bool = False


_BLANKS = "\u00a0\u2007\u2009\u202f"
_MINUS = "-−﹣‒–"
_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"
_SAME_DIGITS = ("〇零", "一壱", "二弐两兩", "三参", *"四五六七八九")
_DIGITS = {char: value for value, chars in enumerate(_SAME_DIGITS) for char in chars}
_UNITS = {"十": 10, "拾": 10, "百": 100, "千": 1000} | dict.fromkeys("万萬", 10**4) | dict.fromkeys("億亿", 10**8)
_UNITS["兆"] = 10**12
_KANJI_DIGIT = f"[{''.join(_DIGITS)}]"
_KANJI_UNIT = f"(?:(?!千[克米瓦卡]|百分[之比])[{''.join(_UNITS)}])"  # 千克 is a kilogram, 百分之 means per cent
_COEFFICIENT = rf"(?:[0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|{_KANJI_DIGIT}+)"

COUNTER = re.compile(
    r"\s*(?:[個箇个つ人円元枚本匹頭冊台杯回倍歳才岁歲羽袋箱組只隻张張条條件辆輛块塊天名份盒瓶颗顆株点點秒日年週周米克%]"
    r"|ドル|セント|ユーロ|ポンド|キロ|グラム|メートル|センチ|時間|分|パーセント|美元|美分|小时|小時|公斤|公里|英)"
)
_WORDS = ("一", "一一", "万一", "十分", "八百屋")

_LISTED = re.compile(r"(?:^|\n)[\s#>*_(-]*$")
_LIST_ENDS = re.compile(r"[.):、](?:[ \t]+\S|[^\s\d])")
_STEP = re.compile(
    r"(?:step|schritt|paso|étape|шаг|question|frage|pregunta|задача|ステップ|手順|問題?|问题|步骤|步驟|第|№|n[or]\.)\s*$",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"(?:st|nd|rd|th|er|ère|e|ème|[.]?[ºª]|ro|ra|do|da|to|ta|mo|ma|vo|va|no|na|-[а-я]{1,3})\b|[つ番回日年人個]目"
    r"|\.\s(?:tag(?:es)?|woche|monat(?:s|es)?|jahr(?:es)?|klasse|mal|stock|platz|januar|februar|märz|april|mai|juni|juli"
    r"|august|september|oktober|november|dezember)\b",  # German writes "am 3. Tag"
    re.IGNORECASE,
)
_MOMENT = re.compile(
    r"(?<![\d.,/:-])(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([./-])\d{1,2}\1(?:\d{4}|\d\d)|\d{1,2}:\d\d(?::\d\d)?"
    r"|(?:\d{4}年)?\d{1,2}月\d{1,2}[日号])(?![\d/:-])"
)
_CODES = frozenset({"USD", "EUR", "GBP", "JPY", "CHF", "RUB", "CNY", "RMB", "MXN", "RS"})
_NEGATIVE = re.compile(r"(?P<latin>\b(?:minus|negative|menos|moins|минус)\s+)$|(?:マイナス|负|負)\s*$", re.IGNORECASE)
_CLAUSE_BEGINS = re.compile(
    r"(?:^|[:=(,;\n—]|\b(?:is|be|equals|ist|lautet|beträgt|es|est|равно|равен|будет))\s*$", re.I
)
_AFTER_NUMBER = re.compile(r"[0-9)\]%][一-鿿ァ-ヶー]{0,4}[ \t]*\Z")


_THOUSAND, _MILLION, _BILLION = Decimal(10**3), Decimal(10**6), Decimal(10**9)
_SCALES: dict[Language, dict[str, Decimal]] = {
    "de": {"tausend": _THOUSAND, "million(?:en)?|mio\\b\\.?": _MILLION, "milliarden?|mrd\\b\\.?": _BILLION},
    "en": {"thousands?": _THOUSAND, "millions?": _MILLION, "billions?": _BILLION},
    "es": {"mil millones": _BILLION, "mil": _THOUSAND, "mill(?:ón|ones)": _MILLION},
    "fr": {"mille": _THOUSAND, "millions?": _MILLION, "milliards?": _BILLION},
    "ja": {},
    "ru": {
        "тысяч[аиу]?|тыс\\b\\.?": _THOUSAND, "миллион(?:а|ов)?|млн\\b\\.?": _MILLION,
        "миллиард(?:а|ов)?|млрд\\b\\.?": _BILLION,
    },
    "zh": {},
}  # fmt: skip


def plain(text: str, language: Language) -> str:
    """Convert full-width letters, digits and signs to ASCII, and single-character and LaTeX fractions to a slash."""
    text = re.sub("(?<=[０-９])[，．](?=[０-９])", lambda match: ",."["，．".index(match[0])], text)
    text = re.sub("(?<=[^\\n][0-9])．(?=[0-9])", ".", text)  # at the start of a line it belongs to a list
    if language == "ja":  # in Chinese it ends clauses
        text = re.sub("(?<=[0-9])，(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"(\d?)\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}", _slash, text)
    text = re.sub("[！-＋－／-～]", lambda match: chr(ord(match[0]) - 0xFEE0), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text).replace("⁄", "/")
    return re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d)", lambda match: "," if "{" in match[0] else "\u202f", text)  # LaTeX


def _slash(fraction: re.Match[str]) -> str:
    whole, above, below = fraction.groups()
    return f"{whole} {above}/{below}" if whole else f"{above}/{below}"


@cache
def _pattern(language: Language) -> re.Pattern[str]:
    """A pattern for numbers in a language: sign, currency, numeral and scale."""
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
    scales = "|".join(f"(?:{name})" for name in _SCALES[language])
    scale = rf"(?:\s(?P<scale>{scales})(?!\w))?" if scales else "(?P<scale>(?!))?"
    return re.compile(rf"(?P<sign>{sign})?{currency}(?P<numeral>{numeral}){scale}", re.IGNORECASE)


def find_numbers(text: str, language: Language) -> list[Numeral]:
    """All numbers of a text returned by ``plain``, in order, with the parts of a fraction joined."""
    joined: list[Numeral] = []
    moments = {
        at
        for moment in _MOMENT.finditer(text)
        if not _ends(_STEP, text, moment.start())
        for at in range(*moment.span())
    }
    for match in _pattern(language).finditer(text):
        if not _in_word(match):
            number = _number(match, language)
            _append(text, joined, replace(number, aside=number.aside or number.start in moments))
    return joined


def _in_word(match: re.Match[str]) -> bool:
    """Whether letters that are not a currency, LaTeX or "times" directly precede it ("A4", "covid-19")."""
    start = match.start()
    before = re.compile(rf"(\\?)([{_LETTERS}]+)[-‐‑_^]?\Z").search(match.string, max(0, start - 20), start)
    if before is None or before[1] or (match["currency"] and not match["sign"]):
        return False
    times = before[2] in "xXхХ" and re.search(r"[0-9)]\s?$", match.string[: before.start()])
    return not times and before[2].upper() not in _CODES


def _number(match: re.Match[str], language: Language) -> Numeral:
    text, raw, start, end = match.string, match["numeral"], match.start("numeral"), match.end()
    kanji = any(char in _DIGITS or char in _UNITS for char in raw)
    value = _kanji(raw, language) if kanji else _arabic(raw, language)
    if match["scale"]:
        value *= next(factor for name, factor in _SCALES[language].items() if re.fullmatch(name, match["scale"], re.I))
    whole = (kanji or raw.isdigit()) and not match["scale"]
    listed = whole and value < 100 and _ends(_LISTED, text, start) and _LIST_ENDS.match(text, end)
    aside = bool(listed or _ends(_STEP, text, match.start()) or _ORDER.match(text, end))
    weak = kanji and not re.search("[0-9]", raw) and _is_weak(raw, text, end)
    return Numeral(start, end, -value if _is_negative(match) else value, whole, aside, weak)


def _ends(pattern: re.Pattern[str], text: str, end: int) -> re.Match[str] | None:
    """Match the pattern, which must end in ``$``, right before ``end``. Only "^" can look back over 40 characters."""
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
    """The value of a numeral with kanji: coefficients precede units; units from 10,000 up multiply the sum so far."""
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
    return COUNTER.match(text, end) is None


def _append(text: str, numbers: list[Numeral], number: Numeral) -> None:
    """Append a number to those found, or join it with the last one if the two form a fraction."""
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
    """Whether a slash precedes or follows it, as in a date."""
    return text[:start].rstrip(" ").endswith("/") or text[end:].lstrip(" ").startswith("/")
