"""A description of a stack recipe in a few lines: which parts of the model each blend makes, and from what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.printable import ranges

if TYPE_CHECKING:
    from evomerge.recipes.stack import Blend, BlendStep, StackRecipe

_SCALE = "scale"  # the step by which profiles over depth are expressed
_MAX_TENSORS = 3  # maximum number of tensors that a line lists by name


def stack_lines(recipe: StackRecipe) -> list[str]:
    """A line for each blend: attention of layers 0 to 9: ties of maths, json on base; weight maths 0.5, json 0.9.

    Blends that differ only in a final scaling, such as those of a profile, share one line, and so do those that differ
    only in digits that are not shown.
    """
    alike: dict[str, list[int]] = {}
    for number, blend in enumerate(recipe.blends):
        alike.setdefault(blend_text(_without_last_scale(blend)), []).append(number)
    lines = []
    for words, numbers in alike.items():
        if len(numbers) == 1:
            lines.append(f"{_parts(recipe, numbers[0])}: {blend_text(recipe.blends[numbers[0]])}")
            continue
        whole = "the whole model" if len(alike) == 1 else "; ".join(_parts(recipe, n) for n in numbers)
        if not any(_is_scaled(recipe.blends[n]) for n in numbers):
            lines.append(f"{whole}: {words}")
            continue
        factors = ", ".join(f"{_last_factor(recipe.blends[n])} ({_parts(recipe, n)})" for n in numbers)
        lines.append(f"{whole}: {words}; then scale by factor {factors}")
    return lines


def _is_scaled(blend: Blend) -> bool:
    """Whether the last step of a blend is a scaling of its change."""
    return bool(blend.steps) and blend.steps[-1].name == _SCALE


def _without_last_scale(blend: Blend) -> Blend:
    return blend.model_copy(update={"steps": blend.steps[:-1]}) if _is_scaled(blend) else blend


def _last_factor(blend: Blend) -> str:
    """A description of a blend's final scaling, if it has one."""
    return value_text(blend.steps[-1].parameters.get("factor", 1.0)) if _is_scaled(blend) else "1"


def _parts(recipe: StackRecipe, number: int) -> str:
    """A short description of the parts of the model that a blend makes."""
    if len(recipe.blends) == 1:
        return "the whole model"
    names = [name for name in ("embedding", "norm", "head") if getattr(recipe, name) == number]
    layers: dict[str, list[str]] = {}  # kinds of parts, by the layers for which the blend makes them
    for kind in ("attention", "mlp", "norm"):
        if hops := [i for i, hop in enumerate(recipe.hops) if getattr(hop, kind) == number]:
            layers.setdefault(ranges(hops, " to "), []).append(kind)
    for runs, kinds in layers.items():
        which = f"layer {runs}" if runs.isdecimal() else f"layers {runs}"
        names.append(which if len(kinds) == 3 else f"{' and '.join(kinds)} of {which}")
    names += ["what reads images"] if recipe.vision == number else []
    apart = [name for name, index in recipe.tensors.items() if index == number]
    if apart:
        more = f" and {len(apart) - _MAX_TENSORS} more tensors" if len(apart) > _MAX_TENSORS else ""
        names.append(", ".join(apart[:_MAX_TENSORS]) + more)
    return "; ".join(names)


def value_text(value: float | str) -> str:
    """A number with few digits; the name of a choice."""
    return value if isinstance(value, str) else f"{value:.4g}"


def step_text(step: BlendStep) -> str:
    """A step with its numbers: scale by factor 0.8."""
    numbers = ", ".join(f"{name} {value_text(value)}" for name, value in step.parameters.items())
    return f"{step.name} by {numbers}" if numbers else step.name


def blend_text(blend: Blend) -> str:
    numbers = []
    for name, value in blend.parameters.items():
        if isinstance(value, dict):
            numbers.append(
                f"{name} " + ", ".join(f"{source} {value_text(setting)}" for source, setting in value.items())
            )
        elif isinstance(value, bool):
            numbers += [name] if value else []
        else:
            numbers.append(f"{name} {value_text(value)}")
    onto = f" on {blend.base}" if blend.base else ""
    basis = " in core space" if blend.basis == "core" else ""
    steps = [f"then {step_text(step)}" for step in blend.steps]
    return "; ".join([f"{blend.method} of {', '.join(blend.sources)}{onto}{basis}", *numbers, *steps])
