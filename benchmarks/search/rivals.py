"""Searches of other packages on the same problems, with the same workers and budget.

Neither knows a score limit: it is applied to what they found.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from problems import STEPS, Problem
from simulate import Ended, limit_of

#: Steps at which successive halving looks at a trial.
RUNGS = (9, 27)


class Rival(Protocol):
    """A search with its scheduler."""

    def ask(self, number: int) -> dict[str, Any]:
        """Return a trial's configuration."""

    def goes_on(self, number: int, step: int, score: float, density: float) -> bool:
        """Tell a result at a rung; returns whether the trial trains on."""

    def tell(self, number: int, score: float, density: float) -> None:
        """Tell the result of a whole trial."""


class RayOptuna:
    """Ray Tune's OptunaSearch with two objectives as it ships; every trial at full length."""

    def __init__(self, problem: Problem, seed: int) -> None:
        from ray import tune
        from ray.tune.search.optuna import OptunaSearch

        logging.getLogger("ray.tune.search.optuna.optuna_search").setLevel(logging.ERROR)
        space = {name: getattr(tune, kind)(*args) for name, (kind, args) in _domains(problem).items()}
        self._search = OptunaSearch(space, metric=["score", "density"], mode=["max", "min"], seed=seed)

    def ask(self, number: int) -> dict[str, Any]:
        """See :class:`Rival`."""
        return dict(self._search.suggest(f"t{number}"))

    def goes_on(self, number: int, step: int, score: float, density: float) -> bool:
        """See :class:`Rival`."""
        return True

    def tell(self, number: int, score: float, density: float) -> None:
        """See :class:`Rival`."""
        self._search.on_trial_complete(f"t{number}", {"score": score, "density": density})


class SyneMoAsha:
    """Syne Tune's MO-ASHA, where the package is installed: random points, non-dominated sorting, an ε-net."""

    def __init__(self, problem: Problem, seed: int) -> None:
        from syne_tune import config_space
        from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

        np.random.seed(seed)
        space = {name: getattr(config_space, kind)(*args) for name, (kind, args) in _domains(problem).items()}
        self._search = MOASHA(
            space, ["error", "density"], time_attr="step", max_t=STEPS, grace_period=RUNGS[0], random_seed=seed
        )
        self._trials: dict[int, Any] = {}

    def ask(self, number: int) -> dict[str, Any]:
        """See :class:`Rival`."""
        import datetime

        from syne_tune.backend.trial_status import Trial

        suggestion = self._search.suggest()
        self._trials[number] = Trial(number, suggestion.config, datetime.datetime.now(datetime.UTC))
        self._search.on_trial_add(self._trials[number])
        return dict(suggestion.config)

    def goes_on(self, number: int, step: int, score: float, density: float) -> bool:
        """See :class:`Rival`."""
        from syne_tune.optimizer.scheduler import SchedulerDecision

        result = {"step": step, "error": 1.0 - score, "density": density}
        return bool(self._search.on_trial_result(self._trials[number], result) != SchedulerDecision.STOP)

    def tell(self, number: int, score: float, density: float) -> None:
        """See :class:`Rival`."""
        self._search.on_trial_complete(
            self._trials[number], {"step": STEPS, "error": 1.0 - score, "density": density}
        )  # fmt: skip


RIVALS: dict[str, Callable[[Problem, int], Rival]] = {
    "Ray's OptunaSearch": RayOptuna,
    "Syne Tune's MO-ASHA": SyneMoAsha,
}


def run_rival(problem: Problem, rival: Rival, seed: int, budget: int, workers: int = 4) -> Iterator[Ended]:
    """Run a rival as :func:`simulate.simulate` runs ours, the baseline first; yields its trials as they end."""
    base = problem.without_loss()
    limit, spent, clock, number = limit_of(problem), STEPS, STEPS, 0
    yield Ended(spent, *problem.truth(base, STEPS), True)
    running: list[tuple[int, int, int, dict[str, Any]]] = []
    while True:
        while len(running) < workers and spent < budget:
            heapq.heappush(running, (clock + RUNGS[0], number, RUNGS[0], {**base, **rival.ask(number)}))
            number += 1
        if not running:
            return
        clock, mine, step, config = heapq.heappop(running)
        score, density = problem.measure(config, step, seed)
        if step < STEPS and rival.goes_on(mine, step, score, density):
            later = min(rung for rung in (*RUNGS, STEPS) if rung > step)
            heapq.heappush(running, (clock + later - step, mine, later, config))
            continue
        spent += step
        if step == STEPS:
            rival.tell(mine, score, density)
        worth = problem.truth(config, step)
        yield Ended(spent, *worth, step == STEPS and worth[0] >= limit)


def _domains(problem: Problem) -> dict[str, tuple[str, list[Any]]]:
    leaves = {f"deft.{key}": value for key, value in problem.deft.items()}
    leaves |= {f"train.{key}": value for key, value in problem.train.items()}
    found = {name: next(iter(domain.items())) for name, domain in leaves.items()}
    return {name: (kind, [args] if kind == "choice" else args) for name, (kind, args) in found.items()}
