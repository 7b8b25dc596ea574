"""The model card of an exported merge, and its lineage: its sources, its scores, and how to reproduce it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evomerge import __version__
from evomerge.checkpoints.fingerprints import named_files
from evomerge.checkpoints.source import Source
from evomerge.mergekit import dump_recipe
from evomerge.recipes.base import Recipe
from evomerge.recipes.state_dict import StateDictRecipe
from evomerge.report import serving
from evomerge.report.conclusions import is_front, roles_of
from evomerge.report.curse import Curse, curse_text
from evomerge.report.curse_picture import curse_svg
from evomerge.report.entries import Entry, interval_text, percent
from evomerge.report.licences import CARD, UNKNOWN, licence_of, most_restrictive
from evomerge.report.path import is_plain, path_svg, path_text
from evomerge.report.public_names import hub_ids, is_public, movable, public_name, without_places
from evomerge.report.screen import cell, cells, choice_text, constraint_titles, further_titles, p_text, screen_text
from evomerge.report.search_status import SearchStatus
from evomerge.report.team import Team, team_section
from evomerge.report.unmerged import unmerged_source
from evomerge.search.driving.candidates import START
from evomerge.store import CandidateRow, SearchRow
from evomerge.store.rows import Estimate, candidate_id

_PLAIN_FOLDERS = ("stack", "staged", "mixture")
"""Kinds of recipes whose folders every engine and converter can read."""

_PICTURE, _CURSE_PICTURE = "path.svg", "curse.svg"


@dataclass(frozen=True)
class Provenance:
    """The search that a candidate comes from.

    Attributes:
        curse: the winner's curse; None if its scores were not read.
        unconfirmed: the basis of the scores of a candidate that was never scored on held-out items.
        team: the team as a member of which it is exported.
    """

    search: SearchRow
    status: SearchStatus
    row: CandidateRow
    curse: Curse | None = None
    unconfirmed: str = ""
    team: Team | None = None


def papers(
    title: str,
    recipe: Recipe,
    sources: Mapping[str, Source],
    provenance: Provenance | None,
    *,
    stays: bool = True,
    unlike: str = "",
) -> dict[str, str]:
    """The texts and pictures that accompany an exported model, by file name.

    Its path is drawn unless it is simply all layers in order, and the winner's curse if candidates were confirmed.

    Args:
        stays: whether the model stays on this machine, so that its recipe can contain the paths of source folders.
        unlike: how the model differs from the scored one, if it does.
    """
    texts = {
        "recipe.yaml": dump_recipe(movable(recipe, stays=stays)),
        "lineage.json": lineage(recipe, sources, provenance),
        CARD: card(title, recipe, sources, provenance, unlike),
    }
    depths = _depths(sources)
    if not is_plain(recipe, depths):
        texts[_PICTURE] = path_svg(recipe, depths, title)
    if provenance is not None and (curse := _drawn(provenance)):
        texts[_CURSE_PICTURE] = curse_svg(curse)
    return texts


def _drawn(provenance: Provenance) -> Curse | None:
    """The winner's curse, if there is anything to draw."""
    return provenance.curse if provenance.curse is not None and provenance.curse.candidates else None


def _depths(sources: Mapping[str, Source]) -> dict[str, int]:
    return {name: source.layers for name, source in sources.items()}


def verification(checked: Sequence[str], unlike: str = "", *, runs: bool = True) -> str:
    """The last section of an export's card: how it was verified, or that it was not.

    Args:
        unlike: as in ``papers``.
        runs: whether it is a transformers model, not a table of tensors.
    """
    if not checked:
        return "\n## Verification\n\n**Not verified**: it was exported without being scored again.\n"
    lines = "\n".join(f"- {line}" for line in checked)
    if unlike:
        return f"\n## Its own scores\n\nThis folder was loaded and scored on the items of its candidate.\n\n{lines}\n"
    how = "loaded with plain transformers and scored" if runs else "scored"
    return f"\n## Verification\n\nThis folder was {how} again.\n\n{lines}\n"


