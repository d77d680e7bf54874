"""The benchmark's simulator: a sweep without training that counts steps as a sweep with training would."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest

from deft_ray.spec.points import grid

BENCHMARK = str(Path(__file__).parents[2] / "benchmarks" / "search")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's modules, which stand in a folder of scripts."""
    monkeypatch.syspath_prepend(BENCHMARK)
    import problems
    import simulate

    yield simulate, {problem.name: problem for problem in problems.PROBLEMS}, problems
    for name in ("problems", "simulate", "rivals", "table"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["smooth", "crossing", "conditional"])
def test_without_rungs_every_trial_costs_its_whole_length(benchmark: Any, name: str) -> None:
    simulate, problems, _ = benchmark
    problem = problems[name]
    ended = list(simulate.simulate(problem, simulate.build_spec(problem, 0, 50, sampler="random"), 10 * 81))
    assert [one.steps for one in ended] == [81 * number for number in range(1, len(ended) + 1)]
    assert 10 <= len(ended) <= 10 + 4, "those that run when the budget is spent go on to their end"
    again = list(simulate.simulate(problem, simulate.build_spec(problem, 0, 50, sampler="random"), 10 * 81))
    assert again == ended
    baseline = ended[0].score
    assert all(one.feasible == (one.score >= baseline - problem.max_score_drop - 1e-9) for one in ended)


def test_with_rungs_most_trials_cost_a_ninth(benchmark: Any) -> None:
    simulate, problems, _ = benchmark
    problem = problems["smooth"]
    spec = simulate.build_spec(problem, 0, 500, sampler="random", scheduler="mo_asha")
    ended = list(simulate.simulate(problem, spec, 20 * 81))
    costs = np.diff([0, *(one.steps for one in ended)])
    assert set(costs) == {9, 27, 81}
    assert (costs == 9).sum() > (costs == 27).sum() > (costs == 81).sum() > 3
    assert not any(one.feasible for one, cost in zip(ended, costs, strict=True) if cost < 81)


def test_the_recorded_table_is_every_combination_of_its_spec(benchmark: Any) -> None:
    """Its best point by hand, from the rows alone."""
    simulate, _, module = benchmark
    import table

    problem, rows = table.load_table(), table.pq.read_table(table.TABLE).to_pylist()
    points = grid(simulate.build_spec(problem, 0, 1))
    assert len(points) == 210
    whole = {**problem.without_loss(), **points[0]}
    for point in points:
        config = {**whole, **point}
        assert all(np.isfinite(problem.measure(config, steps, 0)).all() for steps in (9, 27, 81)), point
    last = [row for row in rows if row["step"] == 81]
    (baseline,) = (row for row in last if row["baseline"])
    assert problem.measure(problem.without_loss(), 81, 0) == (baseline["score"], baseline["density"])
    best = min(row["density"] for row in last if row["score"] >= baseline["score"] - problem.max_score_drop)
    front = module.best_front(problem)
    assert front[:, 1].min() == best
    assert (front[:, 0] >= baseline["score"] - problem.max_score_drop - 1e-9).all()


@pytest.mark.parametrize(
    ("name", "rate", "epsilons"), [("smooth", -2.7, [-4.0]), ("crossing", -2.4, np.linspace(-7, -2, 101))]
)
def test_the_known_front_is_nearly_the_computed_one(
    benchmark: Any, name: str, rate: float, epsilons: Sequence[float]
) -> None:
    """Beside the best learning rate and ε by the problem's own formula, and a dense row of α."""
    _, problems, module = benchmark
    problem = problems[name]
    base = problem.truth(problem.without_loss(), 81)
    leaves = {**problem.without_loss(), "train.learning_rate": 10**rate}
    points = [
        problem.truth({**leaves, "deft.alpha": alpha, "deft.epsilon": 10**epsilon}, 81)
        for alpha in np.geomspace(0.01, 30.0, 400)
        for epsilon in epsilons
    ]
    check_front(module.best_front(problem), [base, *points], base[0] - problem.max_score_drop, 0.98)


