"""One task's searcher: points asked from an Optuna study and told to it, with how each of them ended.

The study's journal lies in the run directory. Each ask draws from a sampler that is seeded by its own number, so that a
point is a function of the spec and of what was told before, whatever was interrupted in between. Points that are under
way when a sweep ends are told as stopped; a resumed sweep cuts these lines off the journal again and goes on with them.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from deft_ray.results.files import write_text
from deft_ray.results.points import is_feasible
from deft_ray.results.records import Record
from deft_ray.spec.domains import Domain, Scalar
from deft_ray.spec.points import deciding_first, first_points, sample_of
from deft_ray.spec.resolve import is_read, judged_at, rung_places, rung_shares
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.order import best
from deft_ray.sweep.parzen import Space
from deft_ray.sweep.rungs import JOURNAL, Arrivals

optuna.logging.set_verbosity(logging.ERROR)

#: Named constraints of the study: above 0 is infeasible.
_SCORE_LIMIT, _NUMBERS = "max_score_drop", "finite"


class Ending(enum.StrEnum):
    """How a point ended; of several seeds the first of these that any of them met."""

    FAILED = "failed"
    DIVERGED = "diverged"
    STOPPED = "stopped"
    PRUNED = "pruned"
    INFEASIBLE = "infeasible"
    COMPLETE = "complete"


#: Endings that say something about a point.
_TELLING = (Ending.COMPLETE, Ending.INFEASIBLE, Ending.PRUNED, Ending.DIVERGED)
#: Share of the told points that ``mo_tpe`` draws near to.
_GOOD = 0.25


class TaskSearch:
    """The points of one task.

    The study has two objectives: the change of the score against the baseline, up, and the density, down; both as
    trained, or at the threshold that ``search.objectives`` names.

    Args:
        spec: The sweep's spec.
        task: The task.
        folder: Where the study's journal lies; the study goes on from it.
        known: Points that are told before any is asked: their records, one for each seed, and the baseline of each.
    """

    def __init__(
        self, spec: SweepSpec, task: str, folder: Path, known: Sequence[tuple[list[Record], list[Record]]] = ()
    ) -> None:
        self.spec, self.task, self._first = spec, task, len(known)
        self._space = Space({dotted: spec.space[dotted] for dotted in deciding_first(spec)}, partial(is_read, spec))
        self._rows: dict[int, np.ndarray] = {}
        self._told: dict[int, _Told | None] = {}
        self._arrivals = Arrivals(folder / JOURNAL)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._closed = folder / f"{task}.log", folder / f"{task}.closed"
        self._reopen()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self._journal))),
                study_name=task,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        for place, (results, baselines) in enumerate(known):
            self._tell_known(place, results, baselines)
        there = len(self._study.get_trials(deepcopy=False)) - self._first
        for point in first_points(spec)[there:]:  # killed meanwhile, the study has the first of them; none is asked yet
            self._study.enqueue_trial(dict(point))

    def close(self) -> None:
        """Tell points that are under way as stopped, as the sweep ends; whoever opens the study again takes it back."""
        under_way = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
        if under_way:
            write_text(self._closed, str(self._journal.stat().st_size))
        for trial in under_way:
            Trial(self._study, trial._trial_id).set_user_attr("ending", Ending.STOPPED.value)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _reopen(self) -> None:
        """Cut off what :meth:`close` told."""
        if self._closed.is_file():
            size = int(self._closed.read_text(encoding="utf-8"))
            if self._journal.is_file() and self._journal.stat().st_size > size:
                os.truncate(self._journal, size)
            self._closed.unlink()

    def point(self, number: int) -> dict[str, Scalar]:
        """Return the sampled values of a point; asks the study if it has none of this number.

        A leaf that the point's other values leave unread has no value.
        """
        known, place = self._study.get_trials(deepcopy=False), self._first + number
        self._study.sampler = build_sampler(self.spec, f"{self.task} {number}")
        if place < len(known) and known[place].state != TrialState.WAITING:
            trial = known[place]
            if trial.state.is_finished() or not self._lacks(trial.params):
                return dict(trial.params)
            again = self._ask_aside(known[:place], number)
            return self._complete(trial, {**again, **trial.params})  # killed while it was asked
        if place == len(known) and self.spec.search.sampler in ("gp", "mo_tpe"):
            values = self._ask_aside(known, number)
            leaves = {dotted: _distribution(self.spec.space[dotted]) for dotted in values}
            running = optuna.trial.create_trial(state=TrialState.RUNNING, params=dict(values), distributions=leaves)
            self._study.add_trial(running)  # all of it by one line of the journal
            return values
        asked = self._study.ask()
        assert asked.number == place, f"asked for point {number} of {self.task}, got {asked.number - self._first}"
        return self._suggest_all(asked)

    def _ask_aside(self, known: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """Sample a point by these trials, and leave the study as it is."""
        if self.spec.search.sampler == "mo_tpe":
            return self._draw(known, number)
        return self._suggest_all(self._view(known).ask())

    def _tell_known(self, place: int, results: list[Record], baselines: list[Record]) -> None:
        """Tell a point that was measured elsewhere, unless the study has it."""
        there = self._study.get_trials(deepcopy=False)
        if place < len(there) and there[place].state.is_finished():
            return
        sample = sample_of(self.spec, results[0].config)
        if place == len(there):
            self._study.enqueue_trial(sample)
        if self._study.get_trials(deepcopy=False)[place].state == TrialState.WAITING:
            self._study.sampler = optuna.samplers.RandomSampler(seed=0)
            self._study.ask()
        self._complete(self._study.get_trials(deepcopy=False)[place], sample)
        self._tell(place, results, baselines, self._rung_elsewhere(results, baselines))

    def _complete(self, trial: FrozenTrial, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Give a trial of the study that has not ended the values that it lacks; returns what it has then.

        What the trial was enqueued with comes before ``values``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            fixed = optuna.samplers.PartialFixedSampler(dict(values), optuna.samplers.RandomSampler(seed=0))
        self._study.sampler = fixed
        return self._suggest_all(Trial(self._study, trial._trial_id))

    def asked(self, number: int) -> bool:
        """Whether a point was asked for, in this process or before."""
        known, place = self._study.get_trials(deepcopy=False), self._first + number
        return place < len(known) and known[place].state != TrialState.WAITING

    def _suggest_all(self, trial: Trial) -> dict[str, Scalar]:
        values: dict[str, Scalar] = {}
        for dotted in deciding_first(self.spec):
            if is_read(self.spec, values, dotted):
                values[dotted] = _suggest(trial, dotted, self.spec.space[dotted])
        return {dotted: values[dotted] for dotted in self.spec.space if dotted in values}

    def _view(self, known: Sequence[FrozenTrial]) -> optuna.Study:
        """A copy of the study's trials; for a Gaussian process all that say something have values in it.

        It looks at values alone: what it never saw it would take for good, and ask for it again and again. A pruned
        point has those of its rung, unless it missed the score limit there; that, and a diverged one, has the worst.
        """
        view = optuna.create_study(directions=self._study.directions, sampler=self._study.sampler)
        measured = [trial.values for trial in known if trial.state == TrialState.COMPLETE]
        worst = [min((score for score, _ in measured), default=-1.0), max((d for _, d in measured), default=1.0)]
        for trial in known:
            pruned = trial.state == TrialState.PRUNED and self.spec.search.sampler == "gp"
            reached = trial.user_attrs.get("pruned_at", {"missed": math.inf, "values": worst})
            view.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.COMPLETE if pruned else trial.state,
                    params=trial.params,
                    distributions=trial.distributions,
                    values=(worst if reached["missed"] > 0.0 else reached["values"]) if pruned else trial.values,
                    user_attrs=trial.user_attrs,
                    system_attrs=trial.system_attrs,
                )
            )
        return view

    def _draw(self, known: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """Draw a point by the order in which successive halving sees what was told; at random while that is little."""
        dice = np.random.default_rng(_seed(self.spec, f"{self.task} {number}"))
        tried = [self._row(trial) for trial in known[self._first :] if trial.state != TrialState.WAITING]
        told = self._telling(known)
        if len(told) < self.spec.search.startup_trials:
            return self._space.draw([], [], dice, tried)
        good = {trial.number for trial in _best(told, math.ceil(_GOOD * len(told)))}
        under_way = [trial.number for trial in known if not trial.state.is_finished()]
        others = [*(trial.number for trial in told if trial.number not in good), *under_way]
        rows, others_rows = ([self._row(known[place]) for place in places] for places in (sorted(good), others))
        return self._space.draw(rows, others_rows, dice, tried)

    def _telling(self, known: Sequence[FrozenTrial]) -> list[_Told]:
        """What was told that says something about its point; kept, as what was told does not change."""
        for trial in known:
            if trial.number not in self._told and trial.state.is_finished():
                self._told[trial.number] = _judge(trial)
        found = (self._told.get(trial.number) for trial in known)
        return [told for told in found if told is not None]

    def _row(self, trial: FrozenTrial) -> np.ndarray:
        """Coordinates of a trial; kept, as one that was asked does not change."""
        if trial.number not in self._rows:
            self._rows[trial.number] = self._space.encode(trial.params)
        return self._rows[trial.number]

    def _lacks(self, values: Mapping[str, Scalar]) -> bool:
        """Whether a leaf has no value that a trial with these values reads."""
        space = deciding_first(self.spec)
        return any(dotted not in values and is_read(self.spec, values, dotted) for dotted in space)

    def tell(self, number: int, results: Sequence[Record], baselines: Sequence[Record]) -> None:
        """Tell the study how a point ended, once.

        Complete and infeasible points have values, the latter by how much they miss the limit. A diverged point has
        none, and breaks a constraint, so that the sampler keeps away from it. A pruned one has its fidelity. Failed
        and stopped ones say nothing about the point.

        Args:
            number: Of the point.
            results: Its records, one for each seed.
            baselines: The baselines of the same seeds.
        """
        self._study.sampler = build_sampler(self.spec, f"{self.task} {number}")
        self._tell(self._first + number, results, baselines, self._rung(results))

    def _rung(self, results: Sequence[Record]) -> tuple[int, float]:
        """First rung at which one of a point's trials was pruned, and by how much the worst missed the score limit."""
        pruned = [self._arrivals.last(record.trial) for record in results if record.status == "pruned"]
        arrivals = [arrival for arrival in pruned if arrival is not None]
        rung = min((arrival.rung for arrival in arrivals), default=-1)
        return rung, max((arrival.missed for arrival in arrivals), default=0.0)

    def _rung_elsewhere(self, results: Sequence[Record], baselines: Sequence[Record]) -> tuple[int, float]:
        """The same of a known point, whose rungs may have been others: the last of ours that lies before its end.

        Trials of a known point are of another sweep, whose names mean others here; so they are asked for their steps.
        """
        pairs = [(r.steps, b.steps) for r, b in zip(results, baselines, strict=True) if r.status == "pruned"]
        shares = rung_shares(self.spec)
        rungs = [sum(place <= done for place in rung_places(shares, whole)) for done, whole in pairs]
        return min(rungs, default=0) - 1, 0.0

    def _tell(
        self, place: int, results: Sequence[Record], baselines: Sequence[Record], pruned_at: tuple[int, float]
    ) -> None:
        """Tell the study of its trial at this place; ``pruned_at`` is rung and missed limit of one that was pruned."""
        frozen: FrozenTrial = self._study.get_trials(deepcopy=False)[place]
        if frozen.state.is_finished():
            return
        limit = self.spec.constraint.max_score_drop
        tau = judged_at(self.spec.search.objectives)
        values = changes(results, baselines, tau)
        ending = ending_of(results, values, limit)
        trial = Trial(self._study, frozen._trial_id)
        trial.set_user_attr("ending", ending.value)
        trial.set_user_attr("steps", max((record.steps for record in results), default=0))
        if ending is Ending.PRUNED and (reached := _means(results, baselines, tau)) is not None:
            rung, missed = pruned_at
            trial.set_user_attr("pruned_at", {"rung": rung, "missed": missed, "values": list(reached)})
        missed = -values[0] - limit if ending is Ending.INFEASIBLE and values is not None and limit is not None else 0.0
        trial.set_constraint(_SCORE_LIMIT, missed)
        trial.set_constraint(_NUMBERS, 1.0 if ending is Ending.DIVERGED else 0.0)
        if ending in (Ending.COMPLETE, Ending.INFEASIBLE) and values is not None:
            self._study.tell(place, list(values))
        elif ending in (Ending.DIVERGED, Ending.PRUNED):
            self._study.tell(place, state=TrialState.PRUNED)
        else:
            self._study.tell(place, state=TrialState.FAIL)


