"""What an inspection of models finds, as data."""

from __future__ import annotations

from pydantic import BaseModel


class ModelFacts(BaseModel):
    """Facts about one model. ``tokens`` is None if its tokenizer cannot be loaded. ``prompt`` describes the soft prompt
    or prefix that was named with it, if any. ``seeing`` is the number of parameters outside the text model that read
    images; None for a text-only model.
    """

    name: str
    reference: str
    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    bytes: int
    dtype: str
    vocab_size: int
    tokens: int | None
    tied: bool
    adapters: list[str]
    warnings: list[str]
    prompt: str | None = None
    seeing: int | None = None


class Distance(BaseModel):
    """The distance of a source from the base: overall, or in one part of the model.

    ``relative_norm`` is |d| / |b| (None if b is zero), ``mean_change`` the mean of |d| over all elements, and
    ``changed`` the share of elements that differ. ``rounded_away`` is the share of |d| that is lost if a merge is
    stored in the base's dtype (None if d is zero); see ``rounding``. ``effective_rank`` says over how many directions
    the changes of matrices spread (None if d is zero, or if it would take too long); see ``directions``.
    """

    relative_norm: float | None
    mean_change: float
    changed: float
    rounded_away: float | None = None
    effective_rank: float | None = None


class Closeness(BaseModel):
    """How two task vectors relate: overall, or in one part of the model.

    ``cosine`` is None if one is zero. ``sign_agreement`` is the share of equal signs among the elements that both
    changed, None if there are none. ``overlap`` says how far their matrices change the same directions, with 0 for
    chance (None if unknown); see ``directions``.
    """

    cosine: float | None
    sign_agreement: float | None
    overlap: float | None = None


class SourceDistance(BaseModel):
    """A source compared with the base; ``parts`` are in the order of ``Inspection.parts``."""

    name: str
    whole: Distance
    parts: list[Distance]


class Pair(BaseModel):
    """Two sources compared with each other; ``parts`` are in the order of ``Inspection.parts``."""

    a: str
    b: str
    whole: Closeness
    parts: list[Closeness]


class Advice(BaseModel):
    """Advice from published evidence about merging such sources, with its reference."""

    text: str
    source: str


class Inspection(BaseModel):
    """Several models compared; a single model only has ``models``.

    ``apart`` says why models cannot be compared with the base; ``left_out`` names tensors that not all others have in
    the same shape. ``dispersion`` is the largest of the sources' relative norms divided by the smallest.
    """

    models: list[ModelFacts]
    base: str | None = None
    parts: list[str] = []
    sources: list[SourceDistance] = []
    pairs: list[Pair] = []
    apart: dict[str, str] = {}
    left_out: list[str] = []
    warnings: list[str] = []
    dispersion: float | None = None
    advice: list[Advice] = []
