"""Which trial comes next: baselines first, then sampled points, asked from one Optuna study per task.

Ids follow from the place in the plan, and each ask draws from a sampler seeded by its own number. So the next trial is
a function of the spec and of what has ended, whatever was interrupted in between.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from deft_ray.results.records import Record
from deft_ray.spec.domains import Domain
from deft_ray.spec.resolve import resolve_baseline, resolve_trial
from deft_ray.spec.schema import SweepSpec, TrialSpec

optuna.logging.set_verbosity(logging.ERROR)


class Nothing(enum.Enum):
    """Why there is no next trial."""

    YET = "a trial has to end first"
    MORE = "the sweep is done"


@dataclass
class _Point:
    """One sampled configuration: a trial for every seed, one Optuna trial."""

    number: int
    waiting: list[int]
    results: list[Record] = field(default_factory=list)


class TaskSearch:
    """The points of one task.

    Args:
        spec: The sweep's spec.
        task: The task.
        folder: Where the study's journal lies; the study goes on from it.
    """

    def __init__(self, spec: SweepSpec, task: str, folder: Path) -> None:
        self.spec, self.task = spec, task
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / f"{task}.log"))),
                study_name=task,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        self._space = {dotted: to_distribution(domain) for dotted, domain in spec.space.items()}
        if not self._study.get_trials(deepcopy=False):
            for point in spec.search.try_first[: spec.search.trials]:
                self._study.enqueue_trial(dict(point))

    def point(self, number: int) -> dict[str, str | int | float | bool]:
        """Return the sampled values of a point; asks the study if it has none of this number."""
        known = self._study.get_trials(deepcopy=False)
        if number < len(known) and known[number].state != TrialState.WAITING:
            return dict(known[number].params)
        self._study.sampler = build_sampler(self.spec, f"{self.task} {number}")
        trial = self._study.ask(self._space)
        assert trial.number == number, f"asked for point {number} of {self.task}, got {trial.number}"
        return dict(trial.params)

    def tell(self, number: int, results: list[Record]) -> None:
        """Tell the study how a point ended, once; the values are means over its seeds."""
        trial: FrozenTrial = self._study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            return
        values = objectives(results)
        if values is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, list(values))


def objectives(results: list[Record]) -> tuple[float, float] | None:
    """Return (mean score, mean density) over seeds, or None if any of them has none."""
    pairs = [(record.score, record.density) for record in results if record.status == "complete"]
    if len(pairs) < len(results) or not pairs:
        return None
    scores = [score for score, _ in pairs if score is not None and math.isfinite(score)]
    densities = [density for _, density in pairs if density is not None and math.isfinite(density)]
    if len(scores) < len(pairs) or len(densities) < len(pairs):
        return None
    return sum(scores) / len(scores), sum(densities) / len(densities)


def to_distribution(domain: Domain) -> BaseDistribution:
    """Return Optuna's name for a domain."""
    if domain.kind == "choice":
        return CategoricalDistribution(domain.args)
    low, high = domain.args
    if domain.kind == "randint":
        return IntDistribution(int(low), int(high))
    return FloatDistribution(float(low), float(high), log=domain.kind == "loguniform")


def build_sampler(spec: SweepSpec, what: str) -> optuna.samplers.BaseSampler:
    """Build the spec's sampler with a seed of its own for this one ask."""
    digest = hashlib.sha256(f"{spec.search.seed} {what}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if spec.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if spec.search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=spec.search.startup_trials)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=spec.search.startup_trials)


class Schedule:
    """The order of a sweep's trials.

    Args:
        spec: The sweep's spec.
        folder: Where the studies' journals lie.
        records: Trials that have ended already.
    """

    def __init__(self, spec: SweepSpec, folder: Path, records: list[Record]) -> None:
        self.spec = spec
        self._tasks, self._seeds = spec.data.tasks, spec.search.seeds
        self._searches = {task: TaskSearch(spec, task, folder) for task in self._tasks}
        self._ended: dict[str, Record] = {}
        self._given: set[str] = set()
        self.baselines = [(task, seed) for task in self._tasks for seed in self._seeds]
        for record in records:
            self._ended[record.trial] = record
        for number in range(spec.search.trials):
            for task in self._tasks:
                self._tell_if_ended(task, number)

    @property
    def failed_tasks(self) -> list[str]:
        """Tasks of which a baseline ended without a result."""
        return [task for task in self._tasks if any(self._is_lost(task, seed) for seed in self._seeds)]

    @property
    def remaining(self) -> int:
        """Trials that have not ended and will still run."""
        lost = self.failed_tasks
        return sum(trial not in self._ended and (baseline or task not in lost) for trial, task, baseline in self._all())

    def next(self) -> TrialSpec | Nothing:
        """Return the next trial to start; each is given out once."""
        blocked = False
        for index, (task, seed) in enumerate(self.baselines):
            trial = trial_id(index)
            if trial not in self._ended and trial not in self._given:
                self._given.add(trial)
                return resolve_baseline(self.spec, trial, task, seed)
        lost = self.failed_tasks
        for number in range(self.spec.search.trials):
            for task in self._tasks:
                if task in lost:
                    continue
                for place, seed in enumerate(self._seeds):
                    trial = self._id(task, number, place)
                    if trial in self._ended or trial in self._given:
                        continue
                    if not self._has_baselines(task):
                        blocked = True
                        continue
                    self._given.add(trial)
                    return resolve_trial(self.spec, trial, task, seed, self._searches[task].point(number))
        return Nothing.YET if blocked else Nothing.MORE

    def ended(self, record: Record) -> None:
        """Take note of an ended trial, and tell its study once all of its point's seeds have ended."""
        self._ended[record.trial] = record
        place = int(record.trial[1:]) - len(self.baselines)
        if place >= 0:
            self._tell_if_ended(record.task, place // (len(self._tasks) * len(self._seeds)))

    def _tell_if_ended(self, task: str, number: int) -> None:
        ids = [self._id(task, number, place) for place in range(len(self._seeds))]
        if all(trial in self._ended for trial in ids):
            self._searches[task].point(number)
            self._searches[task].tell(number, [self._ended[trial] for trial in ids])

    def _id(self, task: str, number: int, place: int) -> str:
        tasks, seeds = len(self._tasks), len(self._seeds)
        return trial_id(len(self.baselines) + (number * tasks + self._tasks.index(task)) * seeds + place)

    def _all(self) -> list[tuple[str, str, bool]]:
        baselines = [(trial_id(index), task, True) for index, (task, _) in enumerate(self.baselines)]
        sampled = [
            (self._id(task, number, place), task, False)
            for number in range(self.spec.search.trials)
            for task in self._tasks
            for place in range(len(self._seeds))
        ]
        return baselines + sampled

    def _baseline(self, task: str, seed: int) -> Record | None:
        return self._ended.get(trial_id(self.baselines.index((task, seed))))

    def _has_baselines(self, task: str) -> bool:
        return all(self._baseline(task, seed) is not None for seed in self._seeds)

    def _is_lost(self, task: str, seed: int) -> bool:
        record = self._baseline(task, seed)
        return record is not None and objectives([record]) is None


def trial_id(index: int) -> str:
    """Name a trial by its place in the plan."""
    return f"t{index:04d}"
