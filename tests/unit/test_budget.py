"""When a sweep has had enough."""

from __future__ import annotations

import time
from typing import Any

import pytest

from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.sweep.budget import Budget


def make_budget(tasks: tuple[str, ...] = ("nano-sentiment",), began: float | None = None, **limits: Any) -> Budget:
    tree = {"name": "s", "data": {"tasks": list(tasks)}, "train": {"steps": 10}, "budget": limits}
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return Budget(spec, time.time() if began is None else began)


def ended(density: float, number: int, task: str = "nano-sentiment", **fields: Any) -> Record:
    named: dict[str, Any] = {"status": "complete", "score": 0.8, "steps": 10, "wall_s": 1800.0, "baseline": False}
    told = {"trial": f"t{number}", "task": task, "seed": 0, "density": density}
    return Record(score_metric="accuracy", dtype="float32", activation="", **{**told, **named, **fields})


def test_without_limits_nothing_is_ever_spent() -> None:
    records = [ended(0.5, n) for n in range(100)]
    assert make_budget(began=0.0).spent(records) is None
    assert make_budget(began=0.0).stalled(records) is None


def test_hours_of_the_clock() -> None:
    assert make_budget(wall_hours=2, began=time.time() - 7100).spent([]) is None
    assert make_budget(wall_hours=2, began=time.time() - 7300).spent([]) == "budget.wall_hours = 2 is spent"


def test_hours_of_gpus_are_those_of_all_trials_and_workers() -> None:
    budget = make_budget(gpu_hours=4)
    assert budget.spent([ended(0.5, n) for n in range(99)]) is None, "no GPU, no GPU-hours"
    budget.gpus = 4
    assert budget.spent([ended(0.5, 0)]) is None
    assert budget.spent([ended(0.5, n) for n in range(2)]) == "budget.gpu_hours = 4 is spent (4.0)"


def test_gpu_hours_of_trials_that_share_passes_are_their_parts() -> None:
    """Four trials, an hour side by side on one GPU: one hour, not four."""
    budget = make_budget(gpu_hours=1.5)
    budget.gpus = 1
    beside = [ended(0.5, n, wall_s=3600.0, times={"train_s": 700.0, "eval_s": 200.0}) for n in range(4)]
    assert budget.spent(beside) is None
    assert budget.spent([*beside, *beside]) == "budget.gpu_hours = 1.5 is spent (2.0)"


def test_a_sweep_whose_tasks_are_all_lost_has_not_stalled() -> None:
    lost = ended(0.5, 0, status="failed", baseline=True, score=None)
    assert make_budget(stall_trials=1).stalled([lost]) is None


def test_steps_of_pruned_trials_count_as_many_as_were_trained() -> None:
    budget = make_budget(steps=25)
    assert budget.spent([ended(0.5, 0), ended(0.5, 1), ended(0.5, 2, status="pruned", steps=4)]) is None
    assert budget.spent([ended(0.5, n) for n in range(3)]) == "budget.steps = 25 is spent (30)"


def test_a_front_that_no_longer_grows() -> None:
    """0.8 x 0.1 less density is 0.08 more hypervolume."""
    budget = make_budget(stall_trials=3, stall_growth=0.05)
    base = ended(0.9, 0, baseline=True)
    falling = [ended(0.8 - 0.1 * n, n + 1) for n in range(4)]
    flat = [ended(0.5 - 0.001 * n, n + 5) for n in range(3)]
    assert budget.stalled([base, *falling]) is None
    assert budget.stalled([base, *falling, *flat[:2]]) is None
    why = "no hypervolume has grown by 0.05 in the last 3 trials"
    assert budget.stalled([base, *falling, *flat]) == why
    assert budget.stalled([base, *falling, *flat, ended(0.2, 9)]) is None
    failed = [ended(0.5, n + 5, status="failed", score=None) for n in range(3)]
    assert budget.stalled([base, *falling, *failed]) == why, "nor do failures make it grow"


def test_a_task_without_a_baseline_does_not_keep_the_sweep_going() -> None:
    budget = make_budget(("nano-sentiment", "nano-question"), stall_trials=2, stall_growth=0.05)
    flat = [ended(0.9, n, baseline=n == 0) for n in range(4)]
    lost = ended(0.9, 9, "nano-question", baseline=True, status="failed", score=None)
    assert budget.stalled([*flat, lost]) == "no hypervolume has grown by 0.05 in the last 2 trials"


