"""The command extract, and candidates as adapters: the difference of a model from a base as a LoRA."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target, existing_parent
from evomerge.commands.waiting import opening, progress_bar
from evomerge.errors import InputError
from evomerge.objects import is_url
from evomerge.plugins import unknown_name

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Source
    from evomerge.extraction.adapter import Extraction
    from evomerge.extraction.held import Extracting, Loss
    from evomerge.search.settings.search_file import SearchFile

FULL = "full"
_RANK = 32


@dataclass(frozen=True)
class ExtractOptions:
    """The options of the command line for an adapter, unchecked.

    Attributes:
        rank: a number, ``full``, or None for the default.
        energy: the share of the energy of each change to keep, or None.
        embeddings, preset: see ``Extracting``.
    """

    rank: str | None = None
    energy: float | None = None
    embeddings: str = "full"
    preset: str = "peft"

    def read(self) -> Extracting:
        """The checked options.

        Raises:
            InputError: a value is not valid.
        """
        from evomerge.extraction.factors import RankRule
        from evomerge.extraction.held import EmbeddingForm, Extracting, Preset, check_vllm_rank

        for option, given, known in (
            ("--embeddings", self.embeddings, get_args(EmbeddingForm)), ("--preset", self.preset, get_args(Preset)),
        ):  # fmt: skip
            if given not in known:
                raise unknown_name(given, known, option, "way to hold them" if option == "--embeddings" else "preset")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise InputError("--energy", f"is {self.energy:g}; it is a share, above 0 and at most 1")
        rule = RankRule(_most(self.rank, has_energy=self.energy is not None), self.energy)
        if self.preset == "vllm" and self.energy is None and rule.most is not None:
            check_vllm_rank(rule.most)
        embeddings: EmbeddingForm = self.embeddings  # type: ignore[assignment]  # it was just checked
        preset: Preset = self.preset  # type: ignore[assignment]
        return Extracting(rule, embeddings, preset)


def _most(rank: str | None, *, has_energy: bool) -> int | None:
    if rank is None:
        return None if has_energy else _RANK
    if rank == FULL:
        return None
    if not rank.isdecimal() or int(rank) < 1:
        raise InputError("--rank", f"is {rank!r}; it is a whole number above 0, or {FULL}")
    return int(rank)


def extract(
    model: str, base: str, out: Path, wanted: ExtractOptions, verify: Path | None = None, ranks: Sequence[str] = ()
) -> None:
    """Write the difference of a model from its base as an adapter.

    Args:
        verify: a search file, on whose items the adapter and the model are scored.
        ranks: further ranks to compare on these items.
    """
    check_target(out)
    for place, reference in (("MODEL", model), ("--base", base)):
        check_reference(reference, place)
    if ranks and verify is None:
        raise InputError(
            "--compare-ranks", "needs items to score other ranks on", "Say on which items: `--verify SEARCH.yaml`."
        )
    how, others = wanted.read(), [replace(wanted, rank=rank, energy=None).read() for rank in ranks]
    file = None if verify is None else _search_file_at(verify)
    with opening():
        from evomerge.checkpoints.source import open_source
        from evomerge.extraction.adapter import check_pair

        tuned, origin = open_source("model", model, place="MODEL"), open_source("base", base, place="--base")
        check_pair(tuned, origin)
    write_adapter(tuned, origin, out, how, file, others)


def _search_file_at(path: Path) -> SearchFile:
    from evomerge.search.settings.search_file import load_search_file  # takes half a second

    return load_search_file(path)


def export_adapter(
    folder: Path, out: str, candidate: str, wanted: ExtractOptions, *, verify: bool, form: str | None = None
) -> None:
    """Write the difference of a candidate from the search's base as an adapter.

    The candidate is exported and verified as usual in a temporary folder, and scored again as the adapter is.
    """
    if is_url(out) or form is not None:
        raise InputError("--as-adapter", "writes a local folder of one form", "Leave --as out, and name a folder.")
    from evomerge.search.settings.folder import open_store
    from evomerge.search.settings.resuming import resumed_file

    check_target(Path(out))
    how = wanted.read()
    with open_store(folder) as store:
        file = resumed_file(folder, store, ())
    if file.base is None:
        hint = "Export the model, and name its base: `evomerge extract MODEL --base BASE OUT`."
        raise InputError("--as-adapter", "the search names no base to take candidates' differences from", hint)
    from evomerge.checkpoints.source import open_source
    from evomerge.commands.models import export

    base = open_source("base", file.sources[file.base], place=f"sources.{file.base}")
    parent = existing_parent(Path(out))
    with tempfile.TemporaryDirectory(prefix=".evomerge-", dir=parent) as above:
        whole = Path(above) / "model"
        export(folder, whole, candidate, verify=verify, said="a temporary folder, to take the adapter out of it")
        model = open_source("model", str(whole), place=candidate)
        write_adapter(model, base, Path(out), how, file if verify else None)


def write_adapter(
    model: Source, base: Source, out: Path, how: Extracting, file: SearchFile | None, others: Sequence[Extracting] = ()
) -> None:
    """Write the adapter's folder, print what was lost, and score it on the items of a search file.

    Args:
        others: further adapters, which are only scored.
    """
    from evomerge.extraction.adapter import extract as make
    from evomerge.report.adapter import card
    from evomerge.report.consoles import make_console

    console = make_console()
    with progress_bar(console, "decomposing the difference") as update:
        made = make(model, base, out, how, texts=lambda made: card(out.name, model, base, made), progress=update)
    console.print(_table(made.losses))
    what = f"rank {made.rank}, {made.size / 1e6:,.1f} MB, {made.lost:.2%} of the change's energy lost"
    console.print(f"extracted into {out}: {what}", style="bold")
    if how.embeddings == FULL and made.tables > made.size / 2:
        less = "--embeddings tokens keeps only changed rows, none leaves them as in the base"
        console.print(f"{made.tables / 1e6:,.1f} MB of it are embeddings in full, a tied one in both places: {less}")
    if how.preset == "vllm":
        _say_vllm(console, base, out, made)
    if file is not None:
        _compare(console, model, base, [(out, made)], others, file)


def _say_vllm(console: Console, base: Source, out: Path, made: Extraction) -> None:
    from evomerge.extraction.held import VLLM_RANKS

    most = next(rank for rank in VLLM_RANKS if rank >= made.largest)
    command = f"vllm serve {base.reference} --enable-lora --max-lora-rank {most} --lora-modules {out.name}={out}"
    console.print(command, soft_wrap=True)


def _table(losses: Sequence[Loss]) -> Table:
    """The loss by kind of tensor; single tensors are in the folder's extraction.json."""
    kinds: dict[str, list[Loss]] = defaultdict(list)
    for loss in losses:
        kinds[".".join(part for part in loss.tensor.split(".") if not part.isdecimal())].append(loss)
    table = Table(box=None, pad_edge=False)
    for title in ("tensors", "held as", "energy lost", "most of one"):
        table.add_column(title)
    for kind, of_kind in kinds.items():
        energy = sum(loss.energy for loss in of_kind)
        if energy == 0.0:
            continue
        worst = max(of_kind, key=lambda loss: loss.share)
        share = sum(loss.lost for loss in of_kind) / energy
        held = list(dict.fromkeys(loss.form for loss in of_kind if loss.energy))
        text = held[0] if len(held) == 1 else f"{held[0]} and {len(held) - 1} others"
        table.add_row(kind, text, f"{share:.2%}", f"{worst.share:.2%} {worst.tensor}" if worst.lost else "")
    return table


