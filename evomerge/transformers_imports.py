"""What transformers imports and nobody here uses is left out.

``transformers.generation`` imports scikit-learn where that is installed, as it is with lm-eval: for how sure an
assistant model is of its drafts. With scipy and pandas behind it that takes a second and 100 MB of every process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_ASKS = "transformers.generation.candidate_generator"


class _WithoutSklearn(SourceFileLoader):
    """Runs a module of transformers that sees no scikit-learn; all others go on seeing it."""

    def exec_module(self, module: ModuleType) -> None:
        utils: Any = importlib.import_module("transformers.utils")
        known = utils.is_sklearn_available
        utils.is_sklearn_available = lambda: False
        try:
            super().exec_module(module)
        finally:
            utils.is_sklearn_available = known


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ASKS or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        if spec.origin is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _WithoutSklearn(fullname, spec.origin)
        return spec


def leave_out_sklearn() -> None:
    """Have transformers not import scikit-learn, if it has not done so already."""
    sys.meta_path.insert(0, _Finder())
