"""The status of a search for people: as tables, as sentences, as one line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.report.conclusions import conclusions, is_front, roles_of
from evomerge.report.confirmed import Choice
from evomerge.report.entries import ConfirmedEntry, Entry, count_text, gap_text, percent, value_text
from evomerge.report.fitting import Column, FittedTable, named, terse, without
from evomerge.report.picks import best_source, gain_in
from evomerge.report.quadratics import quadratics_text
from evomerge.report.search_status import ScreenState, SearchStatus, Slow
from evomerge.search.driving.progress import Progress
from evomerge.search.estimation.preference import BEST, KNEE
from evomerge.search.work.jobs import PoolState
from evomerge.store.events import ItemErrors
from evomerge.store.rows import Estimate, candidate_id

_NAMED = 2
"""If more candidates than this are being scored at once, they are counted instead of named."""

_RESUMABLE = ("created", "interrupted", "paused", "stopped", "cancelled")
CHANGE = "change"
"""The title of the column with the distance of candidates from the base."""

_FRONT_ROWS = 8  # more would push the rest off a small terminal


Rows = Sequence[Sequence[str]]
AnyEntry = TypeVar("AnyEntry", bound=Entry)


def panel(
    status: SearchStatus, pool: PoolState | None = None, eta: float | None = None, *, rows: int | None = None
) -> RenderableType:
    """The complete status as tables, each with at most ``rows`` baselines and as many others."""
    parts: list[RenderableType] = [
        Text(headline(status, eta), style="bold"),
        Text(counts_line(status, pool)),
        *([] if status.cost is None else [Text(f"cost {_cost_left(status, eta)}")]),
        *(Text(text) for text in thrift_lines(status)),
        scores(status, rows),
    ]
    if not status.confirmed_baselines:
        parts += [Text(text) for text in conclusions(status)]
    if status.failures:
        causes = ", ".join(f"{count} {reason}" for reason, count in sorted(status.failures.items()))
        parts.append(Text(f"failures: {causes}", style="red"))
    parts += [Text(f"slow: {slow_text(slow)}", style="yellow") for slow in status.slow]
    if status.confirmed or status.confirmed_baselines:
        parts += [Text(""), confirmed_table(status, rows), *(Text(text) for text in conclusions(status))]
        parts += [Text(text, style="dim") for text in choice_text(status)]
    return Group(*parts)


def resume_lines(status: SearchStatus, *where: str) -> list[str]:
    """The command to resume a search, if it is neither running nor finished.

    Args:
        where: the arguments that name the search.
    """
    return [f"resume: evomerge resume {shlex.join(where)}"] if status.state in _RESUMABLE else []


def headline(status: SearchStatus, eta: float | None = None) -> str:
    """Name, space, optimizer, state and time in one line."""
    spent = duration(status.budget.hours_spent * 3600)
    ending = f"  {status.why}" if status.why and status.state != "running" else ""
    left = f"  ETA {duration(eta)}" if eta is not None and status.state in ("running", "confirming") else ""
    what = f"{status.space}, {status.parameters} parameter{'' if status.parameters == 1 else 's'}, {status.optimizer}"
    return f"{status.name}  ({what})  {status.state.upper()} {spent}{_confirmation(status)}{left}{ending}"


def _cost_left(status: SearchStatus, eta: float | None) -> str:
    """The cost so far and to come; ``eta`` is that of the process that drives the search."""
    assert status.cost is not None
    return (status.cost if eta is None else status.cost.with_left(eta)).text


def _confirmation(status: SearchStatus) -> str:
    """The time or the progress of the confirmation, shown after the time of the search itself."""
    effort = status.confirmation
    if effort is None:
        return ""
    total = f"{count_text(effort.models, 'model')} x {effort.items_each:,} held-out items"
    done = "" if effort.models_done >= effort.models else f"{effort.models_done} of "
    return f", confirmation {done}{total} {duration(effort.seconds)}"


def counts_line(status: SearchStatus, pool: PoolState | None = None) -> str:
    """Candidates by outcome, the time by phase, and the workers."""
    c = status.candidates
    of = f" of {status.budget.candidates}" if status.budget.candidates else ""
    eliminated = f" {c.eliminated} eliminated," if c.eliminated else ""
    text = f"candidates {c.asked}{of}: {c.done} scored,{eliminated} {c.cached} cached, {c.failed} failed, "
    text += f"{c.running} running"
    if status.seconds:
        split = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in status.seconds.items())
        text += f"  |  {sum(status.seconds.values()):.2f} s each ({split})"
    if pool:
        starting = f", {pool.starting} starting" if pool.starting else ""
        text += f"  |  workers {pool.busy} busy of {pool.workers}{starting}"
    return text


def thrift_lines(status: SearchStatus) -> list[str]:
    """Lines about the methods that save items: coarse to fine, racing, screen, proxy and models of scores."""
    lines = [f"coarse to fine: {status.refined}"] if status.refined else []
    if status.racing is not None:
        rungs = ", ".join(str(rung) for rung in status.racing.rungs)
        lines.append(f"racing: rungs {rungs}; {status.items:,} items scored in all")
    if status.screen is not None:
        lines.append(f"screen: {screen_text(status.screen)}")
    if (proxy := status.proxy) is not None:
        walk = f"{proxy.before:.3g} before its last descent, {proxy.after:.3g} at its end"
        where = f"beside generation {proxy.step}, at rate {proxy.rate:.3g}"
        lines.append(f"proxy: {walk}; {where}; {proxy.agreement}")
    if status.quadratics is not None:
        lines.append(f"quadratics: {quadratics_text(status.quadratics)}")
    if status.racing is not None and status.racing.estimate == "item_response":
        known = "; ".join(_item_response(name, fitted) for name, fitted in status.item_response.items())
        lines.append(f"item response: {known or 'no model of it is fitted yet'}")
    return lines


def screen_text(screen: ScreenState) -> str:
    """Whether the screen is on, and why: "m agrees with maths, tau 0.71 over 60 candidates: on, 33 left out"."""
    left_out = f", {screen.left_out} left out" if screen.on or screen.left_out else ""
    if screen.tau is None:
        return f"{screen.metric} was not compared with {screen.objective} yet: off{left_out}"
    tau = f"tau {screen.tau:.2f} over {screen.pairs} candidates"
    if screen.tau < screen.least_tau:
        few = f"{screen.metric} does not agree with {screen.objective} well enough"
        return f"{few}, {tau}, {screen.least_tau:g} is asked for: off{left_out}"
    state = "on" if screen.on else "off, too few to trust it yet"
    return f"{screen.metric} agrees with {screen.objective}, {tau}: {state}{left_out}"


def _item_response(name: str, fitted: ItemErrors) -> str:
    used = "used" if fitted.used else "not used"
    return f"{used} for {name} (held-out error {fitted.item_response:.3f}, by the best baseline {fitted.reference:.3f})"


def slow_text(slow: Slow) -> str:
    """What is slow, and how slow: "node gpu07-3fa2c1 takes 0.42 s an item, the others 0.21 s (medians of ...)"."""
    medians = f"medians of {slow.candidates} and {slow.others_candidates} candidates"
    seconds = f"{slow.seconds:.3g} s an item, the others {slow.others_seconds:.3g} s"
    return f"{slow.kind} {slow.name} takes {seconds} ({medians})"


def scores(status: SearchStatus, rows: int | None = None) -> RenderableType:
    """Baselines, the best and the front, with standard errors, on the search split."""
    front = {e.id for e in status.front_entries}
    known = {b.id for b in status.baselines}
    best_first = ranked([e for e in status.front_entries if e.id not in known], status)
    few = best_first[: rows or _FRONT_ROWS]
    shown = [*_few(status.baselines, status, rows), *few]
    roles = [roles_of(status, e.id, "search") for e in shown]
    styles = ["bold green" if roles[i] and e in few else "dim" if e.id in known else "" for i, e in enumerate(shown)]
    titles = [f"{name} {arrow(way)}" for name, way in status.numbers.items()]
    marks = [", ".join([*([e.label] if e.label else []), *roles[i], *["front"] * (e.id in front)])
             for i, e in enumerate(shown)]  # fmt: skip
    below = _more(len(status.baselines) + len(few) - len(shown), len(best_first) - len(few), "on the front")
    if status.best is None and status.constraints and status.candidates.done:
        below.append(Text("none scored on every item keeps all constraints yet"))
    columns = _columns(shown, marks, [*titles, *further_titles(status)], [cells(e, status) for e in shown])
    columns += change_column(shown, status)
    steps = [named(marks), without(CHANGE), terse]
    return Group(FittedTable(columns, steps, title="search split", styles=styles), *below)


def confirmed_table(status: SearchStatus, rows: int | None = None) -> RenderableType:
    """The results on the held-out split: every confirmed candidate, and its difference from the best source."""
    few = ranked(status.confirmed, status)[:rows]
    baselines = _few(status.confirmed_baselines, status, rows)
    shown = [*baselines, *few]
    roles = [roles_of(status, e.id, "held_out") for e in shown]
    marks = [", ".join([e.label] * bool(e.label) + roles[i]) for i, e in enumerate(shown)]
    styles = ["bold green" if roles[i] else "dim" if e in baselines else "" for i, e in enumerate(shown)]
    titles = [*status.numbers, *further_titles(status)]
    columns = _columns(shown, marks, titles, [cells(e, status, whole=True) for e in shown])
    gains = [
        Column(title, [*("" for _ in baselines), *(gain_cell(e, status, name) for e in few)], right=True)
        for name in status.numbers
        if few and (title := gain_title(status, name))
    ]
    columns += gains
    fewer = [without(column.title) for column in gains[:0:-1]]  # for the chosen ones they are also below the table
    below = _more(len(status.confirmed_baselines) - len(baselines), len(status.confirmed) - len(few), "confirmed")
    title = "held-out split (never seen by the search)"
    return Group(FittedTable(columns, [named(marks), terse, *fewer], title=title, styles=styles), *below)


def _columns(shown: Sequence[Entry], marks: Sequence[str], titles: Sequence[str], rows: Rows) -> list[Column]:
    """The columns with ids, marks and values: one for each title, whose texts are in ``rows``."""
    values = [Column(title, [row[i] for row in rows], right=True) for i, title in enumerate(titles)]
    return [Column("candidate", [e.id for e in shown]), Column("", marks), *values]


def change_column(shown: Sequence[Entry], status: SearchStatus) -> list[Column]:
    """The distance of candidates from the base; no column if it is unknown, or if there is a measure of that name."""
    if CHANGE in status.measures or all(entry.change is None for entry in shown):
        return []
    return [Column(CHANGE, [percent(entry.change) for entry in shown], right=True)]


def ranked(entries: Sequence[AnyEntry], status: SearchStatus) -> list[AnyEntry]:
    """Entries with the best first: by the only objective, the scalarisation, or the first objective of a front."""
    first, way = next(iter(status.numbers.items()))
    known = [(value.mean, e) for e in entries if (value := e.value(first)) is not None]
    return [e for _, e in sorted(known, key=lambda pair: pair[0], reverse=way == "maximize")]


def _few(baselines: Sequence[Entry], status: SearchStatus, rows: int | None) -> list[Entry]:
    """All baselines in the order asked, or the best of them if only a few rows are wanted."""
    return list(baselines) if rows is None or len(baselines) <= rows else ranked(baselines, status)[:rows]


def _more(baselines: int, others: int, what: str) -> list[RenderableType]:
    """A line about those that are not shown."""
    counts = [f"{others} more {what}"] * (others > 0) + [f"{count_text(baselines, 'baseline')} more"] * (baselines > 0)
    return [Text(f"and {', '.join(counts)}", style="dim")] if counts else []


def gain_text(entry: ConfirmedEntry, status: SearchStatus, number: str) -> str:
    """The paired difference from the source that is best in an objective or in the scalarisation: "+0.320 [0.250,
    0.390] over japanese".
    """
    best = best_confirmed_source(status, number)
    return f"{gain_cell(entry, status, number)} over {best}" if best else ""


def gain_cell(entry: ConfirmedEntry, status: SearchStatus, number: str) -> str:
    """The same without the source's name, if that is shown elsewhere."""
    gap = gain_in(entry, number, best_confirmed_source(status, number))
    return "" if gap is None else gap_text(gap)