def test_a_task_that_still_grows_keeps_the_sweep_going() -> None:
    budget = make_budget(("nano-sentiment", "nano-question"), stall_trials=2, stall_growth=0.05)
    one = [ended(0.9, 0, baseline=True), *(ended(0.9, n) for n in (1, 2, 3))]
    other = [ended(0.9, 10 + n, "nano-question", baseline=n == 0) for n in range(3)]
    assert budget.stalled(one) is None, "the other task has hardly begun"
    assert budget.stalled([*one, *other]) == "no hypervolume has grown by 0.05 in the last 2 trials"
    assert budget.stalled([*one, *other, ended(0.5, 20, "nano-question")]) is None


def test_one_setting_for_all_tasks_grows_the_front_of_all_tasks() -> None:
    """None of the later settings is the sparsest on either task, and they are by far the sparsest on both together."""
    tasks = ("nano-sentiment", "nano-question")
    tree = {
        "name": "s",
        "data": {"tasks": list(tasks)},
        "train": {"steps": 10},
        "search": {"scope": "shared"},
        "budget": {"stall_trials": 2, "stall_growth": 0.05},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults

    def both(setting: str, *densities: float, **fields: Any) -> list[Record]:
        pairs = zip(tasks, densities, strict=True)
        return [ended(d, 0, task, trial=f"{setting}{task[5]}", setting=setting, **fields) for task, d in pairs]

    known = [*both("b", 0.9, 0.9, baseline=True), *both("x", 0.1, 0.8), *both("y", 0.8, 0.1), *both("v", 0.8, 0.8)]
    grown = [*known, *both("z", 0.15, 0.15), *both("w", 0.8, 0.8)]
    assert Budget(spec, time.time()).stalled(grown) is None
    assert Budget(spec, time.time()).stalled([*grown, *both("u", 0.8, 0.8)[:1]]) is None, "it has not ended"
    assert Budget(spec, time.time()).stalled([*grown, *both("u", 0.8, 0.8)]) is not None


@pytest.mark.parametrize(
    ("limits", "path"),
    [({"wall_hours": 0}, "wall_hours"), ({"steps": 1.5}, "steps"), ({"stall_trials": 0}, "stall_trials")],
)
def test_a_budget_of_nothing_is_refused(limits: dict[str, Any], path: str) -> None:
    tree = {"name": "s", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 10}, "budget": limits}
    assert [fault[0] for fault in check_tree(tree)[1]] == [("budget", path)]


def test_front_seeds_and_their_baselines_are_no_points() -> None:
    """They move no front on purpose: neither does a sweep end for them, nor a task for a baseline lost among them."""
    budget = make_budget(stall_trials=3, stall_growth=0.05)
    base = ended(0.9, 0, baseline=True)
    falling = [ended(0.8 - 0.1 * n, n + 1) for n in range(4)]
    further = [ended(0.9, 0, trial=f"t{n}-s1", setting=f"t{n}", seed=1) for n in range(1, 5)]
    lost = ended(0.9, 0, trial="t0-s1", setting="t0", seed=1, baseline=True, status="failed", score=None)
    assert budget.stalled([base, *falling, *further]) is None
    assert make_budget(stall_trials=3, stall_growth=0.05).stalled([base, *falling, lost]) is None
    flat = [ended(0.5, n) for n in range(5, 8)]
    assert make_budget(stall_trials=3, stall_growth=0.05).stalled([base, *falling, lost, *flat, *further]) is not None


def test_a_lucky_first_seed_is_no_growth_and_its_mean_no_stall() -> None:
    """Each setting is better than the one before it, but its first seed alone looks better still."""
    tree = {
        "name": "s",
        "data": {"tasks": ["nano-sentiment"]},
        "train": {"steps": 10},
        "search": {"seeds": [0, 1]},
        "budget": {"stall_trials": 2, "stall_growth": 0.05},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    records = [ended(0.9, seed, trial=f"b{seed}", setting="b0", seed=seed, baseline=True) for seed in (0, 1)]
    for number, density in enumerate((0.8, 0.7, 0.6, 0.5, 0.4)):
        for seed, luck in enumerate((-0.3, 0.3)):
            trial = f"t{2 * number + seed}"
            records.append(ended(density + luck, 0, trial=trial, setting=f"t{2 * number}", seed=seed))
            assert Budget(spec, time.time()).stalled(records) is None, trial
    for number in (5, 6):
        for seed in (0, 1):
            records.append(ended(0.8, 0, trial=f"t{2 * number + seed}", setting=f"t{2 * number}", seed=seed))
    assert Budget(spec, time.time()).stalled(records) is not None
