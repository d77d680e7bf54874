"""A sweep without training: the real schedule, searchers and rungs, an oracle for a model, and a clock of steps."""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from problems import STEPS, Problem

from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.rungs import build_rungs
from deft_ray.sweep.schedule import Schedule
from deft_ray.sweep.tuning import asha_lets_on
from deft_ray.train.course import rung_steps

TASK = "nano-sentiment"


@dataclass(frozen=True)
class Ended:
    """One trial that has ended.

    Args:
        steps: Training steps of the whole sweep until then.
        score: Its score, without the noise that the search sees.
        density: Its density, likewise.
        feasible: Whether it is complete and, by its score without noise, within the limit.
    """

    steps: int
    score: float
    density: float
    feasible: bool


def build_spec(problem: Problem, seed: int, trials: int, **search: Any) -> SweepSpec:
    """Write the spec of a sweep over a problem."""
    spec, faults = check_tree(
        {
            "name": problem.name,
            "data": {"tasks": [TASK]},
            "deft": problem.deft,
            "train": {"steps": STEPS, **problem.train},
            "baseline": problem.baseline,
            "search": {"trials": trials, "seed": seed, "seeds": [seed], **search},
            "constraint": {"max_score_drop": problem.max_score_drop},
        }
    )
    if spec is None:
        raise ValueError(faults)
    return spec


def simulate(problem: Problem, spec: SweepSpec, budget: int, workers: int = 4) -> Iterator[Ended]:
    """Run a sweep of so many steps on several workers; yields its trials as they end.

    Args:
        problem: Measures instead of a training.
        spec: See :func:`build_spec`.
        budget: Training steps, after which no trial starts.
        workers: Trials at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        schedule = Schedule(spec, Path(folder), [])
        rungs = build_rungs(spec, Path(folder), asha_lets_on, schedule.baseline_score)
        limit = limit_of(problem)
        clock, spent, running = 0, 0, list[tuple[int, int, TrialSpec, list[tuple[int, int | None]]]]()
        order = 0
        while True:
            while len(running) < workers and spent < budget and isinstance(trial := schedule.next(), TrialSpec):
                stops = [(step, rung) for step, rung in rung_steps(STEPS, trial.rungs).items()] + [(STEPS, None)]
                heapq.heappush(running, (clock + stops[0][0], order, trial, stops))
                order += 1
            if not running:
                return
            clock, number, trial, stops = heapq.heappop(running)
            (step, rung), *later = stops
            score, density = problem.measure(trial.flat(), step, trial.seed)
            lost = not (math.isfinite(score) and math.isfinite(density))
            if not lost and rung is not None and (rungs is None or _goes_on(rungs, trial, rung, step, score, density)):
                heapq.heappush(running, (clock + later[0][0] - step, number, trial, later))
                continue
            spent += step
            status = "diverged" if lost else "complete" if rung is None else "pruned"
            worth = problem.truth(trial.flat(), step)
            yield Ended(spent, *worth, status == "complete" and worth[0] >= limit)
            schedule.ended(_record(trial, step, score, density, status))


def limit_of(problem: Problem) -> float:
    """Return the least score that is feasible."""
    return problem.truth(problem.without_loss(), STEPS)[0] - problem.max_score_drop - 1e-9


def _goes_on(rungs: Any, trial: TrialSpec, rung: int, step: int, score: float, density: float) -> bool:
    named = {"task": trial.task, "trial": trial.trial, "seed": trial.seed, "baseline": trial.baseline}
    return bool(rungs.arrive(**named, rung=rung, step=step, score=score, density=density))


def _record(trial: TrialSpec, steps: int, score: float, density: float, status: str) -> Record:
    return Record(
        trial=trial.trial,
        task=trial.task,
        seed=trial.seed,
        baseline=trial.baseline,
        setting=trial.setting,
        status=status,
        score=score,
        density=density,
        score_metric="accuracy",
        dtype="float32",
        activation="",
        config=dict(trial.flat()),
        steps=steps,
    )
