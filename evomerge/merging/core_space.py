"""Core space: low-rank adapters of one base merged in the few coordinates that hold all of their changes.

Adapter i changes a weight by tau_i = s_i L_i R_i, with L_i [rows, r_i] and R_i [r_i, columns]. With orthonormal bases Q
of the columns of all L_i side by side, and P of the rows of all R_i below each other,

    M_i = Q^T tau_i P^T  [p, q],     tau_i = Q M_i P,     p and q at most the sum of the ranks.

A method merges the M_i, with zero in the base's place, and of the M that it makes the weight is W0 + Q M P (Panariello
et al. 2025, arXiv:2509.17786, section 4; the scalings s_i, which its reference code leaves out, are part of a change).
Lengths, angles and singular values of the M_i are those of the tau_i, so methods that depend only on these give the
merge of whole weights. A method that looks at single elements gives another merge, by elements of the M_i.

The bases are singular vectors, as in the paper, so the merge depends neither on the order of sources nor on the signs
of the vectors. What depends on the sources alone is evidence: made once for all candidates, workers and exports.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.blends import stepped
from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.arithmetic.nested import made_whole
from evomerge.merging.arithmetic.passes import Combine, Pass, RowFunction
from evomerge.merging.measured.evidence import Evidence, Tensors
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.path import Merged
from evomerge.merging.site import Ref, Site
from evomerge.method import find_method, plan_of
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.step import find_step

_KIND = "core 1"
_ALONE = "Core space merges low-rank adapters (LoRA) of one base alone: leave `basis` out."


class NotLowRankError(ValueError):
    """Says, for people, why sources or a recipe are not low-rank adapters on one model."""


@dataclass(frozen=True)
class Core:
    """The changes of some sources to one tensor.

    Attributes:
        site: what a method plans for: a matrix [p, q] for each source, and zeros for the base.
        left: Q, float32 [rows, p].
        right: P, float32 [q, columns].
    """

    site: Site
    left: Tensor
    right: Tensor


class CoreSpace:
    """The cores of all tensors that adapters change, and merges in them.

    Args:
        sources: by the names that recipes use.
        evidence: of these sources.
        threads: to read cores with.
    """

    def __init__(self, sources: Mapping[str, Source], evidence: Evidence, threads: WorkerThreads) -> None:
        self._sources, self._evidence = sources, evidence
        self._changes: dict[Ref, Tensor] = {}
        self._weights = Weights(self._changes.__getitem__, threads)
        self._cores: dict[tuple[Merged, str, tuple[str, ...]], Core | None] = {}

    def planned(self, merged: Merged, blend: Blend, seed: int) -> Pass:
        """How a blend that passed ``check_core`` makes a tensor, apart from steps that need whole weights."""
        base = _base_of(blend)
        core = self.core(merged, base, blend.sources)
        if core is None:
            return Combine({base: 1.0})
        return _added(base, core.left @ self.merged(core, blend, seed), core.right)

    def merged(self, core: Core, blend: Blend, seed: int) -> Tensor:
        """The method's merge of the sources' changes, with the first ``steps_in_core``: float32 [p, q]."""
        plan = self.plan(core, blend, seed)
        return made_whole(plan, self.read(core, plan))

    def plan(self, core: Core, blend: Blend, seed: int) -> Pass:
        """The plan for that."""
        facts = Facts(core.site, self._weights, self._evidence, seed)
        made_so_far = plan_of(find_method(blend.method, "recipe.blends"), facts, blend)
        return stepped(facts, blend, made_so_far, blend.steps[: steps_in_core(blend)])

    def read(self, core: Core, plan: Pass) -> list[Tensor]:
        """The inputs of a plan for a core: float32 [p, q] each."""
        return [self._changes[core.site.refs[name]] for name in plan.inputs]

    def core(self, merged: Merged, base: str, names: tuple[str, ...]) -> Core | None:
        """The core of a tensor for a blend of these sources; None where none of them changes it."""
        key = merged, base, names
        if key not in self._cores:
            changed = any(merged.stored in self._sources[name].changes for name in names)
            self._cores[key] = self._opened(merged, base, names) if changed else None
        return self._cores[key]

    def _opened(self, merged: Merged, base: str, names: Sequence[str]) -> Core | None:
        """The core of a tensor by evidence; None where all changes are zero."""
        stored = merged.stored
        follows_from = tuple(self._evidence.content_of(name) for name in names)
        kept = self._evidence.get(_KIND, (follows_from, stored), lambda: self._decomposed(stored, names))
        left, right = kept["left"], kept["right"]
        if not (left.numel() and right.numel()):
            return None
        # A core is another one with other sources beside it, and what is known of it has to say so.
        digest = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()[:16]
        refs = {name: (name, f"core {digest} {stored}") for name in (base, *names)}
        shape = left.shape[1], right.shape[0]
        self._changes[refs[base]] = torch.zeros(shape)
        for number, name in enumerate(names):
            if name != base:
                self._changes[refs[name]] = kept[f"change.{number}"]
        axis = 0 if stored in self._sources[base].transposed else 1
        return Core(Site(stored, merged.role, shape, refs, input_axis=axis), left, right)

    def _decomposed(self, stored: str, names: Sequence[str]) -> Tensors:
        """The bases of all changes of a tensor, and each source's change in them; computed in float64."""
        factors = [self._factors(name, stored) for name in names]
        left = _basis(torch.cat([left for source in factors for left, _, _ in source], dim=1))
        right = _basis(torch.cat([right for source in factors for _, right, _ in source]).T).T
        tensors = {"left": left, "right": right}
        for number, source in enumerate(factors):
            change = torch.zeros(left.shape[1], right.shape[0], dtype=torch.float64)
            for one_left, one_right, scale in source:
                change += scale * (left.T @ one_left) @ (one_right @ right.T)
            tensors[f"change.{number}"] = change
        return {name: tensor.float().contiguous() for name, tensor in tensors.items()}

    def _factors(self, name: str, stored: str) -> list[tuple[Tensor, Tensor, float]]:
        source = self._sources[name]
        factors = source.low_rank(stored)
        if not all(torch.isfinite(tensor).all() for *pair, _ in factors for tensor in pair):
            problem = f"has NaN or Inf in what its adapter changes {stored} by"
            raise InputError(source.place, problem, "The adapter is broken; download or train it again.")
        return [(left.double(), right.double(), scale) for left, right, scale in factors]


