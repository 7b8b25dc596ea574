"""The model card of an exported merge, and its lineage: what it was made of, how it scored, how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge import __version__
from evomerge.checkpoints.fingerprints import named_files
from evomerge.checkpoints.source import Source
from evomerge.mergekit import dump_recipe
from evomerge.recipe import Blend, Recipe
from evomerge.report.licences import UNKNOWN, licence_of, most_restrictive
from evomerge.report.path import is_plain, path_svg, path_text
from evomerge.report.screen import cell
from evomerge.report.status import SearchStatus, Value, candidate_id
from evomerge.store import CandidateRow, SearchRow

_PICTURE = "path.svg"


@dataclass(frozen=True)
class Provenance:
    """The search that a candidate comes from."""

    search: SearchRow
    status: SearchStatus
    row: CandidateRow


def papers(title: str, recipe: Recipe, sources: Mapping[str, Source], provenance: Provenance | None) -> dict[str, str]:
    """The texts that go with an exported model, by file name; a picture too where its path is more than its layers."""
    found = {
        "recipe.yaml": dump_recipe(recipe),
        "lineage.json": lineage(recipe, sources, provenance),
        "README.md": card(title, recipe, sources, provenance),
    }
    depths = _depths(sources)
    return found if is_plain(recipe, depths) else found | {_PICTURE: path_svg(recipe, depths, title)}


def _depths(sources: Mapping[str, Source]) -> dict[str, int]:
    return {name: source.layers for name, source in sources.items()}


def lineage(recipe: Recipe, sources: Mapping[str, Source], provenance: Provenance | None) -> str:
    """``lineage.json``: sources with their files, the recipe's hash, and the search.

    Files have the SHA-256 that the search recorded. A merge without a search gives their sizes in bytes alone: hashing
    would take longer than merging.
    """
    known = provenance.search.fingerprints["sources"] if provenance else {}
    content: dict[str, Any] = {
        "recipe_hash": recipe.hash,
        "made_with": {"evomerge": __version__},
        "sources": {
            name: {
                "reference": sources[name].reference,
                "licence": licence_of(sources[name].folder),
                "files": {file: found["sha256"] for file, found in known[name].items()}
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
            "objectives": search.settings["objectives"],
            "evaluators": search.fingerprints["evaluators"],
            "candidates": provenance.status.candidates.asked,
            "candidate": candidate_id(row.number),
            "origin": row.origin,
            "step": row.step,
        }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def card(title: str, recipe: Recipe, sources: Mapping[str, Source], provenance: Provenance | None) -> str:
    """``README.md`` of the exported folder."""
    used = sorted(recipe.used_sources() | {recipe.tokenizer})
    licences = {name: licence_of(sources[name].folder) for name in used}
    front: dict[str, Any] = {
        "library_name": "transformers",
        "license": most_restrictive(licences.values()),
        # The hub knows models by their ids; of a folder only the name means something to others.
        "base_model": [Path(r).name if Path(r).is_absolute() else r for r in (sources[n].reference for n in used)],
        "tags": ["merge", "evomerge"],
    }
    if provenance is not None and (values := provenance.status.confirmed_values(candidate_id(provenance.row.number))):
        metrics = {o["name"]: o["metric"] for o in provenance.search.fingerprints["objectives"]}
        front["model-index"] = [{"name": title, "results": [_result(n, metrics[n], v) for n, v in values.items()]}]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"A merge of {len(used)} language models, made by Evomerge without training.",
        _sources_section(sources, licences),
        _recipe_section(recipe),
    ]
    if not is_plain(recipe, _depths(sources)):
        parts.append(_path_section(recipe, _depths(sources)))
    if provenance is not None:
        parts += [_scores_section(provenance), _limits_section(provenance)]
    parts.append(_again_section(provenance))
    return "\n\n".join(parts) + "\n"


def _sources_section(sources: Mapping[str, Source], licences: Mapping[str, str]) -> str:
    rows = [f"| {name} | `{sources[name].reference}` | {licence} |" for name, licence in licences.items()]
    text = "## Sources\n\n| name | model | licence |\n| --- | --- | --- |\n" + "\n".join(rows)
    if UNKNOWN in licences.values():
        text += "\n\nA source without a stated licence: read its terms before you share this model."
    return text


def _recipe_section(recipe: Recipe) -> str:
    shown = "\n".join(f"- {_parts(recipe, number)}: {_words(blend)}" for number, blend in enumerate(recipe.blends))
    return f"## Recipe\n\nThe whole recipe is in `recipe.yaml` (hash `{recipe.hash}`).\n\n{shown}"


def _path_section(recipe: Recipe, depths: Mapping[str, int]) -> str:
    lines = "\n".join(path_text(recipe, depths))
    return f"## Path\n\nWhat a token passes through:\n\n```\n{lines}\n```\n\n![The path]({_PICTURE})"


def _parts(recipe: Recipe, number: int) -> str:
    """Which parts of the model a blend makes, in few words."""
    if len(recipe.blends) == 1:
        return "the whole model"
    names = [name for name in ("embedding", "norm", "head") if getattr(recipe, name) == number]
    for kind in ("attention", "mlp", "norm"):
        hops = [str(i) for i, hop in enumerate(recipe.hops) if getattr(hop, kind) == number]
        if hops:
            names.append(f"{kind} of layers {', '.join(hops)}")
    apart = [name for name, index in recipe.tensors.items() if index == number]
    if apart:
        names.append(", ".join(apart[:3]) + (f" and {len(apart) - 3} more tensors" if len(apart) > 3 else ""))
    return "; ".join(names)


def _words(blend: Blend) -> str:
    numbers = []
    for name, value in blend.parameters.items():
        if isinstance(value, dict):
            numbers.append(f"{name} " + ", ".join(f"{source} {number:.4g}" for source, number in value.items()))
        elif isinstance(value, bool):
            numbers += [name] if value else []
        else:
            numbers.append(f"{name} {value:.4g}")
    onto = f" on {blend.base}" if blend.base else ""
    return f"{blend.method} of {', '.join(blend.sources)}{onto}; {'; '.join(numbers)}"


def _scores_section(provenance: Provenance) -> str:
    status, row = provenance.status, provenance.row
    ours = _score_table(row, status)
    text = "## Scores\n\nMean ± standard error. The search chose by its own split; the held-out split was read only to "
    text += f"confirm.\n\n{ours}"
    gaps = [
        f"| {name} | {gap.to} | {gap.mean:+.3f} | [{gap.low:+.3f}, {gap.high:+.3f}] |"
        for found in status.confirmed
        if found.id == candidate_id(row.number)
        for name, value in found.objectives.items()
        for gap in value.difference
    ]
    if gaps:
        confidence = provenance.search.settings["confirm"]["confidence"]
        text += "\n\nPaired differences on the held-out split (positive is better), with "
        text += f"{confidence:.0%} confidence intervals:\n\n"
        text += "| objective | against | difference | interval |\n| --- | --- | --- | --- |\n" + "\n".join(gaps)
    return text


def _score_table(row: CandidateRow, status: SearchStatus) -> str:
    titles = ["model", "split", *status.directions, "n"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]

    def add(name: str, split: str, values: Mapping[str, Value]) -> None:
        cells = " | ".join(cell(values[o]) for o in status.directions)
        lines.append(f"| {name} | {split} | {cells} | {', '.join(str(v.n) for v in values.values())} |")

    add("this model", "search", {name: Value(**found) for name, found in row.objectives.items()})
    if confirmed := status.confirmed_values(candidate_id(row.number)):
        add("this model", "held out", confirmed)
    for baseline in status.confirmed_baselines:
        add(baseline.label, "held out", baseline.objectives)
    return "\n".join(lines)


def _limits_section(provenance: Provenance) -> str:
    status = provenance.status
    names = ", ".join(e["name"] for e in provenance.search.fingerprints["evaluators"])
    text = (
        f"## Limits\n\nIt was chosen among {status.candidates.asked} candidates by its score on the search split of "
        f"{names}; that score is therefore too good, and only the held-out one counts. "
    )
    if not status.confirmed_values(candidate_id(provenance.row.number)):
        text += "**This candidate was not scored on the held-out split.** "
    return text + (
        "Nothing else was measured: abilities outside these tasks may have suffered, and the faults of every source "
        "may be in it."
    )


def _again_section(provenance: Provenance | None) -> str:
    text = "## Make it again\n\n```\nevomerge merge recipe.yaml OUT\n```"
    if provenance is not None:
        made = ", ".join(f"{name} {found}" for name, found in provenance.search.environment.items())
        text += f"\n\nMade with {made}."
    return text


def _result(name: str, metric: str, value: Value) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{name} (held-out split, {value.n} items)", "type": name},
        "metrics": [{"type": metric, "name": f"{metric} (± {value.stderr:.3f})", "value": round(value.mean, 4)}],
    }
