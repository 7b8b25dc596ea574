"""What mergekit lets one say of each merge method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grammar:
    """What mergekit lets one say of a method. Defaults are mergekit's; None where a value must be given.

    ``rescale`` is the only value that our equation has. ``task_vectors`` says that the base is no source.
    """

    per_source: Mapping[str, float | None] = field(default_factory=dict)
    shared: Mapping[str, float | None] = field(default_factory=dict)
    normalize: bool | None = None
    rescale: bool | None = None
    task_vectors: bool = False

    @property
    def parameters(self) -> list[str]:
        names = [*self.per_source, *self.shared]
        names += ["normalize"] if self.normalize is not None else []
        names += ["lambda"] if self.task_vectors else []
        # int8_mask chooses how mergekit stores signs, and changes no result.
        return names + (["rescale", "int8_mask"] if self.rescale is not None else [])


_WEIGHT: dict[str, float | None] = {"weight": None}
_WEIGHT_DENSITY: dict[str, float | None] = {"weight": None, "density": 1.0}
GRAMMARS = {
    "linear": Grammar(_WEIGHT, normalize=True),
    "task_arithmetic": Grammar(_WEIGHT, normalize=False, task_vectors=True),
    "ties": Grammar(_WEIGHT_DENSITY, normalize=True, rescale=False, task_vectors=True),
    "dare_linear": Grammar(_WEIGHT_DENSITY, normalize=False, rescale=True, task_vectors=True),
    "dare_ties": Grammar(_WEIGHT_DENSITY, normalize=False, rescale=True, task_vectors=True),
    "slerp": Grammar(shared={"t": None}),
}
