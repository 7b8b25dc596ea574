"""Reading the number of an answer: hard cases of every language, the original work's faults, and round trips."""

from __future__ import annotations

from decimal import Decimal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.numbers import Language, answer_number, last_number, last_number_sakana

CASES: dict[Language, list[tuple[str, str | None]]] = {
    "en": [
        ("The answer is 35.", "35"),
        ("So she makes $1,234.50 a day.", "1234.50"),
        ("He pays 3 times 400, that is 1,200.", "1200"),
        ("The answer is 18. She eats 3 eggs and bakes with 4.", "18"),
        ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "18"),
        ("The answer is 5 + 6 = 11 balls, of 3 cans.", "11"),
        ("The answer is 5 + 6, which is 11.", "11"),
        ("The temperature is -5 degrees.", "-5"),
        ("They owe −$1,000", "-1000"),
        ("They owe $-20", "-20"),
        ("The answer is minus 7.", "-7"),
        ("Of 10 apples, 10-4", "4"),
        ("It is 0.125 of it", "0.125"),
        ("half of it, .5", "0.5"),
        ("It grows by 1.234", "1.234"),
        ("She buys 12 sheets of A4", "12"),
        ("It says A4.", None),
        ("There is no number here.", None),
        ("", None),
        ("The total is 18 for covid-19", "18"),
        ("Sum: 20\n1. First add.\n2. Then stop.", "20"),
        ("He has 7 left on the 3rd day", "7"),
        ("**Answer:** 42 apples\nThis took 3 steps.", "42"),
        ("Answer: Roger starts with 5. He ends with 11", "11"),
        ("Answer: 16 - 7 = 9 eggs.\nThey bring 9 * 2 = 18", "18"),
        ("Step-by-Step Answer: 5 and 6 make 11", "11"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("We get \\boxed{1{,}234} for 3 people", "1234"),
        ("The final answer is: $\\boxed{18}$", "18"),
        ("The answer is 50%.", "50"),
        ("He runs 3/4", "0.75"),
        ("It takes 2 1/2 hours", "2.5"),
        ("It takes 2½ hours", "2.5"),
        ("on 5/6/2024", "2024"),
        ("The answer is 3x4=12", "12"),
        ("It is US$5", "5"),
        ("numbers 3,5", "5"),
        ("1,234,567 people!", "1234567"),
        ("The answer is Rs. 100.", "100"),
        ("The answer is\n\n18", "18"),
        ("The total is\n18", "18"),
        ("It falls by 10\n-5", "-5"),
        ("The answer is \\dfrac{1}{2}", "0.5"),
        ("We get \\boxed{2\\frac{1}{2}}", "2.5"),
        ("It is \\boxed{-\\frac{3}{4}}", "-0.75"),
        ("The answer is 5, since 3 + 3 = 6 is too much.", "5"),
        ("The answer to the question is 9 and 3 are left", "9"),
        ("The correct answer should be 42. There are 3", "42"),
        ("### Final Answer\n\n42 eggs\n\nThis uses 3", "42"),
        ("The answer is $1.5 million.", "1500000"),
        ("They raise 70 thousand dollars", "70000"),
        ("He works 5 hours until 10:30", "5"),
        ("He ends with 18 on 2024-05-06", "18"),
        ("2000-50-30 = 1920", "1920"),
        ("The clock shows 10:30", "30"),
        ("A) 5 B) 6\nThe answer is B) 6", "6"),
        ("\\boxed{18\\text{ eggs}}", "18"),
    ],
    "ja": [
        ("答えは35です。", "35"),
        ("答えは35。", "35"),
        ("合計は35円", "35"),
        ("りんごは12個あります。", "12"),
        ("答えは1,234ドルです。", "1234"),
        ("答えは１，２３４です。", "1234"),
        ("気温は－５度", "-5"),
        ("気温はマイナス5度です", "-5"),
        ("気温は-5度です", "-5"),
        ("10個-4個", "4"),
        ("答えは18です。彼女は卵を3個食べます。", "18"),
        ("答えは5+6で11です。", "11"),
        ("5+6=11。答えは11です。", "11"),
        ("答えは三十五です。", "35"),
        ("全部で一万二千三百円です", "12300"),
        ("費用は3万5千円です", "35000"),
        ("費用は1.5億円です", "150000000"),
        ("費用は1億2000万円", "120000000"),
        ("それは二〇二四年です", "2024"),
        ("答えは百です。", "100"),
        ("答えは三。", "3"),
        ("全部で三個です。", "3"),
        ("合計は7個です。これで十分です。", "7"),
        ("合計は7個です。一緒に食べます。もう一つの方法もあります。", "7"),
        ("A4の紙が8枚", "8"),
        ("1. まず足します。\n2. 次に引きます。\n合計：20\n3. 終わりです。", "20"),
        ("第3に、合計は20円", "20"),
        ("全体の3分の2です", str(Decimal(2) / 3)),
        ("全体の50％です", "50"),
        ("答え：４２個\n3つの手順で求めました。", "42"),
        ("ステップごとの答え：最初に5個、後で6個、全部で11個", "11"),
        ("答えは次の通りです。\n18ドル", "18"),
        ("#### 72", "72"),
        ("割合は3.5", "3.5"),
        ("三万五円", "30005"),
        ("答えは分かりません。", None),
        ("一歩一歩考えましょう。", None),
        ("答えは1．5です", "1.5"),
        ("1．5個を足す\n合計7", "7"),
        ("合計1，234円", "1234"),
        ("### 答え\n18個\n\n3つの手順", "18"),
        ("5月6日には18個あります。次は5月7日です。", "18"),
        ("答えは12,000円（1万2千円）です", "12000"),
        ("費用は1億2,345万円", "123450000"),
        ("10〜15分", "15"),
    ],
    "zh": [
        ("答案是 35。", "35"),
        ("一共35元", "35"),
        ("答案是：1,234 美元", "1234"),
        ("答案是１２", "12"),
        ("答案是三十五。", "35"),
        ("总共一万二千三百元", "12300"),
        ("总共3万5千元", "35000"),
        ("总共两千三百人", "2300"),
        ("总共一百五元", "150"),
        ("总共一百零五元", "105"),
        ("总共三万五元", "35000"),
        ("总共3亿人", "300000000"),
        ("那是二〇二四年", "2024"),
        ("她有两个。", "2"),
        ("气温是负5度", "-5"),
        ("气温是负五十度", "-50"),
        ("温度是-5", "-5"),
        ("答案是18。她吃了3个。", "18"),
        ("5 + 6 = 11。答案是 11。", "11"),
        ("百分之五十", "50"),
        ("占50%", "50"),
        ("占三分之二", str(Decimal(2) / 3)),
        ("总共7个。这是一个问题，十分简单。", "7"),
        ("重量是2千克", "2"),
        ("总共3.5元", "3.5"),
        ("步骤1：相加\n得到20\n步骤2：完成", "20"),
        ("第三天有8个", "8"),
        ("答：四十二元", "42"),
        ("没有答案。", None),
        ("答案是5，因为3+3=6不对", "5"),
        ("她有3，然后200", "200"),
        ("答案是1万2千", "12000"),
    ],
    "es": [
        ("La respuesta es 35.", "35"),
        ("Gana 1.234 euros", "1234"),
        ("Gana 1,234 dólares", "1234"),
        ("Gana 1 234 euros", "1234"),
        ("Gana 1\u202f234,50 euros", "1234.50"),
        ("Cuesta 1.234,56 €", "1234.56"),
        ("Cuesta $1,234.56", "1234.56"),
        ("Cuesta 3,5 euros", "3.5"),
        ("Cuesta 3.50", "3.5"),
        ("Es 0,125 del total", "0.125"),
        ("La respuesta es -7.", "-7"),
        ("La respuesta es menos 7", "-7"),
        ("La respuesta es 18. Come 3 huevos.", "18"),
        ("La respuesta es 5 + 6 = 11", "11"),
        ("Paso 3: Total 20\nPaso 4: fin", "20"),
        ("Respuesta paso a paso: 5 y 6 son 11", "11"),
        ("Quedan 9.\nRespuesta: 9 en 3 cajas", "9"),
        ("Son 1.234.567 personas", "1234567"),
        ("El resultado es 2.000", "2000"),
        ("Sobre la hoja A4", None),
        ("Gana 8 mil pesos", "8000"),
        ("Son 2 mil millones", "2000000000"),
        ("Mide 8 milímetros", "8"),
        ("La solución es 18 en 3 días", "18"),
        ("La respuesta es 5, porque 3 + 2 = 5 y 1", "5"),
    ],
    "fr": [
        ("La réponse est 35.", "35"),
        ("Il gagne 1 234 euros", "1234"),
        ("Il gagne 1\u00a0234 euros", "1234"),
        ("Il gagne 1\u202f234\u202f567,5 €", "1234567.5"),
        ("Il gagne 1.234 euros", "1234"),
        ("Il gagne 1,234 euros", "1234"),
        ("Cela coûte 3,50 €", "3.50"),
        ("Cela coûte 3.50 €", "3.50"),
        ("Il fait −5 degrés", "-5"),
        ("La réponse est moins 5", "-5"),
        ("La réponse est 18. Elle en mange 3.", "18"),
        ("La réponse est : 18 dollars", "18"),
        ("Réponse étape par étape : 5 et 6 font 11", "11"),
        ("Il reste 9.\nRéponse : 9 en 3 jours", "9"),
        ("5 + 6 = 11. La réponse est 11.", "11"),
        ("1) Ajouter 5\n2) Obtenir 20\n3) Finir", "20"),
        ("Il en a 7 le 3e jour", "7"),
        ("C'est 50 %", "50"),
        ("C'est 1/2", "0.5"),
        ("Rien ici", None),
        ("Il y en a 3 millions", "3000000"),
        ("Il mesure 5 millimètres", "5"),
        ("La solution est 18 en 3 jours", "18"),
        ("La réponse est 5, car 3 + 3 = 6", "5"),
    ],
    "de": [
        ("Die Antwort lautet 35.", "35"),
        ("Die Antwort ist 29.", "29"),
        ("Er zahlt 1.234 Euro", "1234"),
        ("Er zahlt 1,234 Euro", "1234"),
        ("Er zahlt 1 234 Euro", "1234"),
        ("Er zahlt 1'234 Franken", "1234"),
        ("Er zahlt 1.234,50 €", "1234.50"),
        ("Er zahlt 1,50 €", "1.50"),
        ("Er zahlt 1.5 €", "1.5"),
        ("Er zahlt 5,- €", "5"),
        ("Es sind 1234,567 Liter", "1234.567"),
        ("Es sind -5 Grad", "-5"),
        ("Das Ergebnis ist minus 5", "-5"),
        ("Die Antwort lautet 18. Sie isst 3 Eier.", "18"),
        ("Schritt-für-Schritt-Antwort: 5 und 6 macht 11", "11"),
        ("Es bleiben 9.\nAntwort: 9 in 3 Tagen", "9"),
        ("4 x 5 = 20 Computer", "20"),
        ("1. Addieren gibt 20\n2. Fertig", "20"),
        ("Das sind 1.000.000 Euro.", "1000000"),
        ("Auf A4", None),
        ("Insgesamt\n18", "18"),
        ("Er hat 5 am 3. Tag", "5"),
        ("Er hat 18 am 5.6.2024", "18"),
        ("Also ist die Antwort 18. Sie hat 3", "18"),
        ("Die Lösung lautet 18 in 3 Tagen", "18"),
        ("Das sind 1,5 Mio. Euro", "1500000"),
        ("Er hat 2 Millionen", "2000000"),
    ],
    "ru": [
        ("Ответ — 35.", "35"),
        ("Ответ: 35", "35"),
        ("Ответ: 1 234 рубля", "1234"),
        ("Всего 1\u00a0234,5 рубля", "1234.5"),
        ("Всего 1.234 рубля", "1234"),
        ("Всего 1,234 рубля", "1234"),
        ("Всего 3,5 литра", "3.5"),
        ("Всего 0,125", "0.125"),
        ("Температура −5 градусов", "-5"),
        ("Температура: минус 5", "-5"),
        ("Ответ — -5", "-5"),
        ("Ответ — 18. Она ест 3 яйца.", "18"),
        ("Ответ: 18 долларов за 2 дня", "18"),
        ("5 + 6 = 11. Ответ — 11.", "11"),
        ("Ответ равен 20 в 3 шага", "20"),
        ("Шаг 1: сложить 20\nШаг 2: конец", "20"),
        ("Осталось 7 на 3-й день", "7"),
        ("Это 50%.", "50"),
        ("3х4=12", "12"),
        ("На листе А4", None),
        ("Ответ\n18\nза 3", "18"),
        ("Ответом является 18 за 3 дня", "18"),
        ("Прибыль 70 тысяч долларов", "70000"),
        ("Прибыль 70 тыс. рублей", "70000"),
        ("Прошло 5 тысячелетий", "5"),
        ("Ответ: 5, потому что 3 + 3 = 6", "5"),
    ],
}