def lineage(recipe: Recipe, sources: Mapping[str, Source], provenance: Provenance | None) -> str:
    """``lineage.json``: the sources with their files, the recipe's hash, and the search.

    Files have the SHA-256 that the search recorded. A merge without a search only gives their sizes in bytes, because
    hashing would take longer than merging.
    """
    known = provenance.search.record.files if provenance else {}
    content: dict[str, Any] = {
        "recipe_hash": recipe.hash,
        "made_with": {"evomerge": __version__},
        "sources": {
            name: {
                "reference": public_name(sources[name]),
                "licence": licence_of(sources[name].folder),
                "files": {file: fingerprint["sha256"] for file, fingerprint in known[name].items()}
                if known
                else {file: path.stat().st_size for file, path in named_files(sources[name]).items()},
            }
            for name in sorted(recipe.used_sources() | {recipe.tokenizer})
        },
    }
    if provenance is not None:
        search, row = provenance.search, provenance.row
        content["made_with"] = search.environment
        content["search"] = {
            "name": search.name,
            "seed": search.settings["seed"],
            "space": search.settings["space"],
            "optimizer": search.settings["optimizer"],
            "objectives": without_places(search.settings["objectives"]),
            "constraints": without_places(search.settings.get("constraints", {})),
            "evaluators": search.fingerprints["evaluators"],
            "candidates": provenance.status.candidates.asked,
            "candidate": row.id,
            "origin": row.label if row.origin == START else row.origin,
            "step": row.step,
            "change": row.change,
        }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def card(
    title: str, recipe: Recipe, sources: Mapping[str, Source], provenance: Provenance | None, unlike: str = ""
) -> str:
    """The ``README.md`` of the exported folder."""
    used = sorted(recipe.used_sources() | {recipe.tokenizer})
    alone = unmerged_source(recipe, _depths(sources))
    licences = {name: licence_of(sources[name].folder) for name in used}
    front: dict[str, Any] = {
        **({} if recipe.kind == StateDictRecipe.kind else {"library_name": "transformers"}),
        "license": most_restrictive(licences.values()),
        "base_model": list(dict.fromkeys(id_ for name in used for id_ in hub_ids(sources[name]))),
        "tags": ["evomerge"] if alone else ["merge", "evomerge"],
    }
    if not front["base_model"]:
        del front["base_model"]
    if (
        not unlike
        and provenance is not None
        and (values := provenance.status.confirmed_values(candidate_id(provenance.row.number)))
    ):
        metrics = {o.name: o.metric for o in provenance.search.record.objectives}
        front["model-index"] = [{"name": title, "results": [_result(n, metrics[n], v) for n, v in values.items()]}]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"The source `{alone}`, unmerged: a copy of it in the format that Evomerge writes."
        if alone
        else f"A merge of {_merged(recipe)}, made by Evomerge without training.",
        *([f"**{unlike}**"] if unlike else []),
        _sources_section(sources, licences),
        _recipe_section(recipe),
    ]
    if not is_plain(recipe, _depths(sources)):
        parts.append(_path_section(recipe, _depths(sources)))
    if provenance is not None:
        parts += [_scores_section(provenance), _choice_section(provenance)]
        if provenance.team is not None:
            parts.append(team_section(provenance.team, provenance.row.number))
        parts.append(_limits_section(provenance))
    if recipe.kind in _PLAIN_FOLDERS:
        parts.append(serving.section(title, sources[recipe.tokenizer].config))
    parts.append(_again_section(provenance, are_public=all(map(is_public, sources.values()))))
    return "\n\n".join(parts) + "\n"


def _merged(recipe: Recipe) -> str:
    """The models that a recipe mixes, which do not include the base that changes are relative to."""
    mixed = recipe.mixed_sources()
    what = "table" if recipe.kind == StateDictRecipe.kind else "language model"
    bases = sorted(recipe.used_sources() - mixed)
    models = f"one {what}" if len(mixed) == 1 else f"{len(mixed)} {what}s"
    return (
        f"{models} on {' and '.join(f'`{name}`' for name in bases)}, {'its' if len(mixed) == 1 else 'their'} base"
        if bases
        else models
    )


def _sources_section(sources: Mapping[str, Source], licences: Mapping[str, str]) -> str:
    rows = [f"| {name} | `{public_name(sources[name])}` | {licence} |" for name, licence in licences.items()]
    text = "## Sources\n\n| name | model | licence |\n| --- | --- | --- |\n" + "\n".join(rows)
    if UNKNOWN in licences.values():
        text += "\n\nA source without a stated licence: read its terms before you share this model."
    return text


def _recipe_section(recipe: Recipe) -> str:
    shown = "\n".join(f"- {line}" for line in recipe.lines())
    return f"## Recipe\n\nThe whole recipe is in `recipe.yaml` (hash `{recipe.hash}`).\n\n{shown}"


def _path_section(recipe: Recipe, depths: Mapping[str, int]) -> str:
    lines = "\n".join(path_text(recipe, depths))
    return f"## Path\n\nWhat a token passes through:\n\n```\n{lines}\n```\n\n![The path]({_PICTURE})"


