"""How fast searches find a front: hypervolume over training steps, for several methods and problems.

    python benchmarks/search/compare.py [--seeds 20] [--trials 60] [--problems smooth,crossing,conditional]

Every method has the same budget in training steps, four workers, and the same noise. Writes ``results/search.json``:
means and 95 % intervals of the hypervolume, as a share of the best known one, over steps; and the steps that each
method takes to 95 % of it. Ray's OptunaSearch runs as it ships, one trial at a time, without a score limit, as it has
none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from problems import PROBLEMS, STEPS, Problem, best_front
from simulate import Ended, build_spec, hypervolumes, simulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from store import store

#: Settings of ``search`` by method.
METHODS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random"},
    "nsga2": {"sampler": "nsga2"},
    "tpe": {"sampler": "tpe"},
    "gp": {"sampler": "gp"},
    "random, mo_asha": {"sampler": "random", "scheduler": "mo_asha"},
    "tpe, asha": {"sampler": "tpe", "scheduler": "asha"},
    "tpe, mo_asha": {"sampler": "tpe", "scheduler": "mo_asha"},
    "mo_tpe": {"sampler": "mo_tpe"},
    "mo_tpe, mo_asha": {"sampler": "mo_tpe", "scheduler": "mo_asha"},
}
RAY = "Ray's OptunaSearch"
REFERENCE = (0.0, 1.0)
#: Shares of the budget at which hypervolumes are taken.
MARKS = 40
ENOUGH = 0.95


def main() -> None:
    """Run every method on every problem with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60, help="budget, in trials of full length")
    parser.add_argument("--problems", default=",".join(problem.name for problem in PROBLEMS))
    parser.add_argument("--methods", default=";".join([*METHODS, RAY]), help="semicolon between them")
    parser.add_argument("--dry", action="store_true", help="print, and store nothing")
    given = parser.parse_args()
    chosen = [problem for problem in PROBLEMS if problem.name in given.problems.split(",")]
    found = [
        compare(problem, method, given.seeds, given.trials * STEPS)
        for problem in chosen
        for method in given.methods.split(";")
    ]
    if not given.dry:
        store("search", {"seeds": given.seeds, "budget_steps": given.trials * STEPS, "runs": found})


def compare(problem: Problem, method: str, seeds: int, budget: int) -> dict[str, Any]:
    """One method on one problem: its hypervolumes over steps, and the steps to enough."""
    front = best_front(problem)
    best = float(moocore.hypervolume(front * [-1.0, 1.0], ref=[-REFERENCE[0], REFERENCE[1]]))
    at = [round(budget * (mark + 1) / MARKS) for mark in range(MARKS)]
    began, curves, reached, trials = time.perf_counter(), [], [], 0
    for seed in range(seeds):
        ended = list(run(problem, method, seed, budget))
        trials += len(ended)
        curves.append([volume / best for volume in hypervolumes(ended, at, REFERENCE)])
        reached.append(next((steps for steps, share in zip(at, curves[-1], strict=True) if share >= ENOUGH), None))
    means, half = np.mean(curves, axis=0), 1.96 * np.std(curves, axis=0, ddof=1) / seeds**0.5
    known = [steps for steps in reached if steps is not None]
    median = statistics.median(known) if len(known) > seeds / 2 else None
    print(
        f"{problem.name:12} {method:20} {means[-1]:.3f} ± {half[-1]:.3f}, to {ENOUGH:.0%}: {median} steps", flush=True
    )
    return {
        "problem": problem.name,
        "method": method,
        "best_hypervolume": best,
        "steps": at,
        "mean": means.tolist(),
        "half_interval": half.tolist(),
        "median_steps_to_enough": median,
        "reached_enough": len(known),
        "ms_per_trial": 1e3 * (time.perf_counter() - began) / trials,
    }


def run(problem: Problem, method: str, seed: int, budget: int) -> Iterator[Ended]:
    """One run of a method."""
    if method == RAY:
        return run_ray(problem, seed, budget)
    trials = 40 * budget // STEPS
    return simulate(problem, build_spec(problem, seed, trials, **METHODS[method]), budget)


def run_ray(problem: Problem, seed: int, budget: int) -> Iterator[Ended]:
    """Ray Tune's own searcher with two objectives, every trial at full length; the limit is applied afterwards."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    leaves = {f"deft.{key}": value for key, value in problem.deft.items()}
    leaves |= {f"train.{key}": value for key, value in problem.train.items()}
    domains = {name: next(iter(domain.items())) for name, domain in leaves.items()}
    space = {
        name: getattr(tune, kind)(*([args] if kind == "choice" else args)) for name, (kind, args) in domains.items()
    }
    search = OptunaSearch(space, metric=["score", "density"], mode=["max", "min"], seed=seed)
    defaults = {"deft.epsilon": 1e-7, "deft.beta": 20.0, "deft.approximation": "l0", "deft.adaptive": False}
    defaults |= {"deft.lambda_init": 0.8, "train.learning_rate": 2e-3}
    score, density = problem.measure({**defaults, **problem.baseline, "deft.alpha": 0.0}, STEPS, 0)
    limit, spent = score - problem.max_score_drop, STEPS
    yield Ended(spent, score, density, True)
    while spent < budget:
        name = f"t{spent}"
        config = search.suggest(name)
        score, density = problem.measure({**defaults, **config}, STEPS, 0)
        search.on_trial_complete(name, {"score": score, "density": density})
        spent += STEPS
        yield Ended(spent, score, density, score >= limit - 1e-9)


if __name__ == "__main__":
    main()
