"""The driver: one search from its first baseline to the end of its budget.

It asks the optimizer for genomes, decodes them, has them scored by a pool, and tells the optimizer: generation after
generation, or, without a barrier, whenever a worker is free and whenever a candidate is known. It alone writes to the
store, each step in one transaction, before it acts on it. So if it is killed at any point, a new driver brings a fresh
optimizer to the same state by replaying the recorded asks and tells in order, and continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from evomerge.errors import InputError
from evomerge.genome import Genome, Refitting, check_genome
from evomerge.optimizers import Grid, Observation, Optimizer
from evomerge.prices import amount_text
from evomerge.recipes.base import Recipe, text_hash
from evomerge.search.driving.answers import BestAnswers
from evomerge.search.driving.candidates import FAVOURITE, PROXY, REFIT, START, Candidate
from evomerge.search.driving.descents import Descents
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.ending import Ending
from evomerge.search.driving.generation import GenerationScoring
from evomerge.search.driving.kept import Kept
from evomerge.search.driving.ranking import Ranking
from evomerge.search.driving.refits import Refits
from evomerge.search.driving.scoring import CandidateScoring
from evomerge.search.driving.steady import SteadyScoring
from evomerge.search.estimation.scores import ScoreTable
from evomerge.search.settings.sections import BestKept, Budget
from evomerge.search.work.deadlines import ATTEMPT_EVENTS, EVENTS_READ, Deadlines, recorded_attempts
from evomerge.search.work.jobs import BLAMELESS
from evomerge.store import CandidateRow, EventRow, NewCandidate
from evomerge.store.events import Agreed, Failure, ItemResponse, Refined, Rung, Screening


class Driver:
    """Runs one search.

    Attributes:
        optimizer: proposes candidates.
        asked_after: the seq of an event before the asks of all candidates that were open when this driver began.
    """

    def __init__(self, drive: Drive) -> None:
        self._setup = setup = drive.setup
        self._store = store = drive.store
        self._control = drive.control
        self._clock = drive.clock
        self._pool = drive.pool
        self._meter = drive.meter
        self._started = self._clock()
        self._spent_before_s = 0.0
        self.optimizer: Optimizer = setup.build_optimizer()
        self.asked_after = 0
        self._deadlines = Deadlines(drive.attempt_s)
        dispatcher = drive.dispatcher(self._deadlines)
        dispatcher.progress.begin(self._items_to_come)
        self._scoring: CandidateScoring = (
            GenerationScoring(setup, store, dispatcher, drive.logs)
            if setup.mode == "generational"
            else SteadyScoring(setup, store, dispatcher, drive.logs, self.optimizer.population)
        )
        self._descents = None if setup.proxy is None else Descents(setup.proxy, setup, store, dispatcher, drive.logs)
        self._refits = (
            Refits(setup.space, setup, store, dispatcher, drive.logs) if isinstance(setup.space, Refitting) else None
        )
        self._ranking = Ranking(setup, self._scoring.screening)
        self._step = 0
        self._asked = 0
        self._asked_since_favourite = 0
        self._baselines = len(list(setup.space.baselines()))
        self._lost_baselines = 0
        self._told_items = self._told_candidates = 0  # scored items of the candidates told, baselines not counted
        self._open: dict[int, Candidate] = {}  # asked for and not yet told, in the order asked
        self._kept = Kept(setup)
        self._best_answers = (
            BestAnswers(setup.answers.best, len(setup.objectives)) if isinstance(setup.answers, BestKept) else None
        )
        self._without_answers: list[int] = []  # by the last tell
        self._refined = 0  # the optimizer's splits from coarse to fine that were recorded
        self._unchanged = 0.0  # generations since the front or an elite last changed

    def run(self) -> Ending:
        """Search until the budget is spent or a stop is asked for."""
        self._replay()
        self._started = self._clock()
        self._store.set_state("running")
        self._record_refinements()
        if not self._asked:
            self._ask_baselines()
        if self._scoring.baselines_first and 0 in self._open:  # they are not told yet
            if not self._scoring.score_baselines(self.waiting):
                return self._end(self._asked_to_end())
            self.tell(self.waiting)
        if self._setup.start and self._step == 0:
            self._ask_start()
        spent = self._spent() if self._scoring.run(self) else None
        if spent is not None and spent.reason not in ("hours", "cost") and not self._refit():
            spent = None
        return self._end(spent or self._asked_to_end())

    @property
    def waiting(self) -> list[Candidate]:
        """The candidates that were asked for and not told yet, in the order asked."""
        return list(self._open.values())

    @property
    def rivals(self) -> Grid:
        """What a new candidate must beat to be kept: the front, or the elites of its niche."""
        return self._kept.rivals(self.optimizer.keeps)

    @property
    def is_spent(self) -> bool:
        """Whether no more candidates are to be asked for."""
        return self._spent() is not None

    @property
    def is_starting(self) -> bool:
        """Whether candidates of an earlier search must be told before anything is asked for."""
        return any(c.origin == START for c in self._open.values())

    # Asking and telling -------------------------------------------------------------------------------------------

    def _ask_baselines(self) -> None:
        marks = list(self._setup.space.baselines())
        asked = [self._next(i, mark.kind, mark.genome, mark.recipe) for i, mark in enumerate(marks)]
        self._record_ask(asked, [mark.label for mark in marks])

    def _ask_start(self) -> None:
        """Ask for the candidates from an earlier search, as far as the budget allows."""
        points = self._setup.start[: self._room()]
        if points:
            self._step += 1
            decode = self._setup.space.decode
            asked = [self._next(i, START, p.genome, decode(p.genome)) for i, p in enumerate(points)]
            self._record_ask(asked, [point.label for point in points])

    def _room(self) -> int:
        """How many candidates the budget leaves for the optimizer."""
        return sys.maxsize if (most := self._most_asked) is None else most - self._asked

    def prepare(self) -> bool:
        """Have a worker follow the proxy, if there is one and room for its points; False if a stop came first."""
        if self._descents is None or self._room() <= self.optimizer.population:
            return True
        return self._descents.prepare(self._step + 1)

    def ask(self, count: int) -> list[Candidate]:
        """This many new candidates, or as many as the budget has left.

        Also the optimizer's favourite, with racing, and the points that the proxy leads to.
        """
        room = self._room()
        wanted = min(count, room)
        name: str = self._setup.optimizer.name
        points = [(name, genome) for genome in self.optimizer.ask(wanted)]
        if len(points) != wanted:
            problem = f"gave {len(points)} genomes, and was asked for {wanted}"
            raise InputError(f"optimizer {name}", problem, "It must return as many as it is asked for.")
        self._asked_since_favourite += len(points)
        if len(points) < room and (favourite := self._favourite()) is not None:
            points.append((FAVOURITE, favourite))
        if self._descents is not None:
            points += [(PROXY, genome) for genome in self._descents.points()[: room - len(points)]]
        for _, genome in points:
            check_genome(genome, self._setup.space.parameters, f"optimizer {name}")
        self._step += 1
        if self._refits is not None:
            self._refits.are_asked = False
        asked = [self._next(i, origin, g, self._setup.space.decode(g)) for i, (origin, g) in enumerate(points)]
        self._record_ask(asked, [""] * len(asked))
        return asked

    def _refit(self) -> bool:
        """Have the best candidates fitted again, and score the results; False if a stop came first."""
        if self._refits is None or self._refits.are_asked:
            return True
        room = sys.maxsize if self._budget.candidates is None else self._budget.candidates - self._asked
        if not (recipes := self._refits.chosen(max(0, room))):
            return True
        if not self._refits.fit(recipes):
            return False
        self._step += 1
        asked = [self._next(i, REFIT, None, recipe) for i, recipe in enumerate(recipes.values())]
        self._record_ask(asked, [f"{name}, fitted anew" for name in recipes])
        self._refits.are_asked = True
        return self._scoring.run(self)

    def _favourite(self) -> Genome | None:
        """The optimizer's favourite, once per generation, if scores are estimates and the best are mostly lucky."""
        if self._setup.racing is None or self._asked_since_favourite < self.optimizer.population:
            return None
        self._asked_since_favourite = 0
        return self.optimizer.favourite

    def _next(self, i: int, origin: str, genome: Genome | None, recipe: Recipe) -> Candidate:
        text = recipe.canonical()
        return Candidate(self._asked + i, genome, recipe, text_hash(text), text, self._step, origin)

    def _record_ask(self, asked: list[Candidate], labels: Sequence[str]) -> None:
        new = [
            NewCandidate(c.number, c.origin, c.text, c.recipe_hash, c.genome, label)
            for c, label in zip(asked, labels, strict=True)
        ]
        self._store.record_ask(self._step, new)
        self._open |= {c.number: c for c in asked}
        self._asked += len(asked)

    def tell(self, candidates: Sequence[Candidate]) -> None:
        """Candidates are scored as far as needed: rank them, record it, and let the optimizer learn."""
        outcomes = self._scoring.conclude(candidates)
        self._ranking.rank(candidates, self._scoring.recent)
        self._check_baselines(candidates)
        self._keep(candidates)
        losses = {c.number: c.losses for c in candidates if c.losses is not None}
        self._store.record_tell(
            self._step,
            losses,
            front=self._kept.front.niches,
            spent_s=self._spent_s(),
            worker_time=self._meter.read(),
            outcomes=outcomes,
            niches=self._kept.niches,
            without_answers=self._without_answers,
        )
        self._learn(candidates)
        self._record_refinements()
        self._record_screen()
        self._record_agreement(candidates)
        self._record_item_response()

    def _record_agreement(self, candidates: Sequence[Candidate]) -> None:
        """Record the proxy's agreement, if some of the candidates are its points."""
        if (descents := self._descents) is not None and any(c.origin == PROXY for c in candidates):
            known = descents.agreement
            self._store.record_event(Agreed(points=known.points, tau=known.tau, on=descents.rate is not None))

    def _record_screen(self) -> None:
        """Record the screen's agreement."""
        if (screening := self._scoring.screening) is not None:
            self._store.record_event(Screening(pairs=screening.pairs, tau=screening.tau, on=screening.is_on))

    def _record_refinements(self) -> None:
        """Record how the optimizer has split its numbers, for people: only asks and tells are replayed."""
        if len(refined := self.optimizer.refined) > self._refined:
            self._refined = len(self._store.events(kinds=("refined",)))
        for new in refined[self._refined :]:
            self._store.record_event(
                Refined(told=new.told, numbers=new.numbers, finest=new.finest, places=list(new.places))
            )
        self._refined = len(refined)

    def _record_item_response(self) -> None:
        """Record the state of item response if it has changed, which is only after a new fit."""
        if payload := dict(self._scoring.predictions.summary()):
            before = self._store.events(kinds=("item response",), newest=1)
            if not before or before[0].payload != payload:
                self._store.record_event(ItemResponse.model_validate(payload))

    def _learn(self, candidates: Sequence[Candidate]) -> None:
        """Pass told candidates to everything that learns from them."""
        taught = [c for c in candidates if c.origin != FAVOURITE]
        self.optimizer.tell(
            [self._observed(c, c.genome, c.losses) for c in taught if c.genome is not None and c.losses]
        )
        self._scoring.learn(candidates, baselines=candidates[0].step == 0)
        if self._descents is not None:
            self._descents.take(candidates, self._kept.front.niches.keys())
        for c in candidates:
            del self._open[c.number]
            if c.step > 0:
                self._told_items += self._items_of(c)
                self._told_candidates += 1

    def _observed(self, candidate: Candidate, genome: Genome, losses: Sequence[float]) -> Observation:
        return Observation(
            genome,
            losses,
            features=self._setup.feature_values(candidate.objectives),
            items=self._scoring.item_losses(candidate) if self.optimizer.wants_items else (),
            feasible=candidate.status != "failed" and self._setup.violation(candidate.objectives) == 0.0,
            complete=candidate.eligible,
        )

    def _check_baselines(self, candidates: Sequence[Candidate]) -> None:
        """If every baseline fails, the fault is not in a merge, and the whole budget would be wasted.

        Raises:
            InputError: with the first failure's message.
        """
        self._lost_baselines += sum(c.step == 0 and c.status == "failed" for c in candidates)
        if candidates[0].step == 0 and self._lost_baselines == self._baselines:
            failure = self._store.candidate(0).failure or {}
            raise InputError(
                "baselines",
                f"every source and average failed; candidate 0: {failure.get('message')}",
                f"See {failure['log']} in the folder of the search." if failure.get("log") else "",
            )

    def _keep(self, candidates: Sequence[Candidate]) -> None:
        self._kept.take(candidates)
        if self._best_answers is not None:
            self._without_answers = self._best_answers.take(candidates, self._kept)
        generation = 1.0 if self._setup.mode == "generational" else len(candidates) / self.optimizer.population
        self._unchanged = 0.0 if self._kept.changed else self._unchanged + generation

    # Progress -----------------------------------------------------------------------------------------------------

    def _items_of(self, candidate: Candidate) -> int:
        """How many items a told candidate was scored on: none if an earlier one answered for it."""
        if candidate.same_as is not None:
            return 0
        known: dict[int, int] = {}
        screen = () if self._setup.screen is None else (self._setup.screen,)
        for measure in (*self._setup.measures, *screen):
            if (estimate := candidate.objectives.get(measure.name)) is not None:
                known[measure.evaluator] = max(estimate.n, known.get(measure.evaluator, 0))
        return sum(known.values())

    def _items_to_come(self) -> float | None:
        """How many items remain to be scored until the budget of candidates is spent; None without one.

        A candidate is expected to need as many as those told so far, and, while these are few, as the rungs suggest.
        """
        if self._budget.candidates is None:
            return None
        sizes = [sum(counts.values()) for counts in self._setup.rungs[: self._setup.ordinary_rungs]]
        weight = self.optimizer.population
        per_candidate = (self._told_items + weight * sum(sizes) / len(sizes)) / (self._told_candidates + weight)
        wanted = [sum(self._setup.all_counts().values()) if c.step == 0 else per_candidate for c in self._open.values()]
        known = [c.table.count for c in self._open.values()]
        ended = [c.finished or bool(c.out) for c in self._open.values()]
        left = sum(max(0.0, w - k) for w, k, over in zip(wanted, known, ended, strict=True) if not over)
        return left + per_candidate * max(0, self._budget.candidates - self._asked)

    # Budget -------------------------------------------------------------------------------------------------------

    @property
    def _budget(self) -> Budget:
        return self._control.budget or self._setup.budget

    @property
    def _most_asked(self) -> int | None:
        """How many candidates may be asked for before the refits; None without a bound."""
        reserved = 0 if self._refits is None else self._refits.reserved
        return None if self._budget.candidates is None else self._budget.candidates - reserved

    def _spent_s(self) -> float:
        """Seconds that drivers have worked on this search, including earlier ones but not pauses."""
        return self._spent_before_s + self._clock() - self._started - self._control.paused_s()

    def _spent(self) -> Ending | None:
        """How the search should end now; None if it should continue."""
        budget = self._budget
        if budget.candidates is not None and self._room() <= 0:
            return Ending("candidates", budget.candidates)
        if budget.hours is not None and self._spent_s() >= budget.hours * 3600:
            return Ending("hours", budget.hours)
        if budget.patience is not None and self._unchanged >= budget.patience:
            return Ending("patience", budget.patience)
        if budget.cost is not None and (prices := self._setup.prices) is not None:
            if prices.cost(self._meter.read()) >= budget.cost:
                return Ending("cost", amount_text(budget.cost, prices.currency))
            self._check_that_it_costs()
        return Ending("optimizer", self.optimizer.stopped) if self.optimizer.stopped else None

    def _check_that_it_costs(self) -> None:
        """Refuse a budget of money that would never be spent, such as for GPUs if workers have none (InputError)."""
        state, prices = self._pool.state(), self._setup.prices
        if state.workers and prices is not None and not prices.cost_an_hour(state.workers, state.gpus):
            problem = "would never be spent: cluster.gpu_hour is the price of a GPU, and the workers have none"
            raise InputError("budget.cost", problem, "Give cluster.worker_hour, the price of a worker.")

    def _asked_to_end(self) -> Ending:
        return Ending("cancel" if self._control.cancelled else "stop")

    def _end(self, ending: Ending) -> Ending:
        ending.record(self._store, spent_s=self._spent_s(), worker_time=self._meter.read())
        return ending

    # Replay -------------------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Bring the optimizer to the state of the store.

        Raises:
            InputError: a genome or recipe differs from the record.
        """
        newest = 0
        before_ask: dict[int, int] = {}  # for each open candidate, the seq of an event before its ask
        for step in self._store.steps():
            newest = step.seq
            if step.kind == "ask":
                self._step = step.step
                self._open |= {c.number: c for c in self._replay_ask(step.step)}
                before_ask |= dict.fromkeys(step.candidates, step.seq - 1)
            else:
                candidates = [self._open[number] for number in step.candidates]
                self._lost_baselines += sum(c.step == 0 and c.status == "failed" for c in candidates)
                self._ranking.remember(candidates)
                self._keep(candidates)
                self._learn(candidates)
                for number in step.candidates:
                    del before_ask[number]
        self.asked_after = min(before_ask.values(), default=newest)
        if self._best_answers is not None:  # an earlier driver may have kept more
            open_or_best = self._open.keys() | self._best_answers.kept
            self._store.drop_answers([number for number in self._store.answered() if number not in open_or_best])
        self._spent_before_s = self._store.search().spent_s
        if self._open:
            for event in self._store.events(kinds=("failure",)):
                if event.candidate in self._open and event.read(Failure).reason not in BLAMELESS:
                    self._open[event.candidate].faults += 1
        ended = self._store.events(kinds=ATTEMPT_EVENTS, newest=EVENTS_READ)
        for items, seconds in recorded_attempts(ended, self._scored_by):
            self._deadlines.remember(items, seconds)

    def _scored_by(self, event: EventRow) -> Mapping[int, int]:
        """How many items of each evaluator a candidate had been scored on, by its event "rung" or "result"."""
        if event.kind == "result":
            baseline = event.candidate is not None and event.candidate < self._baselines
            return self._setup.all_counts() if baseline else self._setup.counts()
        items = event.read(Rung).items
        return {i: items[e.version] for i, e in enumerate(self._setup.evaluators) if e.version in items}

    def _replay_ask(self, step: int) -> list[Candidate]:
        rows = self._store.candidates(step=step)
        if step == 0:
            # A newer program may know that a baseline is a point of the space.
            marks = list(self._setup.space.baselines())
            points = [(row.genome, mark.recipe) for row, mark in zip(rows, marks, strict=False)]
            points += [(mark.genome, mark.recipe) for mark in marks[len(rows) :]]
        elif rows and rows[0].origin == START:
            points = [
                (start.genome, self._setup.space.decode(start.genome)) for start in self._setup.start[: len(rows)]
            ]
        elif rows and rows[0].origin == REFIT and self._refits is not None:
            points = [(None, recipe) for recipe in self._refits.replayed(rows)]
        else:
            if self._refits is not None:
                self._refits.are_asked = False
            given = [row for row in rows if row.origin == PROXY]  # computed by a worker, so taken from the record
            ours = [row.genome for row in rows if row.genome is not None and row.origin not in (FAVOURITE, PROXY)]
            genomes = self.optimizer.replay(ours)
            self._asked_since_favourite += len(genomes)
            if len(genomes) + len(given) < len(rows) and (favourite := self._favourite()) is not None:
                genomes.append(favourite)
            genomes += [row.genome for row in given if row.genome is not None]
            points = [(genome, self._setup.space.decode(genome)) for genome in genomes]
        if len(points) != len(rows):
            raise _drift(f"step {step}", f"gives {len(points)} candidates where {len(rows)} were recorded")
        generation = []
        for row, (genome, recipe) in zip(rows, points, strict=True):
            if _bits(genome) != _bits(row.genome) or recipe.hash != row.recipe_hash:
                place = f"candidate {row.number} (step {step})"
                raise _drift(place, "gives another genome or recipe than was recorded")
            generation.append(self._restore(row, genome, recipe))
        self._asked += len(rows)
        return generation

    def _restore(self, row: CandidateRow, genome: Genome | None, recipe: Recipe) -> Candidate:
        """A recorded candidate in its last recorded state."""
        candidate = Candidate(row.number, genome, recipe, row.recipe_hash, "", row.step, row.origin, row.attempts)
        # To be scored again, because its attempt died with its driver.
        candidate.status = "asked" if row.status == "running" else row.status
        candidate.same_as, candidate.timings = row.same_as, dict(row.timings)
        candidate.objectives, candidate.losses, candidate.eligible = row.objectives, row.losses, row.eligible
        if row.losses is None:
            candidate.table = ScoreTable.of(self._setup, self._store.scores(row.number, "search"))
        return candidate


def _drift(place: str, problem: str) -> InputError:
    return InputError(
        place,
        f"replaying the search {problem}",
        "A library or Evomerge itself has changed; install the versions that `show` lists, or start a new search.",
    )


def _bits(genome: Genome | None) -> bytes | None:
    return None if genome is None else genome.tobytes()
