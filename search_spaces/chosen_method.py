"""The choice between several merge methods, and the numbers of each, as numbers of a genome.

The first number is the choice of the method. The numbers of every method follow, and finally those of the steps, which
all methods share. The numbers of methods that are not chosen have no effect, so many genomes represent one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from evomerge.genome import Parameter
from evomerge.method import Method, Point
from evomerge.recipes.stack import Blend
from search_spaces.method_genes import MethodGenes
from search_spaces.profiles import Wave


class ChosenMethodGenes:
    """What a search varies if the method itself is searched; has the interface of ``MethodGenes``.

    Args:
        of_methods: the genes of each method, all with the same steps.
    """

    def __init__(self, of_methods: Sequence[MethodGenes]) -> None:
        self._of_methods = tuple(of_methods)
        self._own = [
            [p.default for p in genes.parameters("", "")[: genes.own]] for genes in of_methods
        ]  # the defaults of each method's numbers

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods to choose from."""
        return tuple(method for genes in self._of_methods for method in genes.methods)

    def __len__(self) -> int:
        first = self._of_methods[0]
        return 1 + sum(map(len, self._own)) + len(first) - first.own

    @property
    def curves(self) -> list[tuple[int, int, Wave]]:
        """As ``MethodGenes.curves``, for all methods."""
        begins = accumulate(map(len, self._own), initial=1)
        return [
            (begin + weight, begin + place, wave)
            for begin, genes in zip(begins, self._of_methods, strict=False)
            for weight, place, wave in genes.curves
        ]

    def parameters(self, prefix: str, group: str) -> list[Parameter]:
        """The parameters of one blend, named after ``prefix``; those of a method also after the method."""
        names = tuple(method.name for method in self.methods)
        parameters = [Parameter(f"{prefix}.method", 0.0, len(names) - 1.0, 0.0, "choice", group, names)]
        for name, genes in zip(names, self._of_methods, strict=True):
            parameters += genes.parameters(f"{prefix}.{name}", group)[: genes.own]
        return [*parameters, *self._of_methods[0].parameters(prefix, group)[self._of_methods[0].own :]]

    def blend(self, numbers: Sequence[float] = (), depth: float | None = None) -> Blend:
        """The blend that these numbers stand for at a depth; without numbers, the first method's defaults."""
        chosen = int(numbers[0]) if numbers else 0
        begin = 1 + sum(map(len, self._own[:chosen]))
        own = numbers[begin : begin + len(self._own[chosen])]
        return self._of_methods[chosen].blend([*own, *numbers[1 + sum(map(len, self._own)) :]], depth)

    def numbers_at(self, point_of: Callable[[Method], Point | None]) -> list[float] | None:
        """The numbers of a point, from the first method that has it; None if none has."""
        for chosen, genes in enumerate(self._of_methods):
            if (numbers := genes.numbers_at(point_of)) is not None:
                return self._with(chosen, numbers[: genes.own], numbers[genes.own :])
        return None

    def nearest(self, blend: Blend, factor: float = 1.0) -> list[float] | None:
        """The numbers closest to a blend, with its own method if available, else the first that can express it."""
        names = [method.name for method in self.methods]
        order = sorted(range(len(names)), key=lambda at: names[at] != blend.method)
        for chosen in order:
            genes = self._of_methods[chosen]
            if (numbers := genes.nearest(blend, factor)) is not None:
                return self._with(chosen, numbers[: genes.own], numbers[genes.own :])
        return None

    def defaults(self) -> list[tuple[Method, list[float]]]:
        """Each method with its default numbers."""
        first = self._of_methods[0]
        of_steps = [p.default for p in first.parameters("", "")[first.own :]]
        return [(method, self._with(k, self._own[k], of_steps)) for k, method in enumerate(self.methods)]

    def _with(self, chosen: int, own: Sequence[float], of_steps: Sequence[float]) -> list[float]:
        """The numbers that choose a method and set its numbers, with all other methods at their defaults."""
        of_methods = [own if number == chosen else defaults for number, defaults in enumerate(self._own)]
        return [float(chosen), *(value for numbers in of_methods for value in numbers), *of_steps]
