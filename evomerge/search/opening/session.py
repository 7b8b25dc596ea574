"""A search folder and what belongs to it: created once, reopened, held by one driver at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from evaluators.base import Evaluator, Split
from evomerge.checkpoints.fingerprints import check_fingerprints, content_digest, fingerprint
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.files import FileFingerprint
from evomerge.inference.pictures import thumbnail
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.search.pools.base import Pool
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import MeasureInfo
from evomerge.search.settings.folder import (
    EVIDENCE_NAME,
    STORE_NAME,
    new_folder,
    open_store,
    public_url,
    refuse_existing,
    store_place,
    write_settings,
)
from evomerge.store import CandidateRow, ItemTexts, Store
from evomerge.store.events import EvaluatorsChanged
from evomerge.store.record import Evaluator as RecordedEvaluator

Files = Mapping[str, FileFingerprint]
"""The files of a source by name."""

_SPLITS: tuple[Split, ...] = get_args(Split)

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
    "pillow",
    "torchvision",  # if installed, transformers uses it to make pixels, with other last bits
)


def create_search(folder: Path, prepared: Prepared, fingerprints: Mapping[str, Any]) -> Store:
    """Create the folder of a new search with its store and a complete copy of its search file.

    Args:
        fingerprints: see ``fingerprints_of``.

    Raises:
        InputError: the folder exists already.
    """
    refuse_existing(folder)
    settings = prepared.file.model_dump(mode="json")
    place = store_place(folder, prepared.file.store)
    if isinstance(place, str):
        settings["store"] = public_url(place)  # the environment may name another one later
    with new_folder(folder) as partial:
        write_settings(partial, settings)
        Store.create(
            partial / STORE_NAME if isinstance(place, Path) else place,
            name=prepared.file.name,
            settings=settings,
            fingerprints=fingerprints,
            environment=environment(),
            items=_all_item_texts(prepared),
            in_place_of_undriven=isinstance(place, str),
        ).close()
    return open_store(folder)


def begin_again(folder: Path, store: Store, prepared: Prepared) -> bool:
    """Restart a search in which nothing was scored, if it would differ now, or if all that was told were failures;
    whether that was done. The caller holds the lease.
    """
    search = store.search()
    settings, known = prepared.file.model_dump(mode="json"), fingerprints_of(prepared)
    has_tell = any(step.kind == "tell" for step in store.steps())
    if store.has_scores() or not (has_tell or (search.settings, search.fingerprints) != (settings, known)):
        return False
    write_settings(folder, settings)
    store.begin_again(settings=settings, fingerprints=known, environment=environment(), items=_all_item_texts(prepared))
    return True


def check_sources(store: Store, sources: Mapping[str, Source]) -> None:
    """Refuse to continue if a source has changed since the search began."""
    recorded = store.search().record.files
    for name, source in sources.items():
        check_fingerprints(source, recorded[name])


def as_recorded(store: Store, prepared: Prepared) -> Prepared:
    """What was opened for a search with scores, with its evaluators under the versions that scores are recorded under.

    Whether changed evaluators still score as recorded is not known yet: see ``changed_evaluators``.

    Raises:
        InputError: a source, or an item that was scored, has changed.
    """
    check_sources(store, prepared.sources)
    digest = None if prepared.calibration is None else prepared.calibration.digest
    recorded = store.search().record
    if recorded.calibration != digest:
        problem = "are not the texts that the search began with; with others its recipes would make different models"
        raise InputError("calibration", problem, "Put them back, or start a new search.")
    split = prepared.file.fit_split
    if recorded.fit != (None if split is None else split.digest):
        problem = "are not the items that the search began with; with others its recipes would make different models"
        raise InputError("fit", problem, "Put them back, or start a new search.")
    infos = []
    for before, info, evaluator in zip(
        recorded.evaluators, prepared.setup.evaluators, prepared.evaluators, strict=True
    ):
        if evaluator.version != before.accepted:
            _check_items(store, before, evaluator)
        infos.append(replace(info, version=before.version))
    return replace(prepared, setup=replace(prepared.setup, evaluators=tuple(infos)))


def changed_evaluators(store: Store, prepared: Prepared) -> list[int]:
    """The positions of evaluators that may score differently than when the search began.

    Their data, their files or a library has changed since.
    """
    pairs = zip(store.search().record.evaluators, prepared.evaluators, strict=True)
    return [e for e, (before, now) in enumerate(pairs) if now.version != before.accepted]


def accept_changed(store: Store, prepared: Prepared, changed: Sequence[int], scored: Sequence[str]) -> None:
    """Record that evaluators at these positions score as before; ``scored`` are the candidates that showed it."""
    fingerprints = dict(store.search().fingerprints)
    entries, texts, named = [*fingerprints["evaluators"]], [], []
    for e in changed:
        info, evaluator = prepared.setup.evaluators[e], prepared.evaluators[e]
        entries[e] = asdict(info) | {"items": _digests(evaluator), "accepted_version": evaluator.version}
        texts += [_item_texts(info.version, evaluator, split) for split in _SPLITS]
        named.append({"name": info.name, "version": evaluator.version})
    fingerprints["evaluators"] = entries
    store.change_evaluators(fingerprints, texts, EvaluatorsChanged(evaluators=named, scored=list(scored)))


def _check_items(store: Store, recorded: RecordedEvaluator, evaluator: Evaluator) -> None:
    """Refuse changed items: those of the search split, and held-out ones once any was scored."""
    version, digests = recorded.version, recorded.items
    for split in _SPLITS:
        if split == "held_out" and not store.scored_on(version, split, most=1):
            continue
        before, now = (
            store.item_texts(version, split),
            [(item.question, item.answer) for item in evaluator.items(split)],
        )
        named = split.replace("_", "-")
        pairs = enumerate(zip_longest(before, map(tuple, now)))
        other = next((number for number, (a, b) in pairs if a != b), None)
        if other is not None or digests.get(split) not in (None, _digests(evaluator)[split]):
            what = f"an item of its {named} items"
            if other is not None:
                what = evaluator.name_of(split, other) if other < len(now) else f"item {other} of its {named} items"
            raise InputError(
                f"objectives: {evaluator.name}",
                f"{what} is not the one that was scored",
                "Put the items back as they were, or start a new search. `evomerge export --no-verify` needs no items.",
            )


def _digests(evaluator: Evaluator) -> dict[str, str]:
    """For each split, a hash of its items in order."""
    return {
        split: hashlib.sha256(json.dumps([item.id for item in evaluator.items(split)]).encode()).hexdigest()[:16]
        for split in _SPLITS
    }


def _all_item_texts(prepared: Prepared) -> list[ItemTexts]:
    """The questions of every evaluator's items, to be shown beside scores, and beside answers if these are kept."""
    return [_item_texts(e.version, e, split) for e in prepared.evaluators for split in _SPLITS]


