"""A search folder and what belongs to it: made once, opened again, held by one driver at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from evaluators.base import Split
from evomerge.checkpoints.fingerprints import check_fingerprints, content_digest, fingerprint
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipe import Recipe
from evomerge.search.folder import (
    EVIDENCE_NAME,
    STORE_NAME,
    new_folder,
    open_store,
    public_url,
    refuse_existing,
    store_place,
    write_settings,
)
from evomerge.search.pools.base import Pool
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.prepare import Prepared
from evomerge.search.setup import MeasureInfo
from evomerge.store import CandidateRow, ItemTexts, Store

_LIBRARIES = (
    "evomerge",
    "torch",
    "transformers",
    "safetensors",
    "cma",
    "cmaes",
    "optuna",
    "lm-eval",
    "ray",
    "datasets",
    "numpy",
)


def create_search(folder: Path, prepared: Prepared, fingerprints: Mapping[str, Any]) -> Store:
    """Make the folder of a new search with its store and a complete copy of its search file.

    Args:
        fingerprints: see ``fingerprints_of``.

    Raises:
        InputError: the folder exists already.
    """
    refuse_existing(folder)
    settings = prepared.file.model_dump(mode="json")
    place = store_place(folder, prepared.file.store)
    if isinstance(place, str):
        settings["store"] = public_url(place)  # the environment may name another one when the search is looked at
    with new_folder(folder) as partial:
        write_settings(partial, settings)
        Store.create(
            partial / STORE_NAME if isinstance(place, Path) else place,
            name=prepared.file.name,
            settings=settings,
            fingerprints=fingerprints,
            environment=environment(),
            items=_item_texts(prepared),
            in_place_of_undriven=isinstance(place, str),
        ).close()
    return open_store(folder)


def begin_again(folder: Path, store: Store, prepared: Prepared) -> bool:
    """Make a new search of one in which nothing was scored, if it would be another now, or if what was told is that
    nothing could be scored; whether it was done. The caller holds the lease.
    """
    search = store.search()
    settings, known = prepared.file.model_dump(mode="json"), fingerprints_of(prepared)
    told = any(step.kind == "tell" for step in store.steps())
    if store.has_scores() or not (told or (search.settings, search.fingerprints) != (settings, known)):
        return False
    write_settings(folder, settings)
    store.begin_again(settings=settings, fingerprints=known, environment=environment(), items=_item_texts(prepared))
    return True


def check_sources(store: Store, sources: Mapping[str, Source]) -> None:
    """Refuse to go on when a source is not what it was when the search began."""
    recorded = store.search().fingerprints
    for name, source in sources.items():
        check_fingerprints(source, recorded["sources"][name])


def check_unchanged(store: Store, prepared: Prepared) -> None:
    """Refuse to go on when a source or an evaluator is not what it was when the search began."""
    check_sources(store, prepared.sources)
    recorded = store.search().fingerprints
    for before, now in zip(recorded["evaluators"], prepared.setup.evaluators, strict=True):
        if before != asdict(now):
            raise InputError(
                f"objectives: {now.name}",
                "scores otherwise than when the search began: its data, its task file or lm-eval has changed",
                "Put the old ones back, or start a new search.",
            )


def _item_texts(prepared: Prepared) -> list[ItemTexts]:
    """What the items of every evaluator ask: to be read beside scores, and beside answers where they are kept."""
    splits: tuple[Split, ...] = get_args(Split)
    return [ItemTexts(e.version, split, e.texts(split)) for e in prepared.evaluators for split in splits]


def fingerprints_of(prepared: Prepared) -> dict[str, Any]:
    """What a search was started on, as JSON data: files of its sources, its evaluators, and its measures resolved."""
    setup = prepared.setup

    def told(measure: MeasureInfo) -> dict[str, Any]:
        return asdict(measure) | {"version": setup.evaluators[measure.evaluator].version}

    return {
        "sources": {name: fingerprint(source) for name, source in prepared.sources.items()},
        "evaluators": [asdict(evaluator) for evaluator in setup.evaluators],
        "objectives": [told(objective) for objective in setup.objectives],
        "constraints": [told(constraint) for constraint in setup.constraints],
        "screen": None if setup.screen is None else told(setup.screen),
        "parameters": [asdict(parameter) for parameter in setup.space.parameters],
    }


def recipe_of(row: CandidateRow, sources: Mapping[str, str]) -> Recipe:
    """The recipe of a recorded candidate; ``sources`` says where its sources lie."""
    return Recipe.from_canonical(row.recipe, sources)


def make_pool(prepared: Prepared, folder: Path, fingerprints: Mapping[str, Any]) -> Pool:
    """The pool that the search file names; Ray is only imported when it is wanted."""
    kept, contents = folder.absolute() / EVIDENCE_NAME, contents_of(fingerprints)
    if prepared.file.pool == "ray":
        from evomerge.search.pools.ray import RayPool

        return RayPool(prepared.file, kept, contents)

    from evomerge.merging.evidence import Evidence
    from evomerge.search.worker import Worker

    evidence = Evidence(kept, contents)
    return InProcessPool(lambda: Worker.of("in-process", prepared, evidence), prepared.file.together)


def contents_of(fingerprints: Mapping[str, Any]) -> dict[str, str]:
    """A digest of what each source holds."""
    return {name: content_digest(files) for name, files in fingerprints["sources"].items()}


def environment() -> dict[str, str]:
    """The versions of what decides a search's numbers."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
