"""How fast searches find a front: hypervolume over training steps, for several methods and problems.

    python benchmarks/search/compare.py [--seeds 20] [--problems nano,smooth] [--processes 2] [--dry]

Every method has the same budget in training steps, four workers, and the same noise. Writes
``results/search_<problem>.json``: means and 95 % intervals of the hypervolume, as a share of the best known one, over
steps, and the steps that each method takes to 95 % of it. The hypervolume is taken twice: ``whole``, with the reference
point of the product, and ``near``, with the score limit and the baseline's density, where a single good point is not
nearly all of it. ``search_cost.json`` has what asking, telling and scheduling cost per trial when 1,000 are run. With
``--methods`` the stored rows of the others stay. ``syne-tune`` has to be installed beside (``pip install --no-deps
syne-tune``). ``benchmarks/search/page.py`` makes ``docs/search.md`` of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from problems import PROBLEMS, STEPS, Problem, best_front
from rivals import RIVALS, run_rival
from scipy.stats import t as student
from simulate import Ended, build_spec, simulate
from table import TABLE, load_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from store import RESULTS, origin, store

#: Settings of ``search`` by method.
METHODS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random"},
    "nsga2": {"sampler": "nsga2"},
    "tpe": {"sampler": "tpe"},
    "gp": {"sampler": "gp"},
    "mo_tpe": {"sampler": "mo_tpe"},
    "random, mo_asha": {"sampler": "random", "scheduler": "mo_asha"},
    "tpe, asha": {"sampler": "tpe", "scheduler": "asha"},
    "tpe, mo_asha": {"sampler": "tpe", "scheduler": "mo_asha"},
    "mo_tpe, mo_asha": {"sampler": "mo_tpe", "scheduler": "mo_asha"},
}
#: Reference point of the hypervolume, (score, density), by what it is called.
References = dict[str, tuple[float, float]]
#: Of one run and one reference point: steps, and the share of the best known hypervolume since then, where it grew.
Curve = list[tuple[int, float]]
#: Budget in trials of full length; the table has 210 configurations.
BUDGETS = {"nano": 120}
BUDGET = 60
#: Steps of the budget at which hypervolumes are kept.
MARKS = 60
ENOUGH = 0.95
#: Trials in a row that are timed.
MANY = 1000


def main() -> None:
    """Run every method on every problem with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    every = ",".join(["nano", *(problem.name for problem in PROBLEMS)])
    parser.add_argument("--problems", default=every, help="comma between them; none: only what asking costs")
    parser.add_argument("--methods", default=";".join([*METHODS, *RIVALS]), help="semicolon between them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, and store nothing")
    given = parser.parse_args()
    methods, names = given.methods.split(";"), [name for name in given.problems.split(",") if name]
    for method in methods:
        if method in RIVALS:
            RIVALS[method](PROBLEMS[0], 0)  # a package that is missing is missed now, not after hours
    if not given.dry:
        _check_stored(names, methods, given.seeds)
    with ProcessPoolExecutor(given.processes) as pool:
        for name in names:
            jobs = [(name, method, seed) for method in methods for seed in range(given.seeds)]
            curves = dict(zip(jobs, pool.map(_curves, jobs), strict=True))
            mine = {method: [curves[name, method, seed] for seed in range(given.seeds)] for method in methods}
            runs = [summarise(name, method, mine[method]) for method in methods]
            if not given.dry:
                problem = load_problem(name)
                head = {
                    "problem": name,
                    "references": {which: list(point) for which, point in references(problem).items()},
                    "best_hypervolumes": best_hypervolumes(name),
                    "seeds": given.seeds,
                }
                store(f"search_{name}", {**head, "runs": _with_others(f"search_{name}", runs, head)})
    if not given.dry:
        runs = [cost(method) for method in methods if method in METHODS]
        store("search_cost", {"runs": _with_others("search_cost", runs, {})})