def _item_texts(version: str, evaluator: Evaluator, split: Split) -> ItemTexts:
    items = evaluator.items(split)
    texts = [(item.question, item.answer) for item in items]
    if not any(item.media for item in items):
        return ItemTexts(version, split, texts)
    thumbnails = {
        media.sha256: thumbnail(media, evaluator.name_of(split, number))
        for number, item in enumerate(items)
        for media in item.media
    }
    return ItemTexts(version, split, texts, [[media.sha256 for media in item.media] for item in items], thumbnails)


def fingerprints_of(prepared: Prepared) -> dict[str, Any]:
    """What a search was started with, as JSON data: files of its sources, its evaluators, and its resolved measures."""
    setup = prepared.setup

    def resolved(measure: MeasureInfo) -> dict[str, Any]:
        return asdict(measure) | {"version": setup.evaluators[measure.evaluator].version}

    return {
        "sources": {name: fingerprint(source) for name, source in prepared.sources.items()},
        "evaluators": [
            asdict(info) | {"items": _digests(evaluator)}
            for info, evaluator in zip(setup.evaluators, prepared.evaluators, strict=True)
        ],
        "objectives": [resolved(objective) for objective in setup.objectives],
        "constraints": [resolved(constraint) for constraint in setup.constraints],
        "features": [resolved(feature) for feature in setup.features],
        "screen": None if setup.screen is None else resolved(setup.screen),
        "parameters": [asdict(parameter) for parameter in setup.space.parameters],
        "calibration": None if prepared.calibration is None else prepared.calibration.digest,
        "fit": None if prepared.file.fit_split is None else prepared.file.fit_split.digest,
    } | ({"start": [{"label": p.label, "genome": p.genome.tolist()} for p in setup.start]} if setup.start else {})


def recipe_of(row: CandidateRow, sources: Mapping[str, str]) -> Recipe:
    """The recipe of a recorded candidate; ``sources`` says where its sources are."""
    return read_recipe(row.recipe, sources)


def make_pool(prepared: Prepared, folder: Path, files: Mapping[str, Files]) -> Pool:
    """The pool that the search file names; Ray is only imported if needed. ``files`` are those of the sources."""
    kept, contents = folder.absolute() / EVIDENCE_NAME, contents_of(files)
    if prepared.file.pool == "ray":
        from evomerge.search.pools.ray import RayPool

        return RayPool(prepared.file, kept, contents)

    from evomerge.merging.measured.evidence import Evidence
    from evomerge.search.workers.building import choose_device
    from evomerge.search.workers.worker import Worker

    evidence = Evidence(kept, contents)
    gpus = prepared.file.cluster.gpus_per_worker
    if gpus is None:
        gpus = float(choose_device(prepared.file.device).type == "cuda")
    return InProcessPool(lambda: Worker.of("in-process", prepared, evidence), prepared.file.together, gpus)


def contents_of(files: Mapping[str, Files]) -> dict[str, str]:
    """A digest of each source's content."""
    return {name: content_digest(source_files) for name, source_files in files.items()}


def environment() -> dict[str, str]:
    """The versions of everything that determines a search's numbers."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
