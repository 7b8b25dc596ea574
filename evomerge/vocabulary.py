"""What a recipe or a search file says of the vocabulary of merged models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ZeroRow(_Frozen):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenRow(_Frozen):
    """The row that another token has in a source: a token of its vocabulary, or a row by number."""

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
    """Where the sources that lack a token take its row from: a source's own row for it, or another row.

    With ``force`` every source takes it from there.
    """

    source: str | ZeroRow | TokenRow
    force: bool = False

    @property
    def donor(self) -> str | None:
        """The source that gives the row."""
        if isinstance(self.source, str):
            return self.source
        return self.source.model if isinstance(self.source, TokenRow) else None


class Vocabulary(_Frozen):
    """Which tokens the merged model knows, and the template of its chats.

    ``kind`` "same": all sources must know the same tokens under the same numbers. "tokenizer": the merged model knows
    those of the tokenizer's source. "union": those, and behind them what the other sources know beside.
    "transplant": those of the tokenizer's source, and each other source makes rows for what it lacks out of its own, as
    the tokenizer's source's row is a sum of others (``checkpoints/transplant.py``).

    ``base`` is the source whose row the others take for a token that they lack; where it is None or lacks the token as
    well, they take the mean of the rows that there are.

    ``tokens`` are rules for single tokens; one that is not in the vocabulary is added to it, in the order of the texts.
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
        """The rows of the embedding are laid out anew."""
        return self.kind != "same" or bool(self.tokens) or self.pad_to_multiple_of is not None

    @model_validator(mode="after")
    def _transplants_alone(self) -> Vocabulary:
        if self.kind == "transplant" and (self.tokens or self.base or self.pad_to_multiple_of or self.chat_template):
            raise ValueError("transplant takes the tokenizer's source as it is: no tokens, base, padding or template")
        return self

    def used_sources(self) -> set[str]:
        """Names of the sources that give rows."""
        donors = (self.base, *(rule.donor for rule in self.tokens.values()))
        return {name for name in donors if name is not None}
