"""Which trial comes next: baselines first, then sampled points, asked from one searcher per task, then front seeds.

Ids follow from the place in the plan. So the next trial is a function of the spec and of what has ended, whatever was
interrupted in between. Front seeds are further seeds for settings that stand on the front once all points have ended,
and again for those that stand on it when their means have moved it; ``t0007-s2`` is the third seed of ``t0007``.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from deft_ray.results.across import ALL_TASKS
from deft_ray.results.front import REFERENCE
from deft_ray.results.records import Record
from deft_ray.spec.points import count_points, sample_of
from deft_ray.spec.resolve import resolve_baseline, resolve_trial
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.front_seeds import FrontTrial, front_trials
from deft_ray.sweep.searcher import TaskSearch
from deft_ray.sweep.warm_start import EARLIER_TASKS, from_sweeps, keep, kept, known_points


class Nothing(enum.Enum):
    """Why there is no next trial."""

    YET = "a trial has to end first"
    MORE = "the sweep is done"


class Schedule:
    """The order of a sweep's trials.

    Args:
        spec: The sweep's spec.
        folder: Where the studies' journals lie.
        records: Trials that have ended already.
    """

    def __init__(self, spec: SweepSpec, folder: Path, records: list[Record]) -> None:
        self.spec = spec
        self._tasks, self._seeds, self._points = spec.data.tasks, spec.search.seeds, count_points(spec)
        self._folder, self._searches = folder, dict[str, TaskSearch]()
        self._one_by_one = EARLIER_TASKS in spec.search.warm_start
        self._shared = spec.search.scope == "shared"
        self._ended: dict[str, Record] = {}
        self._given: set[str] = set()
        self._abandoned: set[str] = set()
        self._skipped = frozenset[str]()
        self.baselines = [(task, seed) for task in self._tasks for seed in self._seeds]
        self._order = deque(self._in_order())
        for record in records:
            self._ended[record.trial] = record
        for number in range(self._points):
            for task in self._tasks:
                self._tell_if_ended(task, number)

    @property
    def failed_tasks(self) -> list[str]:
        """Tasks of which a baseline ended without a result."""
        return [task for task in self._tasks if any(self._is_lost(task, seed) for seed in self._seeds)]

    @property
    def has_baselines(self) -> bool:
        """Whether every baseline has ended."""
        return all(trial_id(index) in self._ended for index in range(len(self.baselines)))

    @property
    def remaining(self) -> int:
        """Trials that have not ended and will still run."""
        lost = self.failed_tasks
        planned = [trial for trial, task, baseline in self._all() if baseline or task not in lost]
        points = sum(trial not in self._ended and trial not in self._skipped for trial in planned)
        return points or len(self._front_trials())

    @property
    def under_way(self) -> int:
        """Trials that were given out and have not ended."""
        return len(self._under_way)

    @property
    def _under_way(self) -> set[str]:
        return self._given - self._ended.keys() - self._abandoned

    @property
    def skipped(self) -> int:
        """Sampled trials that will not run since :meth:`sample_no_more`."""
        lost = self.failed_tasks
        return sum(trial in self._skipped for trial, task, _ in self._all() if task not in lost)

    def sample_no_more(self) -> None:
        """Start no further point; those that were started, before an interruption too, go on; front seeds follow."""
        if not self._skipped:
            points = [(task, number) for number in range(self._points) for task in self._tasks]
            begun = {self._setting(*point) for point in points if self._has_begun(*point)}
            self._skipped = frozenset(
                self._id(*point, place)
                for point in points
                if self._setting(*point) not in begun
                for place in range(len(self._seeds))
            )

    def _has_begun(self, task: str, number: int) -> bool:
        """Whether a trial of a point was started, or its study asked for it."""
        trials = [self._id(task, number, place) for place in range(len(self._seeds))]
        started = any(trial in self._given or trial in self._ended for trial in trials)
        return started or (self._has_baselines(task) and self._search(task).asked(number))

    def next_baseline(self) -> TrialSpec | Nothing:
        """Return the next baseline to start; ``YET`` while the last ones train, ``MORE`` once all have ended."""
        for index, (task, seed) in enumerate(self.baselines):
            trial = trial_id(index)
            if trial not in self._ended and trial not in self._given:
                self._given.add(trial)
                return resolve_baseline(self.spec, trial, task, seed, self._baseline_id(task))
        return Nothing.YET if not self.has_baselines else Nothing.MORE

    def next(self, beside_baselines: bool = False) -> TrialSpec | Nothing:
        """Return the next trial to start; each is given out once.

        Args:
            beside_baselines: Whether sampled trials may be given out before the baselines of their task have ended, in
                a sweep that can make use of them without. They are to be begun once those train that :meth:`behind`
                names.
        """
        baseline = self.next_baseline()
        if isinstance(baseline, TrialSpec):
            return baseline
        blocked = False
        lost = self.failed_tasks
        while self._order and not (self._order[0][1] not in lost and self._to_start(*self._order[0])):
            self._order.popleft()
        for number, task in self._order:
            if task in lost:
                continue
            for place, trial in self._to_start(number, task):
                ready = self.has_baselines if self._shared else self._has_baselines(task)
                if not ready and not (beside_baselines and self._needs_no_baselines):
                    blocked = True
                    continue
                if self._one_by_one and not self._have_ended(self._tasks[: self._tasks.index(task)]):
                    return Nothing.YET
                start_from = self._start_of(task, number, place)
                if start_from is None:
                    blocked = True
                    continue
                self._given.add(trial)
                sample, setting = self._search(task).point(number), self._setting(task, number)
                return resolve_trial(self.spec, trial, task, self._seeds[place], sample, setting, start_from, number)
        return Nothing.YET if blocked else self._next_front_seed()

    @property
    def _needs_no_baselines(self) -> bool:
        """Whether a trial can train while the baselines do.

        Not on a path, which starts from one, nor with rungs, which judge by them, nor where points are for all tasks,
        nor where the reference point is the user's own, which is held against them.
        """
        search, own_reference = self.spec.search, self.spec.reference.point != REFERENCE
        return not (search.path or search.scheduler != "none" or self._shared or own_reference)

    def behind(self, trial: TrialSpec) -> list[str]:
        """Name the baselines that have to train before a trial is begun: those of its task that have not ended."""
        if trial.baseline:
            return []
        mine = [trial_id(index) for index, (task, _) in enumerate(self.baselines) if task == trial.task]
        return [baseline for baseline in mine if baseline not in self._ended]

    def abandoned(self, trial: str) -> None:
        """Take note of a trial that was given out and will not run."""
        self._abandoned.add(trial)

    def _to_start(self, number: int, task: str) -> list[tuple[int, str]]:
        """Trials of a point that are still to be started, by the place of their seed."""
        trials = [(place, self._id(task, number, place)) for place in range(len(self._seeds))]
        gone = (self._ended, self._given, self._skipped)
        return [(place, trial) for place, trial in trials if not any(trial in each for each in gone)]

    def _start_of(self, task: str, number: int, place: int) -> str | None:
        """Trial that a point of a path goes on from: the last one before it that is complete; None while one trains.

        Empty where there is no path.
        """
        if self.spec.search.path is None:
            return ""
        before = [self._id(task, earlier, place) for earlier in range(number)]
        if not all(trial in self._ended for trial in before):
            return None
        whole = [trial for trial in before if self._ended[trial].status == "complete"]
        return whole[-1] if whole else trial_id(self.baselines.index((task, self._seeds[place])))

    def _next_front_seed(self) -> TrialSpec | Nothing:
        due = self._front_trials()
        for one in due:
            first = FrontTrial(one.task, self._baseline_id(one.task), one.place, baseline=True)
            if one.trial in self._given or not (one.baseline or first.trial in self._ended):
                continue
            self._given.add(one.trial)
            return self._resolve(one).model_copy(update={"rungs": ()})
        return Nothing.YET if self.spec.search.front_seeds and (due or self._under_way) else Nothing.MORE

    def _resolve(self, one: FrontTrial) -> TrialSpec:
        seed = self._seeds[0] + one.place
        if one.baseline:
            return resolve_baseline(self.spec, one.trial, one.task, seed, one.setting)
        sample = sample_of(self.spec, self._ended[one.setting].config)
        return resolve_trial(self.spec, one.trial, one.task, seed, sample, one.setting)

    def _front_trials(self) -> list[FrontTrial]:
        """Front seeds that are due and have not ended; none before every point has ended."""
        lost = self.failed_tasks
        if self.spec.search.front_seeds is None or not self._have_ended(self._tasks):
            return []
        baselines = {task: self._baseline_id(task) for task in self._tasks if task not in lost}
        return [one for one in front_trials(self.spec, self._ended, baselines) if one.trial not in self._ended]

    def _have_ended(self, tasks: Sequence[str]) -> bool:
        """Whether every trial of these tasks has ended that will run at all."""
        wanted = set(tasks) - set(self.failed_tasks)
        return all(trial in self._ended or trial in self._skipped for trial, task, _ in self._all() if task in wanted)

    def _in_order(self) -> Iterator[tuple[int, str]]:
        """Points as (number, task): the tasks in turn, or one after another where each starts from those before."""
        if self._one_by_one:
            yield from ((number, task) for task in self._tasks for number in range(self._points))
        else:
            yield from ((number, task) for number in range(self._points) for task in self._tasks)

    def _setting(self, task: str, number: int) -> str:
        """Name of a point: its trial of the first seed, and where a point is for all tasks, of the first task."""
        return self._id(self._tasks[0] if self._shared else task, number, 0)

    def _search(self, task: str) -> TaskSearch:
        """The task's searcher, or that of all tasks; what it starts from is read once, and kept."""
        task = ALL_TASKS if self._shared else task
        if task not in self._searches:
            file = self._folder / f"{task}.warm.jsonl"
            known = kept(file) if self.spec.search.warm_start else []
            if known is None:
                known = from_sweeps(self.spec, task)
                if self._one_by_one:
                    known += known_points(self._ended.values(), self._tasks[: self._tasks.index(task)])
                keep(file, known)
            self._searches[task] = TaskSearch(self.spec, task, self._folder, known)
        return self._searches[task]

    def close(self) -> None:
        """Leave no point running in a study, as the sweep ends; one that goes on needs a schedule of its own."""
        for task in (ALL_TASKS,) if self._shared else self._tasks:
            if task in self._searches or (self._folder / f"{task}.log").is_file():
                self._search(task).close()

    def ended(self, record: Record) -> None:
        """Take note of an ended trial, and tell its study once all of its point's seeds have ended."""
        self._ended[record.trial] = record
        if record.is_front_seed:
            return  # its point has been told
        place = int(record.trial[1:]) - len(self.baselines)
        if place >= 0:
            self._tell_if_ended(record.task, place // (len(self._tasks) * len(self._seeds)))
        else:
            for number in range(self._points):
                self._tell_if_ended(record.task, number)

    def _tell_if_ended(self, task: str, number: int) -> None:
        lost = self.failed_tasks
        tasks = [each for each in self._tasks if each not in lost] if self._shared else [task]
        ids = [self._id(each, number, place) for each in tasks for place in range(len(self._seeds))]
        baselines = [self._baseline(each, seed) for each in tasks for seed in self._seeds]
        known = [record for record in baselines if record is not None]
        if ids and all(trial in self._ended for trial in ids) and len(known) == len(baselines):
            self._search(task).point(number)
            self._search(task).tell(number, [self._ended[trial] for trial in ids], known)

    def _id(self, task: str, number: int, place: int) -> str:
        tasks, seeds = len(self._tasks), len(self._seeds)
        return trial_id(len(self.baselines) + (number * tasks + self._tasks.index(task)) * seeds + place)

    def _all(self) -> list[tuple[str, str, bool]]:
        baselines = [(trial_id(index), task, True) for index, (task, _) in enumerate(self.baselines)]
        sampled = [
            (self._id(task, number, place), task, False)
            for number in range(self._points)
            for task in self._tasks
            for place in range(len(self._seeds))
        ]
        return baselines + sampled

    def _baseline(self, task: str, seed: int) -> Record | None:
        return self._ended.get(trial_id(self.baselines.index((task, seed))))

    def baseline_score(self, task: str, seed: int) -> float | None:
        """Score of the baseline of a task and one of the sweep's seeds; None before it has ended."""
        record = self._baseline(task, seed)
        return None if record is None else record.score

    def _baseline_id(self, task: str) -> str:
        """The task's baseline of the first seed."""
        return trial_id(self.baselines.index((self._tasks[0] if self._shared else task, self._seeds[0])))

    def _has_baselines(self, task: str) -> bool:
        return all(self._baseline(task, seed) is not None for seed in self._seeds)

    def _is_lost(self, task: str, seed: int) -> bool:
        record = self._baseline(task, seed)
        return record is not None and not record.measured


def trial_id(index: int) -> str:
    """Name a trial by its place in the plan."""
    return f"t{index:04d}"
