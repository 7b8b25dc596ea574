"""Prevents transformers from importing packages that are not needed here.

``transformers.generation`` imports scikit-learn if it is installed, as it is with lm-eval, for the confidence of
assistant models. Together with scipy and pandas this costs every process a second and 100 MB. The losses of object
detection models, which are imported with every model, import ``scipy.optimize``: 0.4 seconds.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_FINDING = ("for_object_detection", "deformable_detr", "grounding_dino", "lw_detr", "rf_detr", "rt_detr")
_ASKS = {
    "transformers.generation.candidate_generator": "is_sklearn_available",
    **{f"transformers.loss.loss_{name}": "is_scipy_available" for name in _FINDING},
}
"""The functions of ``transformers.utils`` that modules call before they import a package."""


class _WithoutIt(SourceFileLoader):
    """Runs a module of transformers for which these packages seem unavailable; other modules still see them."""

    def exec_module(self, module: ModuleType) -> None:
        utils: Any = importlib.import_module("transformers.utils")
        question = _ASKS[module.__name__]
        known = getattr(utils, question)
        setattr(utils, question, lambda: False)
        try:
            super().exec_module(module)
        finally:
            setattr(utils, question, known)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ASKS or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        if spec.origin is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _WithoutIt(fullname, spec.origin)
        return spec


def leave_out_unused() -> None:
    """Prevent these imports by transformers, unless they have already happened."""
    sys.meta_path.insert(0, _Finder())