@pytest.mark.parametrize(
    ("language", "text", "expected"), [(language, *case) for language, cases in CASES.items() for case in cases]
)
def test_a_hard_case(language: Language, text: str, expected: str | None) -> None:
    assert answer_number(text, language) == (None if expected is None else Decimal(expected))


def test_every_language_has_its_cases() -> None:
    assert set(CASES) == set(get_args(Language))
    assert min(len(cases) for cases in CASES.values()) >= 12


def test_the_last_number_knows_no_markers() -> None:
    assert last_number("The answer is 18. She eats 3.", "en") == 3
    assert last_number("答えは18です。卵を三個食べます。", "ja") == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("答えは1,234です。", 234.0),  # what it cannot read, as published
        ("答えは-5です。", 5.0),
        ("答えは18です。彼女は卵を3個食べます。", 3.0),
        ("3分の2、つまり2/3", 3.0),
        ("A4", 4.0),
        ("答えは三十五です。", None),
        ("3万5千", 5.0),
        ("10,000円", 0.0),
        ("12.", 12.0),  # what it can
        ("35。", 35.0),
        ("1.50ドル", 1.5),
        (".5", 0.5),
        ("1.2.3", 0.3),
        ("答えは１８です", 18.0),
        ("18 ドル\n\n", 18.0),
        ("", None),
    ],
)
def test_the_original_works_reader(text: str, expected: float | None) -> None:
    assert last_number_sakana(text) == expected


