"""The control of a search that selected its sources: the winner with random directions in place of sources.

If a merge has one good source, random changes of the same lengths are often as good as the other sources that were
selected for the task (arXiv 2602.12323). The source with the largest share in the winner stays; every other one is
replaced by a random direction of the same length in each weight, and the winner's numbers stay the same. Both models
are compared on the held-out split.
"""

from __future__ import annotations

import shlex
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from evomerge.blends import shares_of
from evomerge.commands.outside import OutsideJobs
from evomerge.errors import InputError
from evomerge.merging.building.derived import Derived, make_source
from evomerge.optimizers.base import random_state
from evomerge.recipes.stack import StackRecipe
from evomerge.report.selection import control_sentence, uncontrolled_winner
from evomerge.search.driving.dispatch import Pending
from evomerge.search.estimation.scores import to_scores
from evomerge.search.estimation.selection import pooled_difference
from evomerge.search.opening.session import contents_of, make_pool, recipe_of
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared, with_sources
from evomerge.search.settings.folder import SOURCES_NAME
from evomerge.search.settings.selecting import always_kept
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import Scores, Store
from evomerge.store.events import Compared, WinnerControlled


def control_winner(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Score the winner's control if the search selected its sources and there is no control yet.

    Args:
        pool: the pool of the search; it is closed before the control is scored, which has other sources.

    Returns:
        False if the search was stopped first.

    Raises:
        InputError: the control cannot be made or scored; the winner is named all the same.
    """
    number = uncontrolled_winner(store)
    if number is None:
        return True
    recipe = recipe_of(store.candidate(number), prepared.file.sources)
    kept, replaced = _divided(recipe, always_kept(prepared.file)) if isinstance(recipe, StackRecipe) else ("", [])
    better = None
    if replaced:
        pool.close()
        try:
            better = _Control(folder, prepared, store, number).compare(replaced)
        except InputError as error:
            again = shlex.join(["evomerge", "resume", str(folder)])
            hint = f"The search is finished and confirmed all the same. To try the control again: {again}"
            raise InputError(error.place, f"the winner has no control: {error.problem}. {error.hint}", hint) from error
        if better is None:
            return False
    said = WinnerControlled(candidate=number, kept=kept, replaced=replaced, better=better)
    store.record_event(said)
    console.print(Text(control_sentence(said)))
    return True


def _divided(recipe: StackRecipe, needed: list[str]) -> tuple[str, list[str]]:
    """The source with the largest share in a recipe, and all other sources in it except the needed ones."""
    shares = Counter[str]()
    for blend in recipe.blends:
        shares.update({source: abs(share) for source, share in shares_of(blend).items() if source not in needed})
    ranked = [source for source, share in shares.most_common() if share > 0]
    return (ranked[0], ranked[1:]) if ranked else ("", [])


class _Control(OutsideJobs):
    """One job: the winner's recipe with some sources replaced by random directions."""

    log_prefix = "control"

    def __init__(self, folder: Path, prepared: Prepared, store: Store, number: int) -> None:
        super().__init__(folder, prepared, store)
        self._folder, self._number = folder.absolute(), number
        self._tasks = prepared.setup.tasks("held_out")
        self._scores: list[Scores] = []

    def compare(self, replaced: list[str]) -> Compared | None:
        """How much better the winner is than its control on the held-out split; None if the search was stopped first.

        Raises:
            InputError: the control cannot be made or scored.
        """
        self.prepared = self._with_random(replaced)
        recipe = recipe_of(self.store.candidate(self._number), self.prepared.file.sources)
        with closing(make_pool(self.prepared, self._folder, self.files_of(self.prepared))) as pool:
            if not self.run(pool, [Pending(-1, 1, recipe, "the winner's control", self._tasks)]):
                return None
        of_winner = {scores.evaluator: scores for scores in self.store.scores(self._number, "held_out")}
        of_control = {scores.evaluator: scores for scores in self._scores}
        setup = self.prepared.setup
        ours, theirs = (
            [
                found[setup.evaluators[o.evaluator].version].metrics[o.metric].astype(np.float64)
                for o in setup.objectives
                if o.maximise
            ]
            for found in (of_winner, of_control)
        )
        gap = pooled_difference(ours, theirs)
        return Compared(mean=gap.mean, low=gap.low, high=gap.high)

    def _with_random(self, replaced: list[str]) -> Prepared:
        """The search with some sources replaced by random directions."""
        prepared, file = self.prepared, self.prepared.file
        assert file.base is not None  # the selection has compared sources with it
        contents = contents_of(self.store.search().record.files)
        made = {}
        for name in replaced:
            seed = int(random_state(file.seed, list(file.sources).index(name)).randint(2**31))
            made[name] = make_source(
                Derived({name: 1.0}, seed), f"control_{name}", file.base, prepared.sources, contents,
                self._folder / SOURCES_NAME,
            )  # fmt: skip
        return with_sources(prepared, file.model_copy(update={"sources": file.sources | made}))

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # none of these jobs is a descent
        self._scores = to_scores(self.prepared.setup, result, pending.tasks)

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        return InputError("select", f"its control cannot be scored: {failure.message}", f"See {log}." if log else "")