def gain_title(status: SearchStatus, number: str) -> str:
    """The title of gains: "gain over japanese in maths". The objective is named if there are several."""
    best = best_confirmed_source(status, number)
    inside = f" in {number}" if len(status.directions) > 1 else ""
    return f"gain over {best}{inside}" if best else ""


def best_confirmed_source(status: SearchStatus, number: str) -> str:
    """The label of the source that is best in an objective or in the scalarisation on the held-out split; empty if
    unknown.
    """
    return best_source(status.confirmed_baselines, status.sources, number, status.numbers[number])


def choice_text(status: SearchStatus) -> list[str]:
    """Sentences about the numbers of the held-out split: what was corrected, and what the choice adds."""
    choice = status.choice
    if choice is None or not choice.comparisons:
        return []
    sentences = [
        f"Intervals hold all at once with {choice.confidence:.0%}: corrected for {_comparisons(choice, status)}."
    ]
    if choice.made or status.winner is not None:
        sentences += [text for text in [_winner_text(status.winner, choice, status)] if text]
    if choice.shortlists > 1:
        sentences.append(
            f"This is shortlist {choice.shortlists} of the search: held-out scores of earlier ones were known before."
        )
    return sentences


def _winner_text(winner: str | None, choice: Choice, status: SearchStatus) -> str:
    """How the winner was chosen, and how much of its value may be luck; empty for a front without a winner."""
    limits = ", ".join(constraint_titles(status))
    who = "the winner is the one that misses" if winner is not None else "those that are named here miss"
    if not choice.feasible:
        return f"No model keeps every constraint there ({limits}): {who} them least."
    if winner is None:
        return ""
    among = sum(shown.feasible for shown in [*status.confirmed, *status.confirmed_baselines])
    baselines = count_text(len(status.confirmed_baselines), "baseline")
    of = f"{count_text(len(status.confirmed), 'candidate')} and {baselines}"
    who = f"the {among} there that keep {limits}" if limits else f"the {among} there ({of})"
    name = next(iter(status.numbers))
    entry = status.confirmed_entry(winner)
    known = None if entry is None else entry.value(name)
    by = "" if status.scalar is None else f" by the {name} of all objectives"
    if known is None:
        return f"The winner is the best of {who}{by}."
    return f"The winner is the best of {who}{by}: of its {name} {known.mean:.3f}, {_luck(choice, status)}."


