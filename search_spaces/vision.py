"""The vision parts of two or more vision-language sources: one number mixes them or chooses between them.

Tower and projector were trained for each other, so they stay together. By default they come unchanged from the source
that provides the tokenizer, as in the original work (Akiba et al., arXiv 2403.13187, section 3.3).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.recipes.stack import Blend

_NAME = "vision"


class VisionSettings(BaseModel):
    """``space.vision`` of a search file; exactly one of the two is given.

    Args:
        mix: two sources: the number is the share of the second, from 0 to 1.
        choose: two or more sources, of which one is chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mix: tuple[str, str] | None = None
    choose: Annotated[tuple[str, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> VisionSettings:
        if (self.mix is None) == (self.choose is None):
            raise ValueError("takes one of `mix: [A, B]` and `choose: [A, B, ...]`")
        if len({*self.sources}) < len(self.sources):
            raise ValueError("names a source twice")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that it is made from."""
        return self.mix or self.choose or ()

    def check(self, sources: Collection[str], tokenizer: str) -> None:
        """Reject unknown sources, or a list without the one whose settings the merged model has. InputError."""
        if unknown := [name for name in self.sources if name not in sources]:
            raise InputError("space.vision", f"names {unknown[0]}, which is not a source")
        if tokenizer not in self.sources:
            problem = f"leaves out {tokenizer}, whose configuration says how images are read"
            raise InputError("space.vision", problem, "Name it too, or another one by `tokenizer: NAME`.")

    def parameter(self, tokenizer: str) -> Parameter:
        """The parameter; its default stands for the tokenizer's source."""
        default = self.number_of(tokenizer)
        if self.mix is not None:
            return Parameter(_NAME, 0.0, 1.0, default, group=_NAME)
        return Parameter(_NAME, 0.0, len(self.sources) - 1.0, default, "choice", _NAME, choices=self.sources)

    def number_of(self, source: str) -> float:
        """The number that stands for a single source."""
        return float(self.sources.index(source))

    def nearest(self, blend: Blend | None, tokenizer: str) -> float:
        """The number closest to a blend; that of the tokenizer's source if the blend uses none of these sources."""
        if self.mix is not None and blend is not None and len({*self.mix} & {*blend.sources}) == 2:
            return min(1.0, max(0.0, blend.value("weight", self.mix[1])))
        named = [source for source in (blend.sources if blend is not None else ()) if source in self.sources]
        return self.number_of(named[0] if named else tokenizer)

    def blend(self, number: float) -> Blend:
        """The blend for a number."""
        if self.mix is None or number in (0.0, 1.0):
            return Blend.copy_of(self.sources[int(number)])
        return Blend.weighted_sum({self.mix[0]: 1.0 - number, self.mix[1]: number})
