"""Item response: what the scores of known models on every item say of a new one that was scored on a few.

Merges of the same sources find the same items hard. A logistic model of two parameters an item (2PL: Birnbaum, 1968) is
fitted to the models that were scored on every item, and a candidate's one number, its ability, to the few items that
it was scored on. That is the idea of tinyBenchmarks (Maia Polo et al., arXiv:2402.14992) and MERGE3 (Mencattini et al.,
arXiv:2502.10436). MERGE3 takes a merge's ability for a linear combination of its sources'. With one dimension every
number is one, so what is left of that here is the prior: a candidate is about as able as the models that are known.

Their estimator, ``p_irt``, is as wrong as the model is. Here the model's predictions go into the difference estimator
of ``racing.py``, which is nearly unbiased whatever they are, and exact when every item is scored; a good model makes
what it misses, and so the error, small. ``held_out_error`` says whether it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from evomerge.optimizers.base import one_thread
from evomerge.search.estimation.items import ItemOrder
from evomerge.search.estimation.racing import difference_estimate

Matrix = NDArray[np.float64]
Items = NDArray[np.int64]

# Standard deviations of the normal priors, in logits. They hold the slopes of a few models near 1, which is the Rasch
# model of one parameter an item, and let many models show slopes of their own; and they keep the difficulty of items
# that all models solve, or none, finite.
ABILITY_SPREAD = 1.0
EASINESS_SPREAD = 2.0
SLOPE_SPREAD = 0.5

MIN_SPREAD = 0.1
"""Of a new candidate's ability about the known ones, in logits: a merge may be better than all that went into it."""

FOLDS = 10
"""Models are left out one by one up to this many, and beyond in this many groups: each needs a fit of its own."""

NEWTON_STEPS = 30
LONGEST_STEP = 1.0
"""Of Newton's method in the ability, in logits; a step of the full length overshoots where all scores are equal."""


@dataclass(frozen=True)
class ItemModel:
    """How probable a right answer is: special.expit(easiness + slope * ability), for each item.

    Attributes:
        easiness: float64 [n_items].
        slope: float64 [n_items].
        abilities: float64 [models], of those that it was fitted to.
        low: the least score that they have; the model's 0.
        width: from there to the greatest; the model's 1.
    """

    easiness: Matrix
    slope: Matrix
    abilities: Matrix
    low: float
    width: float

    def ability(self, items: Items, scores: Matrix) -> float:
        """The most probable ability of a candidate with these scores [k] on these items [k].

        Its prior has the mean and the spread of the known abilities. Scores outside the range that the known models
        have are taken for its ends.
        """
        y = np.clip((scores - self.low) / self.width, 0.0, 1.0)
        slope, easiness = self.slope[items], self.easiness[items]
        mean, spread = float(self.abilities.mean()), max(float(self.abilities.std()), MIN_SPREAD)
        ability = mean
        for _ in range(NEWTON_STEPS):  # the log posterior is concave
            p = special.expit(easiness + slope * ability)
            gradient = (slope * (y - p)).sum() - (ability - mean) / spread**2
            curvature = (slope**2 * p * (1 - p)).sum() + 1 / spread**2
            ability += float(np.clip(gradient / curvature, -LONGEST_STEP, LONGEST_STEP))
        return ability

    def predict(self, items: Items, scores: Matrix) -> Matrix:
        """The expected score on every item, float64 [n_items], of a candidate with these scores on these items."""
        p: Matrix = special.expit(self.easiness + self.slope * self.ability(items, scores))
        return self.low + self.width * p