# ---- round trips -----------------------------------------------------------------------------------------------------

CONVENTIONS: dict[Language, list[tuple[str, str]]] = {  # (between groups, before decimals)
    "en": [(",", "."), ("\u202f", "."), ("", ".")],
    "ja": [(",", "."), ("", ".")],
    "zh": [(",", "."), ("", ".")],
    "de": [(".", ","), ("\u202f", ","), ("'", "."), (" ", ",")],
    "es": [(".", ","), (" ", ","), ("\u00a0", ","), (",", ".")],
    "fr": [("\u202f", ","), ("\u00a0", ","), (" ", ","), (".", ",")],
    "ru": [("\u00a0", ","), (" ", ","), ("\u202f", ",")],
}
SENTENCES: dict[Language, str] = {
    "en": "They have 3 boxes. The answer is {}.",
    "ja": "箱は3つ。答えは{}です。",
    "zh": "有 3 个盒子。答案是 {}。",
    "de": "Es sind 3 Kisten. Die Antwort lautet {}.",
    "es": "Hay 3 cajas. La respuesta es {}.",
    "fr": "Il y a 3 boîtes. La réponse est {}.",
    "ru": "Есть 3 коробки. Ответ — {}.",
}
languages = st.sampled_from(get_args(Language))


def written(value: Decimal, group: str, decimal: str) -> str:
    return f"{value:,f}".replace(".", "P").replace(",", group).replace("P", decimal)


