"""Operations on a blend as a whole: its method and the steps after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from evomerge.errors import InputError
from evomerge.method import Need, check_blend, check_needs, find_method, method_shares, plan_of
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.step import check_step, find_step, needs_of_steps

if TYPE_CHECKING:
    from evomerge.merging.arithmetic.passes import Pass
    from evomerge.merging.measured.facts import Facts


def check_whole(blend: Blend, place: str, *, has_texts: bool, has_fit: bool) -> None:
    """Reject a blend that cannot be computed.

    Args:
        place: the blend's location, for messages.
        has_texts: whether there are calibration texts.
        has_fit: whether there are items that numbers are fitted to.

    Raises:
        InputError: an unknown method or step, invalid values, or a requirement that is not met.
    """
    method = find_method(blend.method, f"{place}.method")
    check_blend(blend, method, place)
    check_needs(method, place, has_texts=has_texts, has_fit=has_fit)
    for number, given in enumerate(blend.steps):
        step_place = f"{place}.steps[{number}]"
        step = find_step(given.name, f"{step_place}.name")
        check_step(given, step, blend, step_place)
        check_needs(step, step_place, has_texts=has_texts, has_fit=has_fit)


def derivative_problem(blend: Blend) -> str | None:
    """Why a loss is not differentiable in the numbers of a blend that ``check_whole`` accepted; None if it is."""
    method = find_method(blend.method, "blend.method")
    if method.differentiable is None:
        return f"{method.name} makes weights by more than sums with fixed masks"
    steps = [find_step(given.name, "blend.steps") for given in blend.steps]
    for step in steps:
        if not step.keeps_derivatives:
            return f"the step {step.name} does more than to multiply changes"
        if blend.basis == "core" and not step.in_any_basis:
            return f"the step {step.name} leaves core space"
    return None


def observed(recipes: Iterable[Recipe], sources: Collection[str]) -> dict[str, set[Need]]:
    """The sources that calibration texts must be run through for some recipes, and what is needed of each.

    For recipes of other kinds than stacks this is unknown, so everything of every source is included.
    """
    found: dict[str, set[Need]] = {name: set() for name in sources}
    for recipe in recipes:
        if recipe.calibration is None:
            continue
        for name in sources:
            found[name] |= _needs_of(recipe, name) if isinstance(recipe, StackRecipe) else {"calibration"}
    return {name: needs for name, needs in found.items() if needs}


def _needs_of(recipe: StackRecipe, source: str) -> set[Need]:
    """What the blends of a recipe need of a source: methods of the sources they mix, steps of the base."""
    mixing = (find_method(blend.method, "blend") for blend in recipe.blends if source in blend.sources)
    of_methods = (need for method in mixing for need in method.needs)
    of_steps = (need for blend in recipe.blends if blend.base == source for need in needs_of_steps(blend))
    return {*of_methods, *of_steps} - {"fit"}


def planned(facts: Facts, blend: Blend) -> Pass:
    """The plan for a tensor, given a blend that ``check_whole`` accepted."""
    return stepped(facts, blend, plan_of(find_method(blend.method, "blend"), facts, blend), blend.steps)


def stepped(facts: Facts, blend: Blend, made: Pass, steps: Sequence[BlendStep]) -> Pass:
    """The plan for a tensor after some steps of its blend; ``made`` is the plan before them."""
    for given in steps:
        step = find_step(given.name, "blend.steps")
        made = step.plan(facts, blend, step.values(given.parameters), made)
    return made


def shares_of(blend: Blend) -> dict[str, float]:
    """How much a blend takes of each source, in the scale of its own numbers.

    This is what its method says, times the factors of steps that multiply the whole change. A method or step that is
    not installed, for example when showing somebody else's search, has no effect.
    """
    factor = 1.0
    for given in blend.steps:
        try:
            step = find_step(given.name, "blend.steps")
        except InputError:
            continue
        factor *= 1.0 if step.factor is None else step.factor(step.values(given.parameters))
    return {source: factor * share for source, share in method_shares(blend).items()}
