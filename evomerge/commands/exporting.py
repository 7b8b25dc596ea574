"""Writing candidates of a search as model folders: the heavy half of ``evomerge export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from evomerge.checkpoints.source import Source
from evomerge.commands.delivering import local_folder
from evomerge.commands.verifying import compare, reproduce
from evomerge.commands.waiting import progress_bar
from evomerge.errors import InputError
from evomerge.merging.building.builders import find_builder
from evomerge.merging.measured.evidence import Evidence
from evomerge.objects import is_url
from evomerge.recipes.base import Recipe
from evomerge.recipes.state_dict import StateDictRecipe
from evomerge.report.basis import unconfirmed_text
from evomerge.report.card import Provenance, papers, verification
from evomerge.report.curse import curse_of
from evomerge.report.licences import CARD
from evomerge.report.search_status import SearchStatus
from evomerge.report.team import Team
from evomerge.search.opening.session import contents_of, recipe_of
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.folder import EVIDENCE_NAME
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.workers.building import build_context
from evomerge.store import CandidateRow, Store


class Written(NamedTuple):
    """A candidate that was written: what differs if it is not the scored model, the results of scoring it again, and
    the basis of its scores if it was never confirmed.
    """

    unlike: str
    checked: Sequence[str]
    unconfirmed: str


@dataclass(frozen=True)
class Exporter:
    """Writes candidates of one search.

    Attributes:
        prepared: the opened search, for scoring them again; None if they are not verified.
        team: the team of which they are members.
    """

    folder: Path
    store: Store
    file: SearchFile
    sources: Mapping[str, Source]
    prepared: Prepared | None
    status: SearchStatus
    console: Console
    team: Team | None = None

    def write(self, row: CandidateRow, out: str, form: str | None) -> Written:
        """Write a candidate to a folder or a URL, in one of the forms of its kind, and score it again."""
        recipe = self._recipe(row, form)
        evidence = Evidence(self.folder.absolute() / EVIDENCE_NAME, contents_of(self.store.search().record.files))
        context = build_context(
            self.file, self.sources, evidence, texts_digest=recipe.calibration, fit_digest=recipe.fit
        )
        builder = find_builder(recipe.kind)(replace(context, form=form))
        unlike, prepared = recipe.unlike(form), self.prepared
        unconfirmed = unconfirmed_text(self.store, row, self.status)
        provenance = Provenance(self.store.search(), self.status, row, curse_of(self.store), unconfirmed, self.team)
        checked: list[str] = []
        with local_folder(out, self.console) as model, progress_bar(self.console, "writing tensors") as bar:

            def check(written: Path) -> None:
                assert prepared is not None  # this is called only if it is to be verified
                bar.say("verifying: loading it")
                rounds = recipe.rounds_on_export or self.file.together > 1
                live = builder.reload(written)
                if unlike:
                    checked.extend(compare(live, self.store, row, prepared, say=bar.say))
                else:
                    checked.extend(reproduce(live, self.store, row, prepared, rounds=rounds, say=bar.say))
                with (written / CARD).open("a", encoding="utf-8") as text:
                    text.write(verification(checked, unlike, runs=recipe.kind != StateDictRecipe.kind))

            texts = papers(model.name, recipe, self.sources, provenance, stays=not is_url(out), unlike=unlike)
            if prepared is None:
                texts[CARD] += verification(())
            builder.export(recipe, model, texts=texts, check=check if prepared is not None else None, progress=bar)
        return Written(unlike, checked, unconfirmed)

    def _recipe(self, row: CandidateRow, form: str | None) -> Recipe:
        recipe = recipe_of(row, self.file.sources)
        _check_form(recipe, form)
        if self.file.together > 1 and recipe.dtype != "float32":
            # The adapters were added to the base's outputs, not to its weights: in 16 bits, much of their change would
            # be rounded away, and the folder would not be the model that was scored.
            recipe = recipe.model_copy(update={"dtype": "float32"})
            self.console.print("written in float32: candidates that are scored together are never rounded")
        return recipe


def _check_form(recipe: Recipe, form: str | None) -> None:
    """Raise InputError if models of this kind do not have this form."""
    if form is None or form in recipe.forms:
        return
    known = f"There are: {', '.join(recipe.forms)}." if recipe.forms else "Leave it out."
    raise InputError("--as", f"a {recipe.kind} model has no form {form!r}", known)