def ending_of(results: Sequence[Record], values: tuple[float, float] | None, max_score_drop: float | None) -> Ending:
    """Return how a point ended; one that was trained to its end and has no finite score or density has diverged.

    Args:
        results: Its records, one for each seed.
        values: Mean score change and mean density; None where a seed has none.
        max_score_drop: The score limit.
    """
    statuses = {record.status for record in results}
    if "failed" in statuses or not results:
        return Ending.FAILED
    if "diverged" in statuses:
        return Ending.DIVERGED
    if "stopped" in statuses:
        return Ending.STOPPED
    if "pruned" in statuses:
        return Ending.PRUNED
    if not all(record.measured for record in results):
        return Ending.DIVERGED
    if values is None:
        return Ending.FAILED
    return Ending.COMPLETE if is_feasible(-values[0], max_score_drop) else Ending.INFEASIBLE


def changes(results: Sequence[Record], baselines: Sequence[Record], tau: float = 0.0) -> tuple[float, float] | None:
    """Return (mean of score minus the baseline's, mean density) over seeds, or None if any of them has none.

    Args:
        results: One record for each seed.
        baselines: The baseline of each, taken as it was trained.
        tau: Threshold at which the records are taken.
    """
    if any(record.status != "complete" for record in (*results, *baselines)):
        return None
    return _means(results, baselines, tau)


