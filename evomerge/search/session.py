"""A search folder and what belongs to it: made once, opened again, held by one driver at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import yaml

from evaluators.base import Split
from evomerge.checkpoints.fingerprints import check_fingerprints, fingerprint
from evomerge.errors import InputError
from evomerge.recipe import Recipe
from evomerge.search.folder import (
    FILE_NAME,
    STATISTICS_NAME,
    STORE_NAME,
    is_search,
    open_store,
    public_url,
    store_place,
)
from evomerge.search.pools.base import Pool
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.prepare import Prepared
from evomerge.search.rebudget import check_budget
from evomerge.search.search_file import SearchFile, apply_override, load_search_file, parse_search_file
from evomerge.search.setup import MeasureInfo
from evomerge.store import CandidateRow, ItemTexts, Store

# What may differ when a search is resumed: when it ends, where it runs, and what is confirmed. All else would make the
# candidates before and after two different searches.
RESUMABLE = (
    "budget",
    "confirm",
    "pool",
    "cluster",
    "attempts",
    "attempt_hours",
    "store",
    "observers",
    "answers",
    "artifacts",
)
FIXED = ("cluster.cpus_per_worker",)  # another number of threads rounds otherwise

_URL = re.compile(r"[a-z0-9+]{2,}:/")  # as it is left of s3://bucket in a path, where two slashes are one

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


def create_search(folder: Path, prepared: Prepared) -> Store:
    """Make the folder of a new search with its store and a complete copy of its search file.

    Raises:
        InputError: the folder exists already.
    """
    refuse_existing(folder)
    settings = prepared.file.model_dump(mode="json")
    place = store_place(folder, prepared.file.store)
    if isinstance(place, str):
        settings["store"] = public_url(place)  # the environment may name another one when the search is looked at
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / FILE_NAME).write_text(_as_yaml(settings), encoding="utf-8")
        Store.create(
            partial / STORE_NAME if isinstance(place, Path) else place,
            name=prepared.file.name,
            settings=settings,
            fingerprints=fingerprints(prepared),
            environment=environment(),
            items=_item_texts(prepared),
        ).close()
        partial.rename(folder)
    except OSError as error:
        raise _cannot_be_made(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(folder)


def refuse_existing(folder: Path) -> None:
    """Refuse to start a search in a folder that is there already, or that cannot be made."""
    if _URL.match(str(folder)):
        mend = "Name a local folder, and have it copied there: --set artifacts=s3://bucket/prefix"
        raise InputError("--dir", "is a URL, and a search lives on a disk", mend)
    try:
        there = folder.exists()
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise _cannot_be_made(folder, error) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(str(folder), f"cannot be made: {above} is no folder to write in", "Name another with --dir.")
    if there:
        go_on = f"Go on with it (evomerge resume {folder}), or name" if is_search(folder) else "Name"
        raise InputError(str(folder), "exists already", f"{go_on} another folder with --dir.")


def _cannot_be_made(folder: Path, error: OSError) -> InputError:
    return InputError(str(folder), f"cannot be made ({error.strerror})", "Name another folder with --dir.")


def resumed_file(folder: Path, store: Store, overrides: Sequence[str]) -> SearchFile:
    """The search file to go on with: the folder's copy with overrides, if it differs only where it may.

    Raises:
        InputError: it differs elsewhere; the difference is in the message. Or its budget is less than what is spent.
    """
    # Parsed again, because a program that was older than one of the keys wrote nothing for it.
    recorded = parse_search_file(store.search().settings, place=FILE_NAME, root=folder.resolve())
    before = recorded.model_dump(mode="json")
    path = folder / FILE_NAME
    edited = load_search_file(path).model_dump(mode="json") if path.is_file() else dict(before)
    for override in overrides:
        apply_override(edited, override)
    file = parse_search_file(edited, place=FILE_NAME, root=folder.resolve())
    check_budget(file.budget, store)
    differences = list(_differences(before, file.model_dump(mode="json"), ""))
    forbidden = [line for key, line in differences if key.split(".")[0] not in RESUMABLE or key in FIXED]
    if forbidden:
        raise InputError(
            f"{folder}/{FILE_NAME}",
            "differs from the search that was started: " + "; ".join(forbidden),
            f"Only {', '.join(RESUMABLE)} can change on resume; start a new search for anything else.",
        )
    return file


def record_resumed(folder: Path, store: Store, file: SearchFile) -> None:
    """Write down the settings that a search goes on with."""
    settings = file.model_dump(mode="json")
    if settings == store.search().settings:
        return
    store.update_settings(settings)
    partial = folder / f".{FILE_NAME}.partial"
    partial.write_text(_as_yaml(settings), encoding="utf-8")
    partial.rename(folder / FILE_NAME)


def check_unchanged(store: Store, prepared: Prepared) -> None:
    """Refuse to go on when a source or an evaluator is not what it was when the search began."""
    recorded = store.search().fingerprints
    for name, source in prepared.sources.items():
        check_fingerprints(source, recorded["sources"][name])
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


def fingerprints(prepared: Prepared) -> dict[str, Any]:
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


def make_pool(prepared: Prepared, folder: Path) -> Pool:
    """The pool that the search file names; Ray is only imported when it is wanted.

    Statistics of the sources are kept in the search's folder: its fingerprints hold the sources to what they were.
    """
    kept = folder.absolute() / STATISTICS_NAME
    if prepared.file.pool == "ray":
        from evomerge.search.pools.ray import RayPool

        return RayPool(prepared.file, kept)

    from evomerge.search.worker import Worker

    return InProcessPool(lambda: Worker.of("in-process", prepared, kept), prepared.file.together)


def environment() -> dict[str, str]:
    """The versions of what decides a search's numbers."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _as_yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key path, what changed there) for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            path = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), after.get(name), path)
    elif before != after:
        yield key, f"{key}: {before!r} -> {after!r}"