def _luck(choice: Choice, status: SearchStatus) -> str:
    """How much luck may have improved the number that decides; if lower is better, the number looks too small."""
    if next(iter(status.numbers.values())) == "maximize" or status.scalar is None:
        return f"about {choice.luck:.3f} may be luck of the choice"
    return f"which may be about {choice.luck:.3f} too small by luck of the choice"


def _comparisons(choice: Choice, status: SearchStatus) -> str:
    """The number of comparisons and their participants: "2 comparisons (1 candidate with base, uniform average)"."""
    gaps = next(iter(status.confirmed[0].objectives.values())).difference
    who = f"{count_text(len(status.confirmed), 'candidate')} with {', '.join(gap.to for gap in gaps)}"
    what = f"{count_text(choice.comparisons, 'comparison')} ({who})"
    if len(status.directions) == 1:
        return what
    return f"{what} in each objective{'' if status.scalar is None else f', and as many in the {status.scalar.name}'}"


def line(status: SearchStatus, eta: float | None = None, progress: Progress | None = None) -> str:
    """The status as one plain line, for logs; ``progress`` is that of the process that drives the search."""
    if status.state == "confirming" and progress is not None and progress.models:
        scored = f"{progress.models_done} of {progress.models} models, {progress.done:,} of {progress.items:,} items"
        left = "" if eta is None else f"; ETA {duration(eta)}"
        return f"confirming on the held-out split: {scored}{_at_work(progress)}{left}"
    if status.state == "confirming":
        done = f"{len(status.confirmed)} of the best and {len(status.confirmed_baselines)} baselines"
        if status.choice is not None and status.choice.drawn:
            done += f" and {status.choice.drawn} for the picture"
        return f"confirming on the held-out split: {done} scored so far"
    c = status.candidates
    of = f"/{status.budget.candidates}" if status.budget.candidates else ""
    text = f"[{duration(status.budget.hours_spent * 3600)}] {finished(status)}{of} candidates"
    if status.cost is not None:
        text += f"; cost {_cost_left(status, eta)}"
    if c.eliminated:
        text += f", {c.eliminated} eliminated"
    if c.failed:
        text += f", {c.failed} failed"
    if status.best:
        known = ((name, status.best.value(name)) for name in status.numbers)
        values = ", ".join(f"{name} {cell(value)}" for name, value in known if value is not None)
        what = KNEE if is_front(status) else BEST
        text += f"; {what} {status.best.id}{f' ({status.best.label})' if status.best.label else ''}: {values}"
    if len(status.directions) > 1:
        text += f"; {len(status.front)} on the front"
    if status.slow:
        text += f"; slow: {', '.join(slow.name for slow in status.slow)}"
    text += _at_work(progress)
    return text + (f"; ETA {duration(eta)}" if eta is not None and status.state == "running" else "")


