"""Column types of the store: JSON with infinities, arrays, compressed text, and plain values with a checked type,
because SQLite returns a value in whatever type was written.

A value of a wrong type was not written by this program and raises ``DamagedValueError``.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Double, Integer, LargeBinary, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON, as part of a pair or alone
_FLOAT = "$float"  # {"$float": "inf"} encodes a float that JSON cannot represent; we use this key for nothing else


class DamagedValueError(ValueError):
    """A value in the database was not written by this program."""


class Json(TypeDecorator[Any]):
    """JSON text. Floats are exact, and inf, -inf and nan are allowed; tuples come back as lists.

    Args:
        whole: the required type of the value, dict or list.
        parts: the required type of the values in it.
    """

    impl = Text
    cache_ok = True

    def __init__(self, whole: type = object, parts: type | tuple[type, ...] = object) -> None:
        super().__init__()
        self.whole = whole
        self.parts = parts

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if value is None:
            return None
        try:
            return _dump(value)
        except ValueError:  # a float that JSON cannot represent: rare, so the value is walked only then
            return _dump(_spell(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        with decoding("JSON"):
            content = parse_json(value)
            if not isinstance(content, self.whole) or not self._has_its_parts(content):
                raise ValueError(f"it is no {self.whole.__name__} of its kind")
        return content

    def _has_its_parts(self, content: Any) -> bool:
        if self.parts is object:
            return True
        parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        return all(isinstance(part, self.parts) for part in parts)


class Array(TypeDecorator[NDArray[Any]]):
    """A flat array of one dtype, stored as bytes. It comes back read-only; the reader must know its shape."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype

    def process_bind_param(self, value: NDArray[Any] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else np.asarray(value, dtype=self.dtype).tobytes()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> NDArray[Any] | None:
        with decoding("an array"):
            return None if value is None else np.frombuffer(value, dtype=self.dtype)


class PackedText(TypeDecorator[str]):
    """Text compressed with zlib: a recipe of 20 KB takes about 3 KB."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        return None if value is None else zlib.compress(value.encode())

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        with decoding("packed text"):
            return None if value is None else zlib.decompress(value).decode()


class _Plain(TypeDecorator[Any]):
    """A value of one of the types in ``kinds``, or None."""

    impl: Any = Text
    cache_ok = True
    kinds: tuple[type, ...] = ()

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        kinds, what = self.kinds, str(self.__doc__)

        def checked(value: Any) -> Any:
            if value is None or value.__class__ in kinds:
                return value
            raise DamagedValueError(f"what should be {what} is something else")

        return checked


class WholeNumber(_Plain):
    """a whole number"""

    impl = Integer
    cache_ok = True
    kinds = (int,)


class Real(_Plain):
    """a number"""

    impl = Double
    cache_ok = True
    kinds = (float, int)


class PlainText(_Plain):
    """a text"""

    impl = String
    cache_ok = True
    kinds = (str,)


def parse_json(text: str) -> Any:
    """Parse JSON text, including the floats that JSON cannot represent.

    A lone surrogate, which JSON can contain but no file or page can, comes back escaped: ``\\ud800``.
    """
    value = _DECODER.decode(text)
    return _without_surrogates(value) if _ESCAPED_SURROGATE.search(text) else value


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(inner) for key, inner in value.items()}
    return [_without_surrogates(inner) for inner in value] if isinstance(value, list) else value


def decoding(what: str) -> _Decoding:
    """A context in which a value is decoded; errors say what the value should be.

    Raises:
        DamagedValueError: in place of any exception raised inside.
    """
    return _Decoding(what)


class _Decoding:
    """A class, because a page reads thousands of values, and a generator would take as long as the decoding."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ValueError | TypeError | RecursionError | zlib.error):
            raise DamagedValueError(f"a value that should be {self._what} cannot be read") from error


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):  # the mean of float32 scores is a numpy float32, which json does not accept
        return _spell(value.item())
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def _spell(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    return value


def _read_float(value: dict[str, Any]) -> Any:
    return float(value[_FLOAT]) if value.keys() == {_FLOAT} else value


_DECODER = json.JSONDecoder(object_hook=_read_float)  # created once, because a page reads thousands of small texts
