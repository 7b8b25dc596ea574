"""What stands in a config.json, checked as the work of a stranger before any loader acts on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import InputError

_RUNS_CODE = {
    "auto_map", "custom_pipelines", "attn_implementation", "experts_implementation", "use_kernels", "kernel_config",
    "transformers_weights", "trust_remote_code",
}  # fmt: skip
_QUANTISED = {"quantization_config", "compression_config"}
_HARMLESS_PRIVATE = {"_name_or_path", "_commit_hash"}
_COUNTS_MODULES = re.compile(r"(layers?|blocks?|experts?|heads?)$")


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse what transformers would act on beyond a model's plain shape, and numbers no model has.

    ``trust_remote_code=False`` is no boundary by itself (CVE-2026-4372 went through
    ``_attn_implementation_internal``), so the keys are checked before any loader sees them.

    Raises:
        InputError: naming the key.
    """
    for key, value in _walk(config):
        if value is None:
            continue
        if key in _QUANTISED:
            problem = f"config.json: {key} says that the weights are quantised ({_quantisation(value)})"
            raise InputError(place, problem, "Use the full-precision model.")
        private = key.startswith("_") and key not in _HARMLESS_PRIVATE and not isinstance(value, bool | int | float)
        if key in _RUNS_CODE or private:
            raise InputError(
                place,
                f"config.json: {key} can make transformers run code from elsewhere",
                "Read what it names; if transformers knows the model without it, delete the key from a copy.",
            )
        if _COUNTS_MODULES.search(key) and type(value) is int and not 0 <= value <= 10_000:
            raise InputError(place, f"config.json: {key} is {value}, which no model has")


def _quantisation(config: Any) -> str:
    if not isinstance(config, dict):
        return "unknown"
    fewer = next((f"{bits} bits" for bits in (4, 8) if config.get(f"load_in_{bits}bit")), None)
    bits = f"{config['bits']} bits" if type(config.get("bits")) is int else fewer
    # bitsandbytes came first and did not say its name at first
    method = config.get("quant_method") or ("bitsandbytes" if fewer else "unknown")
    return ", ".join(str(part) for part in (method, bits) if part)


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value)


def first_line(error: BaseException) -> str:
    """An error in one line, for a message that a person reads."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