def _means(results: Sequence[Record], baselines: Sequence[Record], tau: float) -> tuple[float, float] | None:
    """The same of trials wherever they have ended."""
    found = [record.at(tau) for record in results]
    pairs = [(score, baseline.score) for (score, _), baseline in zip(found, baselines, strict=True)]
    gains = [score - before for score, before in pairs if score is not None and before is not None]
    densities = [density for _, density in found if density is not None]
    whole = 0 < len(results) == len(gains) == len(densities)
    if not whole or not all(map(math.isfinite, (*gains, *densities))):
        return None
    return sum(gains) / len(gains), sum(densities) / len(densities)


@dataclass(frozen=True)
class _Told:
    """A told trial with what it is judged by: how far it came (its last rung, ∞ for its end), and the numbers there."""

    number: int
    reached: float
    score: float
    density: float
    missed: float


def _judge(trial: FrozenTrial) -> _Told | None:
    """Take from a told trial what it is judged by; None if its ending says nothing about its point.

    With several seeds the first rung at which one was pruned counts.
    """
    if trial.user_attrs.get("ending") not in _TELLING:
        return None
    pruned = trial.user_attrs.get("pruned_at")
    if pruned is not None:
        score, density = pruned["values"]
        return _Told(trial.number, pruned["rung"], score, density, pruned["missed"])
    if trial.values is not None:
        score, density = trial.values
        return _Told(trial.number, math.inf, score, density, max(0.0, trial.constraints.get(_SCORE_LIMIT, 0.0)))
    return _Told(trial.number, -math.inf, math.nan, math.nan, math.inf)