def fit(responses: Matrix) -> ItemModel:
    """Fit items and abilities together, at the maximum of the posterior.

    Args:
        responses: float64 [models, items], the scores of models on every item. Of any bounded metric: the least score
            seen becomes 0 and the greatest 1, and a score between them counts as that share of a right answer (Papke &
            Wooldridge, Econometric Methods for Fractional Response Variables, 1996). A metric without bounds, such as
            a log-likelihood, gives a model that predicts badly, and ``held_out_error`` shows it.

    Raises:
        ValueError: there are no models or no items, or a score is not finite.
    """
    if responses.ndim != 2 or not responses.size or not np.all(np.isfinite(responses)):
        raise ValueError("responses must be finite, of shape [models, items]")
    low, width = float(responses.min()), float(np.ptp(responses)) or 1.0
    y = (responses - low) / width
    models, n = y.shape
    centre = float(special.logit((y.sum() + 0.5) / (y.size + 1)))
    ability = special.logit((y.sum(axis=1) + 0.5) / (n + 1)) - centre
    easiness = special.logit((y.sum(axis=0) + 0.5) / (models + 1))

    def loss(flat: Matrix) -> tuple[float, Matrix]:
        return _loss(y, flat, centre)

    with one_thread():
        optimum = optimize.minimize(loss, np.concatenate([ability, easiness, np.ones(n)]), jac=True, method="L-BFGS-B")
    ability, easiness, slope = np.split(optimum.x, [models, models + n])
    return ItemModel(easiness, slope, ability, low, width)


def _loss(y: Matrix, flat: Matrix, centre: float) -> tuple[float, Matrix]:
    """Minus the log posterior of y [models, items] at abilities, easiness and slopes in a row, and its gradient."""
    models, n = y.shape
    ability, easiness, slope = np.split(flat, [models, models + n])
    logits = easiness + ability[:, None] * slope
    p = special.expit(logits)
    priors = ((ability, 0.0, ABILITY_SPREAD), (easiness, centre, EASINESS_SPREAD), (slope, 1.0, SLOPE_SPREAD))
    value = float((np.logaddexp(0.0, logits) - y * logits).sum())
    value += sum(float(((x - mean) ** 2).sum()) / (2 * spread**2) for x, mean, spread in priors)
    error = p - y
    likelihood = (error @ slope, error.sum(axis=0), ability @ error)
    return value, np.concatenate(
        [g + (x - mean) / spread**2 for g, (x, mean, spread) in zip(likelihood, priors, strict=True)]
    )


def p_irt(model: ItemModel, items: Items, scores: Matrix) -> float:
    """The mean of the scores, where there are scores, and of the predictions elsewhere (arXiv:2402.14992, p-IRT)."""
    full = model.predict(items, scores)
    full[items] = scores
    return float(full.mean())


@dataclass(frozen=True)
class HeldOutError:
    """Mean absolute errors of estimates of the full mean, over models that the item model has not seen.

    Attributes:
        reference: of the difference estimator with one known model's scores as the prediction.
        item_response: of the same with the item model's. Use item response where this is the less.
        p_irt: of ``p_irt``.
    """

    reference: float
    item_response: float
    p_irt: float


def held_out_error(responses: Matrix, subsets: Sequence[Items], order: ItemOrder, reference: Matrix) -> HeldOutError:
    """Cross validation over models: each is estimated from each subset by a fit to the others.

    Args:
        responses: float64 [models, items], two models or more.
        subsets: items [k] to estimate from, as the search would draw them.
        order: says which stratum each item is in.
        reference: float64 [items], the scores of the known model.

    Raises:
        ValueError: there are fewer than two models, or no subsets.
    """
    models, count = responses.shape
    if models < 2 or not subsets:
        raise ValueError("cross validation needs two models and a subset")
    group = np.arange(models) % min(models, FOLDS)
    errors = []
    for fold in range(group.max() + 1):
        model = fit(responses[group != fold])
        for row in responses[group == fold]:
            for items in subsets:
                sample, scores = order.sample(items.astype(np.int32), count), row[items]
                estimates = (
                    difference_estimate(scores, items, reference, sample).mean,
                    difference_estimate(scores, items, model.predict(items, scores), sample).mean,
                    p_irt(model, items, scores),
                )
                errors.append(np.abs(np.array(estimates) - row.mean()))
    by_reference, by_model, by_p_irt = np.mean(errors, axis=0)
    return HeldOutError(float(by_reference), float(by_model), float(by_p_irt))
