"""Parameters shared by several methods, and the points at which weights make a merge a single source or the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evomerge.method import FRACTION, MethodParameter, Point, Value


def weight(default: float, high: float = 1.5) -> MethodParameter:
    """1.5 leaves room above the optimum of the original work, whose weights sum to about two over three sources."""
    return MethodParameter("weight", "source", low=0.0, high=high, default=default, share=True)


def density(default: float) -> MethodParameter:
    return MethodParameter("density", "source", low=0.1, high=1.0, default=default, limits=FRACTION)


def scale(*, searched: bool = False) -> MethodParameter:
    """The lambda of the papers: a factor on the whole sum of task vectors.

    If weights are not normalised, lambda only multiplies them, and a search over both would visit the same models many
    times. A search therefore leaves it at 1 unless the method has no weights.
    """
    return MethodParameter("lambda", "blend", low=0.0, high=2.0, default=1.0, searched=searched)


def one_weight(others: Mapping[str, Value] | None = None) -> Callable[[Sequence[str], str | None], Point]:
    """``Method.alone`` with weight 1 for the source and 0 for all others; the other parameters are ``others``."""

    def alone(sources: Sequence[str], source: str | None) -> Point:
        return {"weight": {name: float(name == source) for name in sources}, **(others or {})}

    return alone


def equal_weights(others: Mapping[str, Value] | None = None) -> Callable[[Sequence[str]], Point]:
    """``Method.uniform`` with equal weights that sum to 1; the other parameters are ``others``."""

    def uniform(sources: Sequence[str]) -> Point:
        return {"weight": dict.fromkeys(sources, 1.0 / len(sources)), **(others or {})}

    return uniform


def same_weights(others: Mapping[str, Value] | None = None) -> Callable[[Sequence[str], float], Point]:
    """``Method.arithmetic`` with the same weight for all sources; the other parameters are ``others``."""

    def arithmetic(sources: Sequence[str], weight: float) -> Point:
        return {"weight": dict.fromkeys(sources, weight), **(others or {})}

    return arithmetic
