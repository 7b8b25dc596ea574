"""Checks the content of a config.json as untrusted input, before any loader acts on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import InputError
from evomerge.printable import printable

_RUNS_CODE = re.compile(
    r"_*(auto_map|custom_pipelines|custom_generate|\w*_implementation\w*|use_kernels|kernel_config"
    r"|transformers_weights|trust_remote_code)"
)
"""Keys that make transformers load code or weights from elsewhere, with any number of leading underscores."""

_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations built into transformers; any other value may be looked up on the hub."""

_QUANTISED = {"quantization_config", "compression_config"}
_COUNTS_MODULES = re.compile(r"(layers?|blocks?|experts?|heads?)$")
_COUNTS = re.compile(r"(num|n)_")
_MAX_LABELS, _MAX_MODULES, _MAX_COUNTED = 100_000, 10_000, 10_000_000
_MAX_LISTED = 10_000  # values in one list; the longest lists of real models have a value per layer


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Reject settings that make transformers do more than build a plain model, and numbers that no model has.

    ``trust_remote_code=False`` alone is not sufficient (CVE-2026-4372 used ``_attn_implementation_internal``), so the
    keys are checked before any loader sees them.

    Raises:
        InputError: naming the key.
    """
    for key, value in _walk(config):
        if value is None:
            continue
        if key in _QUANTISED:
            problem = f"config.json: {key} says that the weights are quantised ({_quantisation(value)})"
            raise InputError(place, problem, "Use the full-precision model.")
        if _RUNS_CODE.fullmatch(key) and not _is_harmless(key, value):
            raise InputError(
                place,
                f"config.json: {printable(key, 100)} can make transformers run code from elsewhere",
                "Read what it names; if transformers knows the model without it, delete the key from a copy.",
            )
        if type(value) is int and value > _most(key):
            raise InputError(place, f"config.json: {printable(key, 100)} is {value}, which no model has")
    check_lists(config, "config.json", place)


def check_lists(content: Mapping[str, Any], file: str, place: str) -> None:
    """Reject lists that are longer than those of any model, because transformers iterates over some repeatedly.

    Args:
        content: the content of a configuration, checked at any depth.
        file: the name of its file.

    Raises:
        InputError: naming the key.
    """
    for key, value in _walk(content):
        if isinstance(value, list) and len(value) > _MAX_LISTED:
            problem = f"{file}: {printable(key, 100)} lists {len(value):,} values, which no model does"
            raise InputError(place, problem)


def _is_harmless(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return key.startswith("_") or not value  # transformers' own switches
    return "_implementation" in key and value in _BUILT_IN


def _most(key: str) -> float:
    """The maximum value of a key that makes loaders allocate that many objects before anything is checked."""
    if key == "num_labels":  # transformers creates a name for each
        return _MAX_LABELS
    if _COUNTS_MODULES.search(key):
        return _MAX_MODULES
    return _MAX_COUNTED if _COUNTS.match(key) else math.inf


def _quantisation(config: Any) -> str:
    if not isinstance(config, dict):
        return "unknown"
    fewer = next((f"{bits} bits" for bits in (4, 8) if config.get(f"load_in_{bits}bit")), None)
    bits = f"{config['bits']} bits" if type(config.get("bits")) is int else fewer
    # bitsandbytes came first, and early versions did not write its name
    method = config.get("quant_method") or ("bitsandbytes" if fewer else "unknown")
    return ", ".join(str(part) for part in (method, bits) if part)


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a configuration with its value, at any depth."""
    if isinstance(content, dict):
        yield from content.items()
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, dict | list):
            yield from _walk(value)


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message; with the next one if it ends in a colon, after which the cause is."""
    lines = str(error).strip().splitlines()
    last = next((number for number, line in enumerate(lines) if not line.rstrip().endswith(":")), len(lines) - 1)
    text = " ".join(line.strip() for line in lines[: last + 1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
