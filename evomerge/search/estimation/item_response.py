"""Item response theory: predicts the scores of a candidate on all items from its scores on a few.

Merges of the same sources find the same items hard. A logistic model with two parameters per item (2PL: Birnbaum, 1968)
is fitted to the models that were scored on every item; then the only parameter of a candidate, its ability, is fitted
to the few items that it was scored on. This is the idea of tinyBenchmarks (Maia Polo et al., arXiv:2402.14992) and
MERGE3 (Mencattini et al., arXiv:2502.10436). MERGE3 assumes that a merge's ability is a linear combination of those of
its sources. With a single dimension, any ability is such a combination, so only a prior is left of that here: a
candidate is about as able as the known models.

Their estimator, ``p_irt``, has all errors of the model. Here, the model's predictions enter the difference estimator of
``racing.py``, which is nearly unbiased whatever they are, and exact when every item is scored; the better they are, the
smaller its standard error. ``held_out_error`` measures whether they help.
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

# Standard deviations of the normal priors, in logits. With few models they keep slopes near 1, which is the Rasch model
# with one parameter per item; with many models slopes are free to differ. They also keep the difficulty of items finite
# that all models solve, or none.
ABILITY_SPREAD = 1.0
EASINESS_SPREAD = 2.0
SLOPE_SPREAD = 0.5

MIN_SPREAD = 0.1
"""Smallest spread of a candidate's prior ability, in logits, because a merge may be better than all of its sources."""

FOLDS = 10
"""Groups of models that are left out in turn: with up to this many models, one by one. Each group needs its own fit."""

NEWTON_STEPS = 30
LONGEST_STEP = 1.0
"""Limit for steps of Newton's method in the ability, in logits: full steps overshoot if all scores are equal."""


@dataclass(frozen=True)
class ItemModel:
    """The probability of a right answer to each item: special.expit(easiness + slope * ability).

    Attributes:
        easiness: float64 [n_items], in logits.
        slope: float64 [n_items].
        abilities: float64 [models], those of the models that it was fitted to, in logits.
        low: the lowest score of these models, which counts as probability 0.
        width: the highest score, which counts as probability 1, minus the lowest.
    """

    easiness: Matrix
    slope: Matrix
    abilities: Matrix
    low: float
    width: float

    def ability(self, items: Items, scores: Matrix) -> float:
        """The most probable ability of a candidate, in logits.

        Its prior has the mean and the standard deviation of the known abilities. Scores outside the range of the known
        models are clipped to it.

        Args:
            items: int64 [k], indices of scored items.
            scores: float64 [k], the candidate's scores on them.
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
        """The expected score of a candidate on every item: float64 [n_items]. Arguments are as for ``ability``."""
        p: Matrix = special.expit(self.easiness + self.slope * self.ability(items, scores))
        return self.low + self.width * p


def fit(responses: Matrix) -> ItemModel:
    """Fit the parameters of items and the abilities of models together, at the maximum of the posterior.

    Args:
        responses: float64 [models, items], the scores of models on every item, in any bounded metric. The lowest score
            becomes 0 and the highest 1, and a score between them counts as that share of a right answer (Papke &
            Wooldridge, Econometric Methods for Fractional Response Variables, 1996). A metric without bounds, such as
            a log-likelihood, gives a model that predicts badly, which ``held_out_error`` shows.

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
    """The negative log posterior of y [models, items], and its gradient.

    ``flat`` is float64 [models + 2 items]: abilities, easiness, slopes. ``centre`` is the prior mean of the easiness.
    """
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
    """The p-IRT estimate of arXiv:2402.14992: the mean over all items of known scores, and of predictions elsewhere.

    Args:
        items: int64 [k], indices of scored items.
        scores: float64 [k], the candidate's scores on them.
    """
    full = model.predict(items, scores)
    full[items] = scores
    return float(full.mean())


@dataclass(frozen=True)
class HeldOutError:
    """Mean absolute errors of estimates of the mean over all items, for models that the item model was not fitted to.

    Attributes:
        reference: of the difference estimator, with one known model's scores as the prediction.
        item_response: of the same estimator, with the item model's predictions; use these if this error is the smaller.
        p_irt: of ``p_irt``.
    """

    reference: float
    item_response: float
    p_irt: float


def held_out_error(responses: Matrix, subsets: Sequence[Items], order: ItemOrder, reference: Matrix) -> HeldOutError:
    """Cross-validation over models: each is estimated from each subset with an item model fitted to the others.

    Args:
        responses: float64 [models, items], of two or more models.
        subsets: int64 [k] each, indices of the items to estimate from, as the search would choose them.
        order: gives the stratum of each item.
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
