"""What the merge methods of this project need and take, as data: known before a tensor is, and without torch.

Their equations are in ``evomerge.merging``: ``span``, ``sparse`` and ``selective``. A package adds a method by an entry
point of the group ``evomerge.merge_methods`` that names a ``Method``, which holds its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.errors import InputError
from evomerge.method_spec import MethodParameter, MethodSpec
from evomerge.plugins import plugins, unknown_name

GROUP = "evomerge.merge_methods"


def find_spec(name: str, place: str) -> MethodSpec:
    """What the method of this name needs and takes.

    Raises:
        InputError: there is none, or a package's entry point names something that is no method.
    """
    if name in SPECS:
        return SPECS[name]
    added = plugins(GROUP)
    if name not in added:
        raise unknown_name(name, [*SPECS, *added], place, "merge method")
    spec = getattr(added[name].load(), "spec", None)
    if not isinstance(spec, MethodSpec):
        raise InputError(place, f"{added[name].value} is no merge method", "Let it name a Method.")
    return spec


# ---- parameters that several methods take ----------------------------------------------------------------------------


def weight(default: float, high: float = 1.5) -> MethodParameter:
    """1.5 leaves room above the optimum of the original work, whose weights sum to about two over three sources."""
    return MethodParameter("weight", "source", low=0.0, high=high, default=default)


def density(default: float) -> MethodParameter:
    return MethodParameter("density", "source", low=0.1, high=1.0, default=default)


def scale(*, searched: bool = False) -> MethodParameter:
    """The lambda of the papers: a factor on the whole sum of task vectors.

    Where weights are not normalised it only multiplies them, and a search over both would walk the same models many
    times; so a search leaves it at 1 unless the method has no weights.
    """
    return MethodParameter("lambda", "blend", low=0.0, high=2.0, default=1.0, searched=searched)


# ---- in the span of the sources --------------------------------------------------------------------------------------

_SPAN = (
    # Only the ratios of the weights count, so there is nothing to find above 1.
    MethodSpec("linear", (weight(1.0, high=1.0),), needs_base=False, switches={"normalize": True}),
    MethodSpec(
        "passthrough",
        (MethodParameter("scale", "source", low=0.5, high=1.5, default=1.0),),
        needs_base=False,
        max_sources=1,
    ),
    MethodSpec(
        "slerp",
        (MethodParameter("t", "blend", low=0.0, high=1.0, default=0.5),),
        needs_base=False,
        min_sources=2,
        max_sources=2,
    ),
    MethodSpec(
        "nuslerp",
        (weight(1.0, high=1.0),),
        needs_base=False,
        min_sources=2,
        max_sources=2,
        switches={"flatten": True, "row_wise": False},
    ),
    MethodSpec("multislerp", (weight(1.0, high=1.0),), needs_base=False, switches={"normalize": True}),
    MethodSpec("karcher", (weight(1.0, high=1.0),), needs_base=False),
    # 0.4: the scaling that is used where there is no validation set (see arXiv 2306.01708, experiments).
    MethodSpec("task_arithmetic", (weight(0.4), scale()), needs_base=True, switches={"normalize": False}),
    MethodSpec("model_stock", (scale(searched=True),), needs_base=True, min_sources=2, switches={"filter_wise": False}),
)

# ---- sparse task vectors ---------------------------------------------------------------------------------------------


def _sparse(name: str, *parameters: MethodParameter, rescale: bool = False) -> MethodSpec:
    switches = {"normalize": False, "rescale": rescale}
    return MethodSpec(name, (*parameters, scale()), needs_base=True, switches=switches)


_GAMMA = MethodParameter("gamma", "source", low=0.0, high=0.05, default=0.01, searched=False)
_SPREAD = MethodParameter("epsilon", "source", low=0.0, high=0.3, default=0.15, searched=False)

_SPARSE = (
    # The paper's k = 20% and lambda = 1.
    _sparse("ties", weight(1.0), density(0.2)),
    _sparse("dare_linear", weight(0.5), density(0.5), rescale=True),
    _sparse("dare_ties", weight(0.5), density(0.5), rescale=True),
    _sparse("della_linear", weight(0.5), density(0.5), _SPREAD, rescale=True),
    _sparse("della", weight(0.5), density(0.5), _SPREAD, rescale=True),
    # The paper keeps 85 to 90% of a task vector, and the lambda that a validation set chose, 0.3 to 0.5.
    _sparse("breadcrumbs", weight(0.4), density(0.9), _GAMMA),
    _sparse("breadcrumbs_ties", weight(0.4), density(0.9), _GAMMA),
)

# ---- chosen elements -------------------------------------------------------------------------------------------------

EPSILON = MethodParameter("epsilon", "blend", low=0.0, high=1e-3, default=1e-5, searched=False)
R = MethodParameter("r", "blend", low=0.0, high=1.0, default=0.1)
ALPHA = MethodParameter("alpha", "blend", low=0.0, high=2.0, default=0.2)
FENCE = MethodParameter("fence", "blend", low=0.0, high=5.0, default=1.5)
T = MethodParameter("t", "blend", low=0.0, high=0.02, default=0.001)

_SELECTIVE = (
    MethodSpec("sce", (MethodParameter("select_topk", "blend", low=0.05, high=1.0, default=1.0),), needs_base=True),
    MethodSpec("ram", (scale(searched=True), EPSILON), needs_base=True),
    MethodSpec("ramplus_tl", (R, ALPHA, scale(), EPSILON), needs_base=True),
    MethodSpec("arcee_fusion", (FENCE,), needs_base=True, max_sources=1),
    MethodSpec("nearswap", (T,), needs_base=True, max_sources=1),
)

SPECS: Mapping[str, MethodSpec] = {spec.name: spec for spec in (*_SPAN, *_SPARSE, *_SELECTIVE)}
"""All of this project's, by name."""