def _at_work(progress: Progress | None) -> str:
    """What is being scored, and the progress."""
    numbers, items = ([], 0) if progress is None else progress.at_work()
    if progress is None or not numbers:
        return ""
    if min(numbers) < 0:  # not a candidate
        return f"; following the proxy: {count_text(progress.answers, 'answer')} read"
    named = [candidate_id(number) for number in numbers]
    names = ", ".join(named) if len(named) <= _NAMED else f"{len(named)} candidates"
    answers = f"{count_text(progress.answers, 'answer')}, " if progress.answers else ""
    return f"; scoring {names}: {answers}{count_text(items, 'item')}"


def arrow(way: str) -> str:
    """The direction of an objective as a symbol."""
    return "↑" if way == "maximize" else "↓"


def cell(value: Estimate) -> str:
    """A mean with its standard error: 0.620 ± 0.024."""
    return value_text(value)


def p_text(p: float | None) -> str:
    """A p-value for people: resampling cannot resolve values below 0.001, and a single item has none."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """A duration for people: 45s, 3m20s, 2h05m, 1d4h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def finished(status: SearchStatus) -> int:
    """The number of candidates that are finished."""
    c = status.candidates
    return c.done + c.eliminated + c.failed + c.cached


def constraint_titles(status: SearchStatus) -> list[str]:
    """The columns of the constraints: english ≥ 0.9."""
    return [f"{name} {limit.text}" for name, limit in status.constraints.items()]


def further_titles(status: SearchStatus) -> list[str]:
    """The columns after those of the objectives: constraints, then features."""
    return [*constraint_titles(status), *status.features]


def cells(shown: Entry, status: SearchStatus, *, whole: bool = False) -> list[str]:
    """The values of a candidate: scalarisation, objectives, constraints and features; empty texts if unknown.

    Values from fewer items than the search wants are marked as estimates, unless the split is always scored ``whole``.
    """
    texts = []
    for name in status.measures:
        value = shown.value(name)
        text = ""
        if value is not None:
            text = cell(value) if whole else estimate_cell(value, status.wanted_of(name))
            if (limit := status.constraints.get(name)) is not None and not limit.is_kept(value):
                text += " missed"
        texts.append(text)
    return texts


def estimate_cell(value: Estimate, wanted: int) -> str:
    """A mean with its standard error; if estimated from fewer items than wanted, it is shown as ~0.620 ± 0.024 (25)."""
    return cell(value) if value.n >= wanted else f"~{cell(value)} ({value.n})"