def _with_others(name: str, runs: list[dict[str, Any]], head: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the stored rows of methods that were not run beside these, where they were measured alike; in our order."""
    file = RESULTS / f"{name}.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    alike = stored and all(stored.get(key) == value for key, value in head.items())
    here = origin()
    old = [{**{key: stored[key] for key in here}, **row} for row in stored["runs"]] if alike else []
    rows = {row["method"]: row for row in [*old, *({**row, **here} for row in runs)]}
    return [rows[method] for method in [*METHODS, *RIVALS] if method in rows]


def _check_stored(names: list[str], methods: list[str], seeds: int) -> None:
    """Nothing that took hours is overwritten by a part of it that was measured otherwise."""
    for name in names:
        file = RESULTS / f"search_{name}.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        lost = {row["method"] for row in stored.get("runs", ())} - set(methods)
        if lost and stored.get("seeds") != seeds:
            raise SystemExit(
                f"{file.name} has {stored['seeds']} seeds of {', '.join(sorted(lost))}; give --dry, or them too"
            )


def load_problem(name: str) -> Problem:
    """Return a problem by its name."""
    if name == TABLE.stem.split("_")[0]:
        return load_table()
    return next(problem for problem in PROBLEMS if problem.name == name)


def references(problem: Problem) -> References:
    """Return the problem's two reference points."""
    base = problem.truth(problem.without_loss(), STEPS)
    return {"whole": (0.0, 1.0), "near": (base[0] - problem.max_score_drop - 1e-9, base[1])}


@cache
def best_hypervolumes(name: str) -> dict[str, float]:
    """Return a problem's best known hypervolume for each reference point."""
    problem = load_problem(name)
    front = best_front(problem)
    return {which: _hypervolume(front, point) for which, point in references(problem).items()}


def _hypervolume(values: np.ndarray, reference: tuple[float, float]) -> float:
    """Of (score, density), (n, 2)."""
    return float(moocore.hypervolume(values * [-1.0, 1.0], ref=[-reference[0], reference[1]]))


def budget_of(name: str) -> int:
    """Training steps that every method has."""
    return BUDGETS.get(name, BUDGET) * STEPS


def _curves(job: tuple[str, str, int]) -> dict[str, Curve]:
    """One run, by reference point."""
    name, method, seed = job
    problem, budget, values = load_problem(name), budget_of(name), np.empty((0, 2))
    points, best = references(problem), best_hypervolumes(name)
    curves: dict[str, Curve] = {which: [(0, 0.0)] for which in points}
    for ended in run(problem, method, seed, budget):
        if ended.steps > budget:
            break
        if ended.feasible:
            values = np.vstack([values, [ended.score, ended.density]])
            for which, curve in curves.items():
                share = _hypervolume(values, points[which]) / best[which]
                if share > curve[-1][1]:
                    curve.append((ended.steps, share))
        if problem.finite is not None and all(curve[-1][1] >= 1.0 - 1e-9 for curve in curves.values()):
            break  # there is no more to find
    return curves


def summarise(name: str, method: str, curves: list[dict[str, Curve]]) -> dict[str, Any]:
    """Describe one method on one problem."""
    budget = budget_of(name)
    at = [round(budget * (mark + 1) / MARKS) for mark in range(MARKS)]
    parts = {which: _summarise([curve[which] for curve in curves], at) for which in curves[0]}
    for which, part in parts.items():
        end, median = f"{part['mean'][-1]:.3f} ± {part['half_interval'][-1]:.3f}", part["median_steps_to_enough"]
        known = sum(step is not None for step in part["steps_to_enough"])
        print(f"{name:12} {method:20} {which:5} {end}, to {ENOUGH:.0%}: {median} steps, {known} of {len(curves)}")
    return {"method": method, "steps": at, **parts}


def _summarise(curves: list[Curve], at: list[int]) -> dict[str, Any]:
    shares = np.array([[max(share for step, share in curve if step <= steps) for steps in at] for curve in curves])
    half = student.ppf(0.975, len(curves) - 1) * shares.std(axis=0, ddof=1) / len(curves) ** 0.5
    reached = [next((step for step, share in curve if share >= ENOUGH), None) for curve in curves]
    median = statistics.median([step if step is not None else np.inf for step in reached])
    return {
        "mean": shares.mean(axis=0).round(5).tolist(),
        "half_interval": half.round(5).tolist(),
        "median_steps_to_enough": None if np.isinf(median) else median,
        "steps_to_enough": reached,
    }


def cost(method: str) -> dict[str, Any]:
    """Time one run of many trials on the problem with the most leaves; a Gaussian process has a tenth of them."""
    problem, many = PROBLEMS[-1], MANY if METHODS[method]["sampler"] != "gp" else MANY // 10
    ends = [time.perf_counter()]
    for _ in islice(simulate(problem, build_spec(problem, 0, many, **METHODS[method]), 10**9), many):
        ends.append(time.perf_counter())
    trials, seconds, last = len(ends) - 1, ends[-1] - ends[0], 10 * (ends[-1] - ends[-101])
    print(f"{method:20} {trials} trials in {seconds:.1f} s")
    mean = 1e3 * seconds / trials
    return {"method": method, "trials": trials, "seconds": seconds, "ms_per_trial": mean, "ms_per_trial_last_100": last}


def run(problem: Problem, method: str, seed: int, budget: int) -> Iterator[Ended]:
    """One run of a method."""
    if method in RIVALS:
        return run_rival(problem, RIVALS[method](problem, seed), seed, budget)
    trials = 10 * budget // STEPS  # more than the budget pays for: the first rung is a ninth of a trial
    return simulate(problem, build_spec(problem, seed, trials, **METHODS[method]), budget)


if __name__ == "__main__":
    main()