def _scores_section(provenance: Provenance) -> str:
    status, row = provenance.status, provenance.row
    ours = _score_table(status.entry(row, provenance.search.record), status)
    text = "## Scores\n\nMean ± standard error. The search chose by its own split; the held-out split was read only to "
    text += f"confirm.\n\n{ours}"
    if row.change is not None:
        text += f"\n\nIts change from the base, norm(W - W0) / norm(W0) over all weights, is {percent(row.change)}."
    gaps = [
        f"| {name} | {gap.to} | {gap.mean:+.3f} | {interval_text(gap.low, gap.high)} | {p_text(gap.p)} |"
        for confirmed in status.confirmed
        if confirmed.id == row.id
        for name in status.numbers
        for gap in confirmed.gaps(name)
    ]
    if gaps:
        text += "\n\nPaired differences on the held-out split; positive is better. "
        text += f"{choice_text(status)[0]} So are the two-sided p.\n\n"
        text += "| objective | against | difference | interval | p |\n| --- | --- | --- | --- | --- |\n" + "\n".join(
            gaps
        )
    return text


def _score_table(ours: Entry, status: SearchStatus) -> str:
    titles = ["model", "split", *status.numbers, *further_titles(status), "n"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]

    def add(name: str, shown: Entry, split: str) -> None:
        values = (shown.value(name) for name in status.measures)
        items = ", ".join("-" if value is None else str(value.n) for value in values)
        texts = [*cells(shown, status, whole=split == "held out"), items]
        lines.append(f"| {name} | {split} | {' | '.join(text or 'not scored' for text in texts)} |")

    add("this model", ours, "search")
    if (confirmed := status.confirmed_entry(ours.id)) is not None:
        add("this model", confirmed, "held out")
    for baseline in status.confirmed_baselines:
        add(baseline.label, baseline, "held out")
    return "\n".join(lines)


def _choice_section(provenance: Provenance) -> str:
    """How many candidates there were, how the winner was chosen, and how much the choice added to its score."""
    choice, row = provenance.status.choice, provenance.row
    parts = [" ".join([_counted(provenance), *_started(provenance.search), *_thrift(provenance.status)])]
    if provenance.status.unscored:
        parts += [" ".join(baseline.text for baseline in provenance.status.unscored)]
    if constrained := _constrained(provenance):
        parts += [constrained]
    if choice is not None:
        frozen = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(choice.frozen_at))
        top = provenance.search.record.confirm.top
        shortlist = (
            f"A shortlist of {choice.shortlist} was written down at {frozen}, before any of its held-out items was "
            f"scored: the front, and the best {top} {_by(provenance.status)}."
        )
        if choice.drawn:
            shortlist += f" {choice.drawn} more were scored there for the picture alone; they could not win."
        parts += [" ".join([shortlist, *choice_text(provenance.status)[1:]])]
        parts += _picked(provenance)
    curse = _drawn(provenance)
    sentences = _fall_of(row, provenance.status, curse)
    if curse is not None:
        sentences += [line for one in curse.all for line in curse_text(one)]
        parts += [" ".join(sentences), f"![Search and held-out scores]({_CURSE_PICTURE})"]
    elif sentences:
        parts += [" ".join(sentences)]
    return "## How it was chosen\n\n" + "\n\n".join(parts)


def _by(status: SearchStatus) -> str:
    """What makes candidates the best, in words."""
    if is_front(status):
        return "compromises between all objectives"
    name = next(iter(status.numbers))
    return f"by {name}" if status.scalar is None else f"by the {name} of all objectives"


def _picked(provenance: Provenance) -> list[str]:
    """What this model was chosen for, or that a person picked it."""
    status, name = provenance.status, candidate_id(provenance.row.number)
    if roles := roles_of(status, name, "held_out"):
        return [f"This model is {name}: {', '.join(roles)} on held-out items."] if is_front(status) else []
    if status.choice is None or not status.choice.made:
        return []
    named = "not the winner" if status.winner is not None else "none of those that the confirmation names"
    return [f"**This model is {name}, and {named}: somebody picked it.**"]


def _counted(provenance: Provenance) -> str:
    """The number of candidates, their outcomes, and the number of scored items."""
    status, counts, items = provenance.status, provenance.status.candidates, _items_each(provenance.search)
    rest = f"{counts.cached} had the recipe of one of these, and {counts.failed} failed."
    asked = f"The search asked for {counts.asked} candidates: {counts.done} were scored,"
    if status.racing is None and status.screen is None:
        return f"{asked} each on {items:,} items of the search split ({counts.done * items:,} in all), {rest}"
    return (
        f"{asked} on up to {items:,} items of the search split each, {counts.eliminated} were eliminated as too poor "
        f"before that, {rest} That took {status.items:,} scores of items in all."
    )


