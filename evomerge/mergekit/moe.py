"""Mixtures from the configurations of mergekit-moe.

Two deliberate differences: prompts give prototypes of the inputs of each layer's router itself
(``evomerge/mixture/routers.py``), over all their tokens except the first; and ``cheap_embed``, which knows no layers,
is treated as ``hidden`` (docs/from-mergekit.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from evomerge.calibration import Calibration
from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.mergekit.references import read_reference, short_names
from evomerge.recipes.base import DType
from evomerge.recipes.mixture import Architecture, MixtureRecipe, SharedExpert, SlotGroup, SlotRouter
from evomerge.recipes.stack import Blend

_TOKENS = 4096
"""The maximum number of tokens used of a prompt."""

_GUESSED: dict[str, Architecture] = {
    "llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
}  # fmt: skip
"""The architecture that mergekit chooses for dense models by default."""

Reference = Annotated[str, BeforeValidator(lambda given: read_reference(given, "source_model"))]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Expert(_Section):
    source_model: Reference
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: FiniteFloat | None = None
    residual_scale: FiniteFloat | None = None


class MoeFile(_Section):
    """A configuration of mergekit-moe."""

    base_model: Reference
    experts: tuple[_Expert, ...] = Field(min_length=2)
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = "hidden"
    dtype: DType | None = None
    experts_per_token: int = Field(default=2, ge=1)
    shared_experts: tuple[_Expert, ...] = ()
    architecture: str | None = None


@dataclass(frozen=True)
class Mixture:
    """The mixture that a configuration describes, and the prompts that its routers are computed from, if any."""

    recipe: MixtureRecipe
    texts: Calibration | None


def read_moe(content: Any, place: str) -> MoeFile:
    """Validate a configuration of mergekit-moe.

    Raises:
        InputError: an unknown key or wrong value, or something that no mixture here supports.
    """
    try:
        file = MoeFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, place, MoeFile, content) from None
    for key, experts in (("experts", file.experts), ("shared_experts", file.shared_experts)):
        for number, expert in enumerate(experts):
            _check_expert(file, expert, key, f"{place}: {key}.{number}")
    if len(file.shared_experts) > 1:
        raise InputError(f"{place}: shared_experts", f"are {len(file.shared_experts)}; a mixture has one at most")
    if file.experts_per_token > len(file.experts):
        problem = f"is {file.experts_per_token}, and there are {len(file.experts)} experts"
        raise InputError(f"{place}: experts_per_token", problem)
    return file


def _check_expert(file: MoeFile, expert: _Expert, key: str, place: str) -> None:
    if expert.noise_scale:
        raise InputError(f"{place}.noise_scale", "cannot be taken: what is exported has no noise in it", "Remove it.")
    if key == "shared_experts":
        if expert.positive_prompts or expert.negative_prompts:
            problem = "cannot be taken: a shared expert computes every token alike"
            raise InputError(
                f"{place}.positive_prompts", problem, "Remove the prompts; `residual_scale` is its weight."
            )
        return
    if expert.residual_scale not in (None, 1.0):
        hint = "Remove it; a shared expert may have one."
        raise InputError(f"{place}.residual_scale", "cannot be taken: gates decide how much an expert adds", hint)
    if not expert.positive_prompts and "random" not in file.gate_mode:
        hint = "Give some, or `gate_mode: random` for a mixture that is to be trained."
        raise InputError(f"{place}.positive_prompts", "is empty, and routers are made of prompts", hint)


def mixture_of(
    file: MoeFile, look: Callable[[str], tuple[str, int]], place: str, architecture: Architecture | None = None
) -> Mixture:
    """The mixture for a validated configuration.

    Args:
        look: the ``model_type`` of a model and its number of layers, by its reference.
        architecture: overrides the configured or guessed one.

    Raises:
        InputError: no mixture can be made from such models.
    """
    shared = file.shared_experts[0] if file.shared_experts else None
    references = [file.base_model, *(e.source_model for e in (*file.experts, *file.shared_experts))]
    names = short_names(dict.fromkeys(references))
    slots = _slot_names([names[expert.source_model] for expert in file.experts])
    used = list(dict.fromkeys(names[reference] for reference in references))
    number_of = {name: number for number, name in enumerate(used)}
    there = {slot: number_of[names[e.source_model]] for slot, e in zip(slots, file.experts, strict=True)}
    texts = _texts(file, slots)
    rest = number_of[names[file.base_model]]
    router = SlotRouter(
        kind="random" if texts is None else "prototypes",
        rest=rest,
        slots=there,
        against=tuple(slot for slot, expert in zip(slots, file.experts, strict=True) if expert.negative_prompts)
        if texts is not None
        else (),
    )
    kind, layers = look(file.base_model)
    recipe = MixtureRecipe(
        sources={names[reference]: reference for reference in references},
        tokenizer=names[file.base_model],
        dtype=file.dtype,
        architecture=architecture or _architecture(file, kind, place),
        blends=tuple(_alone(name) for name in used),
        rest=rest,
        embedding=rest,
        groups=(SlotGroup(layers=layers, slots=there),),
        top_k=file.experts_per_token,
        router=router,
        shared=None if shared is None else _shared(shared, number_of[names[shared.source_model]]),
        calibration=None if texts is None else texts.digest,
    )
    return Mixture(recipe, texts)


def _shared(expert: _Expert, number: int) -> SharedExpert:
    return SharedExpert(blend=number, scale=1.0 if expert.residual_scale is None else expert.residual_scale)


def _architecture(file: MoeFile, kind: str, place: str) -> Architecture:
    if file.architecture is not None:
        known = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
        said = file.architecture.lower().replace("-", "_").removesuffix("moe").rstrip("_")
        if said not in known:
            problem = f"{file.architecture} is not supported here"
            raise InputError(f"{place}: architecture", problem, f"One of: {', '.join(known)}; or leave it out.")
        return known[said]  # type: ignore[return-value]
    if kind not in _GUESSED:
        raise InputError(f"{place}: base_model", f"is a {kind}, from which no mixture can be made")
    return "qwen2_moe" if kind == "llama" and file.shared_experts else _GUESSED[kind]


def _slot_names(names: Sequence[str]) -> list[str]:
    """A name for each expert: its model's, with a number if several share one model."""
    return [
        name if names.count(name) == 1 else f"{name}-{names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]


def _texts(file: MoeFile, slots: Sequence[str]) -> Calibration | None:
    """The prompts, by slot; negative prompts are under "not SLOT"."""
    if "random" in file.gate_mode:
        return None
    prompts = {slot: expert.positive_prompts for slot, expert in zip(slots, file.experts, strict=True)}
    prompts |= {
        f"not {slot}": expert.negative_prompts
        for slot, expert in zip(slots, file.experts, strict=True)
        if expert.negative_prompts
    }
    return Calibration(None, _TOKENS, own={name: lambda name=name: prompts[name] for name in prompts})  # type: ignore[misc]


def _alone(source: str) -> Blend:
    """A model, unchanged."""
    return Blend(method="linear", sources=(source,), parameters={"weight": {source: 1.0}, "normalize": False})