def test_the_conditional_problems_known_front_is_nearly_the_computed_one(benchmark: Any) -> None:
    """Beside the best ε, β and λ at the start by the problem's own formula, with layer scales and without."""
    _, problems, module = benchmark
    problem = problems["conditional"]
    base = problem.truth(problem.without_loss(), 81)
    best = {"deft.epsilon": 1e-5, "deft.beta": 10**1.3, "deft.lambda_init": 1.0}
    points = [
        problem.truth({**best, "deft.alpha": alpha, "deft.approximation": approximation, "deft.adaptive": adaptive}, 81)
        for alpha in np.geomspace(0.01, 30.0, 2000)
        for approximation in ("l0", "sigmoid")
        for adaptive in (False, True)
    ]
    check_front(module.best_front(problem), [base, *points], base[0] - problem.max_score_drop, 0.97)


def check_front(known: np.ndarray, points: Sequence[tuple[float, float]], least: float, share: float) -> None:
    """Hold a known front against these points, the first of them the baseline: for both reference points."""
    computed = np.array([point for point in points if point[0] >= least - 1e-9])
    for reference in ((0.5, 1.0), (least, points[0][1])):
        areas = [
            moocore.hypervolume(values * [-1.0, 1.0], ref=[-reference[0], reference[1]]) for values in (known, computed)
        ]
        assert share < areas[0] / areas[1] <= 1.0


def test_rays_searcher_is_told_which_way_is_better(benchmark: Any) -> None:
    """The better score at the same density, and the lower density at the same score, dominate in its study."""
    _, problems, _ = benchmark
    import rivals

    ray = rivals.RayOptuna(problems["smooth"], 0)
    for number, result in enumerate([(0.9, 0.5), (0.8, 0.5), (0.9, 0.6), (0.95, 0.7)]):
        assert ray.ask(number).keys() == {"deft.alpha", "deft.epsilon", "train.learning_rate"}
        ray.tell(number, *result)
    best = ray._search._ot_study.best_trials
    assert sorted(trial.values for trial in best) == [[0.9, 0.5], [0.95, 0.7]]


def test_a_rival_has_the_same_budget_and_measures(benchmark: Any) -> None:
    _, problems, _ = benchmark
    import rivals

    asked = []

    class Halves:
        """Stops every second trial at its first rung."""

        def ask(self, number: int) -> dict[str, Any]:
            asked.append(number)
            return {"deft.alpha": 0.1 * (number + 1)}

        def goes_on(self, number: int, *_: float) -> bool:
            return number % 2 == 0

        def tell(self, number: int, *_: float) -> None:
            assert number % 2 == 0

    ended = list(rivals.run_rival(problems["smooth"], Halves(), 0, 20 * 81))
    costs = np.diff([0, *(one.steps for one in ended)])
    assert costs[0] == 81, "the baseline"
    assert sorted(set(costs)) == [9, 81]
    assert len(asked) == len(ended) - 1 == list(costs).count(9) + list(costs).count(81) - 1
    assert sum(costs) >= 20 * 81 > sum(costs) - 4 * 81
    assert not any(one.feasible for one, cost in zip(ended, costs, strict=True) if cost == 9)


@pytest.mark.parametrize("name", ["smooth", "crossing", "conditional"])
def test_a_trial_is_measured_the_same_again_and_its_baseline_is_feasible(benchmark: Any, name: str) -> None:
    _, problems, module = benchmark
    problem = problems[name]
    config = {"deft.alpha": 1.0, "deft.epsilon": 1e-4, "deft.beta": 20.0, "deft.approximation": "l0"}
    config |= {"deft.adaptive": True, "deft.lambda_init": 0.8, "train.learning_rate": 2e-3}
    assert problem.measure(config, 27, 0) == problem.measure(config, 27, 0)
    assert problem.measure(config, 27, 0) != problem.measure(config, 27, 1)
    drawn = [problem.measure(config, 81, seed) for seed in range(400)]
    assert np.mean(drawn, axis=0) == pytest.approx(problem.truth(config, 81), abs=2e-3)
    assert np.std(drawn, axis=0) == pytest.approx(problem.noise, abs=1e-3)
    front = module.best_front(problem, draws=500)
    assert (front >= 0).all()
    assert (front <= 1).all()
    assert len(front) > 20, "a good part of the space keeps the limit"