def _added(base: str, left: Tensor, right: Tensor) -> Pass:
    """b + L R, with L [rows, rank] and R [rank, columns] in float32."""

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        (own,) = tensors
        factors = (left[first_row : first_row + len(own)], right)
        return own.addmm(*(factor.to(own.device) for factor in factors))

    return RowFunction((base,), rows)


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal columns that span the columns of a matrix [n, m]: its left singular vectors [n, rank]."""
    orthonormal, triangle = torch.linalg.qr(vectors)  # n is large beside m
    turns, sizes, _ = torch.linalg.svd(triangle, full_matrices=False)
    rank = int((sizes > sizes[0] * max(vectors.shape) * torch.finfo(vectors.dtype).eps).sum())
    basis: Tensor = orthonormal @ turns[:, :rank]
    return basis


def steps_in_core(blend: Blend) -> int:
    """How many of the first steps of a blend work in core space as they do on whole weights."""
    in_any_basis = (find_step(given.name, "recipe.blends").in_any_basis for given in blend.steps)
    return sum(1 for _ in itertools.takewhile(bool, in_any_basis))


def _base_of(blend: Blend) -> str:
    if blend.base is None:
        raise ValueError("core space needs a base")
    return blend.base


# ---- what can be merged so -------------------------------------------------------------------------------------------


def check_core(blend: Blend, recipe: StackRecipe, sources: Mapping[str, Source], place: str) -> None:
    """Refuse a blend in core space that cannot be made. Opens no tensor.

    Raises:
        InputError: it has no base, needs more than weights, or mixes what is no low-rank adapter of its base.
    """
    method = find_method(blend.method, place)
    if blend.base is None:
        raise InputError(place, "merges changes of a base in core space, and has none", "Name the base: `base: NAME`.")
    if method.needs or method.whole_models:
        by = " and ".join(method.needs) or "what whole models change"
        problem = f"{method.name} depends on {by}, which needs whole weights"
        raise InputError(place, problem, "Leave `basis` out, or take another method.")
    for hop in recipe.hops:
        blends = {recipe.blends[number].basis for number in (hop.attention, hop.mlp, hop.norm)}
        if "core" in blends and not isinstance(hop.layer, int):
            raise InputError(place, "mixes different layers of its sources: adapters change one layer of the base each")
    try:
        for name in blend.sources:
            check_adapters(name, sources[name], blend.base, sources[blend.base])
    except NotLowRankError as error:
        raise InputError(place, str(error), _ALONE) from None


def check_adapters(name: str, source: Source, base: str, model: Source) -> None:
    """Refuse a source whose tensors are not those of a model, each with low-rank changes at most.

    Raises:
        NotLowRankError: it is something else.
    """
    if source.folder != model.folder:
        raise NotLowRankError(f"{name} is another model than {base}, not an adapter of it")
    if model.changes or model.replaced:
        raise NotLowRankError(f"the base {base} has an adapter itself")
    if type(source) is not Source:
        raise NotLowRankError("the sources' embeddings are laid out for another vocabulary")
    if source.replaced:
        raise NotLowRankError(
            f"the adapter of {name} holds {source.replaced[0]} in full (modules_to_save, or a trained bias)"
        )
    for tensor, changes in source.changes.items():
        for change in changes:
            if not isinstance(change, LowRank):
                raise NotLowRankError(f"the adapter of {name} {change.words(tensor)}")
            if change.magnitude is not None:
                raise NotLowRankError(f"the adapter of {name} is a DoRA: its norms are no sum")