def _started(search: SearchRow) -> list[str]:
    """What the search took from earlier searches."""
    if not (start := search.record.start):
        return []
    return [f"It began with {len(start)} candidates of earlier searches ({'; '.join(point.label for point in start)})."]


def _thrift(status: SearchStatus) -> list[str]:
    """Sentences about what saved items."""
    sentences = []
    if status.racing is not None:
        rungs = ", ".join(str(rung) for rung in status.racing.rungs)
        by = "item response" if status.racing.estimate == "item_response" else "the best baseline's scores"
        sentences.append(
            f"Candidates were raced: scored on {rungs} items first, and on more only where they might lead "
            f"(confidence {status.racing.confidence:g} in each comparison); the rest was estimated by {by}."
        )
    if status.screen is not None:
        sentences.append(
            f"All were screened by {status.screen.items} items first; in the end {screen_text(status.screen)}."
        )
    return sentences


def _constrained(provenance: Provenance) -> str:
    """The constraints, and whether this model satisfies them on items that the search never saw."""
    status, constraints = provenance.status, provenance.status.constraints
    if not constraints:
        return ""
    confirmed = status.confirmed_entry(candidate_id(provenance.row.number))
    if confirmed is None:
        return f"Candidates had to keep {', '.join(constraint_titles(status))}."
    outcomes = []
    for name, limit in constraints.items():
        value = confirmed.constraints[name]
        kept = "kept" if limit.is_kept(value) else "**missed**"
        outcomes.append(f"{name} {limit.text} is {kept} with {cell(value)}")
    return f"Candidates had to keep constraints. On held-out items of this model {'; '.join(outcomes)}."


def _items_each(search: SearchRow) -> int:
    """The maximum number of search items per candidate, over all evaluators except the screen's."""
    most: dict[int, int] = {}
    for measure in search.record.measures:
        most[measure.evaluator] = max(measure.items, most.get(measure.evaluator, 0))
    return sum(most.values())


def _fall_of(row: CandidateRow, status: SearchStatus, curse: Curse | None) -> list[str]:
    """This model's scores on search and held-out items, in the number that decides and in each objective."""
    values = {name: (row.objectives[name], value) for name, value in status.confirmed_values(row.id).items()}
    if status.scalar is not None and curse is not None:
        point = next((point for point in curse.points if point.id == row.id), None)
        values = values if point is None else {curse.objective: (point.search, point.held_out), **values}
    changes = []
    for name, (before, after) in values.items():
        change = after.mean - before.mean
        known = (
            "" if after.stderr is None or before.stderr is None else f" ± {math.hypot(after.stderr, before.stderr):.3f}"
        )
        changes.append(f"{name} {before.mean:.3f} became {after.mean:.3f} ({change:+.3f}{known})")
    return [f"From search to held-out items, this model's {'; '.join(changes)}."] if changes else []


def _limits_section(provenance: Provenance) -> str:
    status = provenance.status
    names = ", ".join(status.directions)
    by = "score" if status.scalar is None else status.scalar.name
    text = (
        f"## Limits\n\nIt was chosen among {status.candidates.asked} candidates by its {by} on the search split of "
        f"{names}; that score is therefore too good, and only the held-out one counts. "
    )
    if provenance.unconfirmed:
        text += f"**This candidate was not confirmed:** {provenance.unconfirmed} "
    return text + (
        "Nothing else was measured: abilities outside these tasks may have suffered, and the faults of every source "
        "may be in it."
    )


def _again_section(provenance: Provenance | None, *, are_public: bool) -> str:
    text = "## Make it again\n\n```\nevomerge merge recipe.yaml OUT\n```"
    if not are_public:
        text += "\n\n`recipe.yaml` names folders of the machine where this was made; elsewhere, name yours in it."
    if provenance is not None:
        made = ", ".join(f"{name} {version}" for name, version in provenance.search.environment.items())
        text += f"\n\nMade with {made}."
    return text


def _result(name: str, metric: str, value: Estimate) -> dict[str, Any]:
    error = "" if value.stderr is None else f" (± {value.stderr:.3f})"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{name} (held-out split, {value.n} items)", "type": name},
        "metrics": [{"type": metric, "name": f"{metric}{error}", "value": round(value.mean, 4)}],
    }