def _compare(
    console: Console, model: Source, base: Source, made: list[tuple[Path, Extraction]], others: Sequence[Extracting],
    file: SearchFile,
) -> None:  # fmt: skip
    """Score the model, its adapter and adapters of other ranks on the search's items, and print the table."""
    from evomerge.checkpoints.plain import plain_model
    from evomerge.checkpoints.source import open_source
    from evomerge.commands.rescoring import gaps, item_scores
    from evomerge.extraction.adapter import extract as make
    from evomerge.report.screen import cell
    from evomerge.search.preparing.prepare import prepare
    from evomerge.search.workers.building import computing

    with opening():
        prepared = prepare(file, tries=True)
        device, dtype = computing(file)
    measures = tuple(prepared.setup.measures)
    table = Table(box=None, pad_edge=False)
    for title in ("adapter", "MB", "energy lost", "objective", "score", "difference from the model"):
        table.add_column(title, no_wrap=True)
    theirs = item_scores(plain_model(model, device, dtype), prepared, "search")
    with tempfile.TemporaryDirectory(prefix="evomerge-") as above:
        for number, how in enumerate(others):
            folder = Path(above) / str(number)
            made.append((folder, make(model, base, folder, how)))
        for folder, one in sorted(made, key=lambda pair: pair[1].size):
            adapted = open_source("adapter", f"{base.reference}+{folder}", place=str(folder))
            ours = item_scores(plain_model(adapted, device, dtype), prepared, "search")
            first = (f"rank {one.rank}", f"{one.size / 1e6:,.1f}", f"{one.lost:.2%}")
            for number, (measure, gap) in enumerate(zip(measures, gaps(measures, ours, theirs, "search"), strict=True)):
                table.add_row(*(("", "", "") if number else first), measure.name, cell(gap.own), gap.text)
    console.print(table)
    console.print("on the search's items; differences are paired item by item, with intervals of 95%", style="dim")