def _best(told: Sequence[_Told], count: int) -> list[_Told]:
    """Return the best told trials: by how far they came, and of those that came as far by score, density and limit.

    Those that were pruned at a rung were the worse ones there. Diverged ones come last.
    """
    stages: dict[float, list[_Told]] = {}
    for trial in told:
        stages.setdefault(trial.reached, []).append(trial)
    found: list[_Told] = []
    for reached in sorted(stages, reverse=True):
        found += (stages[reached][place] for place in best(stages[reached], count - len(found)))
    return found


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    if domain.kind == "choice":
        return optuna.distributions.CategoricalDistribution(domain.args)
    low, high = domain.args
    if domain.kind == "randint":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(float(low), float(high), log=domain.kind == "loguniform")


def _suggest(trial: Trial, dotted: str, domain: Domain) -> Scalar:
    if domain.kind == "choice":
        chosen = trial.suggest_categorical(dotted, domain.args)
        assert chosen is not None
        return chosen
    low, high = domain.args
    if domain.kind == "randint":
        return trial.suggest_int(dotted, int(low), int(high))
    return trial.suggest_float(dotted, float(low), float(high), log=domain.kind == "loguniform")


def build_sampler(spec: SweepSpec, what: str) -> optuna.samplers.BaseSampler:
    """Build the spec's sampler with a seed of its own for this one ask; a grid's points are all enqueued."""
    seed, start = _seed(spec, what), spec.search.startup_trials
    match spec.search.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=start)
        case "gp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=start)  # needs torch; the driver has it
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def _seed(spec: SweepSpec, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{spec.search.seed} {what}".encode()).digest()[:4], "big")
