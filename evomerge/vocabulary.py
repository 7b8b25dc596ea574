"""The vocabulary of merged models as described by a recipe or a search file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ZeroRow(_Frozen):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenRow(_Frozen):
    """The row of another token in a source: a token of its vocabulary, or a row by index."""

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _names_one_row(self) -> TokenRow:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("needs either token or token_id")
        return self


class TokenRule(_Frozen):
    """Where sources that lack a token take its row from: a source's own row for it, or another row.

    With ``force``, all sources take it from there.
    """

    source: str | ZeroRow | TokenRow
    force: bool = False

    @property
    def donor(self) -> str | None:
        """The source that provides the row."""
        if isinstance(self.source, str):
            return self.source
        return self.source.model if isinstance(self.source, TokenRow) else None


class Vocabulary(_Frozen):
    """The tokens of the merged model, and its chat template.

    ``kind`` "same": all sources must have the same tokens with the same ids. "tokenizer": the merged model has those of
    the tokenizer's source. "union": those, followed by additional tokens of the other sources. "transplant": those of
    the tokenizer's source, where each other source computes the rows that it lacks from its own rows, in the same way
    as the row in the tokenizer's source is a sum of others (``checkpoints/transplant.py``).

    ``base`` is the source whose row the others use for a token that they lack; if it is None or lacks the token as
    well, they use the mean of the existing rows.

    ``tokens`` are rules for single tokens; unknown ones are added to the vocabulary, in the order of their texts.
    ``pad_to_multiple_of`` rounds the number of rows up. ``chat_template`` is a template's text, a name such as chatml,
    or "auto": the one that most sources have.
    """

    kind: Literal["same", "tokenizer", "union", "transplant"] = "same"
    base: str | None = None
    tokens: dict[str, TokenRule] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    chat_template: str | None = None

    @property
    def aligns(self) -> bool:
        """Whether the rows of the embedding are rearranged."""
        return self.kind != "same" or bool(self.tokens) or self.pad_to_multiple_of is not None

    @model_validator(mode="after")
    def _transplants_alone(self) -> Vocabulary:
        if self.kind == "transplant" and (self.tokens or self.base or self.pad_to_multiple_of or self.chat_template):
            raise ValueError("transplant takes the tokenizer's source as it is: no tokens, base, padding or template")
        return self

    def used_sources(self) -> set[str]:
        """Names of the sources that provide rows."""
        donors = (self.base, *(rule.donor for rule in self.tokens.values()))
        return {name for name in donors if name is not None}