@given(languages, st.data(), st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_what_is_written_is_read(language: Language, data: st.DataObject, digits: int, places: int) -> None:
    """But for three decimals behind up to three digits, which commas and points of groups look like."""
    group, decimal = data.draw(st.sampled_from(CONVENTIONS[language]))
    value = Decimal(digits).scaleb(-places)
    if decimal == "," or language not in ("en", "ja", "zh"):
        places = 0 if places == 3 and abs(value) < 1000 else places
        value = Decimal(digits).scaleb(-places)
    text = written(value, group, decimal)
    assert answer_number(SENTENCES[language].format(text), language) == value
    assert last_number(f"= {text}", language) == value


def kanji(value: int, digits: str, units: tuple[str, str, str], big: tuple[str, ...], zero: str) -> str:
    """A number in kanji, written by the rules of the school; ``zero`` stands in Chinese for places left out."""
    if value == 0:
        return "零"
    groups, text = [], ""
    while value:
        value, rest = divmod(value, 10_000)
        groups.append(rest)
    for place in reversed(range(len(groups))):
        part = groups[place]
        if not part:
            continue
        body, gap = "", False
        for power in (3, 2, 1, 0):
            digit = part // 10**power % 10
            if not digit:
                gap = True
                continue
            if gap and zero and (body or text):
                body += zero
            gap = False
            name = "" if digit == 1 and power and not zero else digits[digit]
            body += name + (units[power - 1] if power else "")
        if zero and text and not body.startswith(zero) and not groups[place + 1]:
            body = zero + body
        text += body + (big[place - 1] if place else "")
    return text


@given(st.integers(11, 10**12 - 1))
def test_kanji_are_read(value: int) -> None:
    japanese = kanji(value, "〇一二三四五六七八九", ("十", "百", "千"), ("万", "億"), "")
    chinese = kanji(value, "〇一二三四五六七八九", ("十", "百", "千"), ("万", "亿"), "零")
    assert answer_number(f"合計は{japanese}円です。", "ja") == value
    assert answer_number(f"答えは{japanese}です。", "ja") == value
    assert answer_number(f"总共{chinese}元。", "zh") == value
    assert answer_number(f"答案是{chinese}。", "zh") == value


@given(st.text("0123456789０９.,，-−$三十万分の之/ x'aA=\n#:：½一答えは", max_size=40), languages)
def test_any_text_can_be_read(text: str, language: Language) -> None:
    for reader in (answer_number, last_number):
        found = reader(text, language)
        assert found is None or found.is_finite()
    assert (last_number_sakana(text) is None) == (not any(char.isdigit() for char in text if char not in "½"))


def test_a_model_that_repeats_itself_is_read_too() -> None:
    for text in ("9" * 9000, "1,234" * 900, "三" * 2000, "9万" * 2000, "1/" * 2000, "- " * 2000, "答えは" * 999):
        for language in get_args(Language):
            found = answer_number(text, language)
            assert found is None or found.is_finite()
        assert last_number_sakana(text) is None or "9" in text or "1" in text
