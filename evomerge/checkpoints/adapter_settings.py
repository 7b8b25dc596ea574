"""The settings in an adapter's adapter_config.json, checked before any tensor is looked at."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from evomerge.errors import InputError
from evomerge.printable import printable

CONFIG = "adapter_config.json"

FOLD = "Fold it with peft's `merge_and_unload` and name the folder that you save."
AGAIN = "Save it again with peft's `save_pretrained`."

_UNSUPPORTED = (
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
_PLAIN_STARTS = {"True", "False", "None", "gaussian", "eva", "orthogonal"}
"""Values of init_lora_weights that do not modify the base."""

STARTS = ("pissa", "olora")
"""Values that remove a part from the base, which can be computed from the base alone."""

_ALPHA = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Kinds that have a scale, with the name of its numerator."""

_WITHOUT_SCALE = ("IA3", "VERA", "OFT", "BOFT")

_MAX_SCALE = 1e9  # for alpha and rank
_MAX_PATTERNS = 10_000
_PATTERN_SECONDS = 2.0  # for one pattern on one module, and CPU time for all of them


@dataclass(frozen=True)
class AdapterSettings:
    """The configuration, as parsed JSON.

    Attributes:
        place: where the adapter was named, for error messages.
    """

    config: Mapping[str, Any]
    place: str
    deadline: float = field(default_factory=lambda: time.thread_time() + _PATTERN_SECONDS)

    @property
    def kind(self) -> str:
        """``peft_type``."""
        return str(self.config.get("peft_type"))

    def fault(self, problem: str, hint: str = FOLD) -> InputError:
        """An error about the configuration."""
        return InputError(self.place, f"{CONFIG}: {problem}", hint)

    def check(self) -> None:
        """Reject a configuration whose adapter cannot be folded into the weights.

        Raises:
            InputError: naming the key.
        """
        if self.kind not in _ALPHA and self.kind not in _WITHOUT_SCALE:
            known = ", ".join(sorted([*_ALPHA, *_WITHOUT_SCALE]))
            raise self.fault(f"peft_type is {self.config.get('peft_type')!r}; those that can be folded are {known}")
        for key in _UNSUPPORTED:
            if self.config.get(key):
                raise self.fault(f"{key} is not supported")
        if self.kind in _ALPHA:
            self._check_scale()
        if self.kind == "LORA":
            self._check_start()
        if self.kind == "BOFT" and self.config.get("boft_n_butterfly_factor", 1) != 1:
            raise self.fault("boft_n_butterfly_factor is above 1, which peft folds only on a GPU")
        if self.kind == "VERA" and self.config.get("save_projection") is False:
            problem = "save_projection is false, so that its shared matrices hang on the version of torch"
            raise self.fault(problem, "Save it again with `save_projection` true where it was trained.")

    def _check_start(self) -> None:
        start = str(self.config.get("init_lora_weights"))
        if start not in _PLAIN_STARTS and start not in STARTS:
            problem = f"init_lora_weights is {start!r}, so it was trained on a base that is not the model you name"
            hint = "Save it with peft's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it."
            raise self.fault(problem, hint)
        if start in STARTS and self.config.get("use_dora"):
            raise self.fault(f"init_lora_weights is {start!r} and use_dora is true, which peft does not fold alike")

    def _check_scale(self) -> None:
        for key in ("init_r" if self.kind == "ADALORA" else "r", _ALPHA[self.kind]):
            if not _positive(self.config.get(key)):
                wrong = printable(repr(self.config.get(key)), 100)
                raise self.fault(f"{key} is {wrong}; it must be a number above 0 and at most {_MAX_SCALE:g}", "")
        for key in ("use_dora", "use_rslora"):
            if not isinstance(self.config.get(key), bool | None):
                raise self.fault(f"{key} is {printable(repr(self.config[key]), 100)}; it must be true or false", "")
        for key in () if self.kind == "ADALORA" else ("rank_pattern", "alpha_pattern"):
            self._check_patterns(key)

    def _check_patterns(self, key: str) -> None:
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_positive(value) for value in patterns.values()):
            raise self.fault(f"{key} must give numbers by module", "")
        if len(patterns) > _MAX_PATTERNS:
            raise self.fault(f"{key} has {len(patterns):,} patterns, which no adapter needs")
        for pattern in patterns:
            try:
                re.compile(_in_full(pattern))
            except (re.error, RecursionError, OverflowError) as error:
                shown = printable(repr(pattern), 100)
                raise self.fault(f"{key} has a broken pattern {shown} ({error})") from None

    def scale(self, module: str, rank: int | None) -> float:
        """s for a module, or for a parameter by name.

        Args:
            rank: the rank of its tensors; None if they do not show it.

        Raises:
            InputError: the configuration gives a different rank.
        """
        if self.kind == "ADALORA":  # ranks were reduced during training, but not the scale
            return float(self.config["lora_alpha"] / (self.config["init_r"] + 1e-5))
        expected = self._of_pattern("rank_pattern", module, "r")
        if rank is not None and rank != expected:
            raise self.fault(f"the rank of {module} is {expected}, but its tensors have {rank}", "")
        alpha = self._of_pattern("alpha_pattern", module, _ALPHA[self.kind])
        return float(alpha / (math.sqrt(expected) if self.config.get("use_rslora") else expected))

    def _of_pattern(self, key: str, module: str, otherwise: str) -> Any:
        for pattern, value in (self.config.get(key) or {}).items():
            try:
                if _compiled(pattern).match(module, timeout=_PATTERN_SECONDS):
                    return value
                if time.thread_time() > self.deadline:
                    raise TimeoutError
            except (TimeoutError, regex.error, RecursionError):
                shown = printable(repr(pattern), 100)
                raise self.fault(f"{key} has the pattern {shown}, which takes too long to match") from None
        return self.config[otherwise]

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens whose rows of a module were trained separately.

        Raises:
            InputError: the configuration does not list them.
        """
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((ids for end, ids in given.items() if f".{module}".endswith(f".{end}")), None)
        if not isinstance(given, list) or not all(type(token) is int and token >= 0 for token in given):
            raise self.fault(f"trainable_token_indices gives no tokens of {module}", AGAIN)
        return tuple(given)


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _MAX_SCALE


@functools.lru_cache(_MAX_PATTERNS)
def _compiled(pattern: str) -> Any:
    return regex.compile(_in_full(pattern))


def _in_full(pattern: str) -> str:
    """Turn a PEFT pattern, which matches the ends of names, into one that matches whole names."""
    return rf"(.*\.)?({pattern})$"
