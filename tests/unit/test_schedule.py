"""The order of trials: baselines first, deterministic, the same after an interruption anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.schedule import Nothing, Schedule, trial_id


def make_spec(**search: Any) -> SweepSpec:
    tree: dict[str, Any] = {
        "name": "s",
        "data": {"tasks": ["nano-sentiment", "nano-entailment"]},
        "deft": {
            "alpha": {"loguniform": [0.1, 10.0]},
            "epsilon": {"loguniform": [1e-7, 1e-2]},
            "approximation": {"choice": ["l0", "tanh"]},
            "beta": 20.0,
        },
        "train": {"steps": 1, "batch_size": {"choice": [8, 16]}},
        "baseline": {"train.batch_size": 8},
        "search": {"trials": 6, "startup_trials": 2, **search},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return spec


def ended(trial: TrialSpec, status: str = "complete") -> Record:
    """A made-up result: the more weight, the less density and score."""
    weight = 0.0 if trial.baseline else min(1.0, trial.deft.alpha / 10)
    measured = status == "complete"
    return Record(
        trial=trial.trial,
        task=trial.task,
        seed=trial.seed,
        baseline=trial.baseline,
        status=status,
        score=0.9 - 0.3 * weight**2 if measured else None,
        density=1.0 - 0.8 * weight if measured else None,
        score_metric="accuracy",
        dtype="float32",
        activation="NewGELUActivation",
    )


def run(schedule: Schedule, stop_after: int = 10**9) -> list[TrialSpec]:
    """Run trials one at a time."""
    done: list[TrialSpec] = []
    while len(done) < stop_after and isinstance(trial := schedule.next(), TrialSpec):
        schedule.ended(ended(trial))
        done.append(trial)
    return done


def test_baselines_come_first_and_are_not_sampled(tmp_path: Path) -> None:
    trials = run(Schedule(make_spec(seeds=[0, 5]), tmp_path, []))
    assert [(t.task, t.seed, t.baseline) for t in trials[:4]] == [
        ("nano-sentiment", 0, True),
        ("nano-sentiment", 5, True),
        ("nano-entailment", 0, True),
        ("nano-entailment", 5, True),
    ]
    assert all((t.deft.alpha, t.train.batch_size) == (0.0, 8) for t in trials[:4])
    assert len(trials) == 4 + 6 * 2 * 2
    assert not any(t.baseline for t in trials[4:])
    assert [t.trial for t in trials] == [trial_id(n) for n in range(len(trials))]


def test_every_point_runs_with_every_seed(tmp_path: Path) -> None:
    trials = run(Schedule(make_spec(seeds=[0, 5]), tmp_path, []))[4:]
    for first, second in zip(trials[::2], trials[1::2], strict=True):
        assert (first.seed, second.seed) == (0, 5)
        assert first.deft == second.deft
        assert first.task == second.task


def test_samples_lie_in_their_domains(tmp_path: Path) -> None:
    for trial in run(Schedule(make_spec(), tmp_path, []))[2:]:
        assert 0.1 <= trial.deft.alpha <= 10.0
        assert 1e-7 <= trial.deft.epsilon <= 1e-2
        assert trial.deft.approximation in ("l0", "tanh")
        assert trial.train.batch_size in (8, 16)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_one_at_a_time_a_seed_gives_one_search(tmp_path: Path, sampler: str) -> None:
    spec = make_spec(sampler=sampler, seed=3)
    assert run(Schedule(spec, tmp_path / "a", [])) == run(Schedule(spec, tmp_path / "b", []))
    other = run(Schedule(make_spec(sampler=sampler, seed=4), tmp_path / "c", []))
    assert other[2:] != run(Schedule(spec, tmp_path / "d", []))[2:]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
@pytest.mark.parametrize("killed_after", [0, 1, 2, 5, 9, 13])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str, killed_after: int) -> None:
    """Killed after so many trials, one more given out and not ended; then rebuilt from the records and the journal."""
    spec = make_spec(sampler=sampler)
    whole = run(Schedule(spec, tmp_path / "whole", []))
    first = Schedule(spec, tmp_path / "cut", [])
    before = run(first, killed_after)
    lost = first.next()
    assert isinstance(lost, TrialSpec)
    after = run(Schedule(spec, tmp_path / "cut", [ended(trial) for trial in before]))
    assert after[0] == lost
    assert before + after == whole


def test_a_record_that_was_not_told_is_told_on_the_way_back(tmp_path: Path) -> None:
    """Killed between the record and the study: the study learns of it from the record."""
    spec = make_spec()
    whole = run(Schedule(spec, tmp_path / "whole", []))
    cut = Schedule(spec, tmp_path / "cut", [])
    before = run(cut, 4)
    untold = cut.next()
    assert isinstance(untold, TrialSpec)
    after = run(Schedule(spec, tmp_path / "cut", [*map(ended, before), ended(untold)]))
    assert [*before, untold, *after] == whole


def test_sampled_trials_wait_for_their_task_s_baselines(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(), tmp_path, [])
    first, second = schedule.next(), schedule.next()
    assert isinstance(first, TrialSpec)
    assert isinstance(second, TrialSpec)
    assert schedule.next() is Nothing.YET
    schedule.ended(ended(second))
    third = schedule.next()
    assert isinstance(third, TrialSpec)
    assert third.task == second.task


def test_a_failed_baseline_ends_its_task(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(), tmp_path, [])
    first, second = schedule.next(), schedule.next()
    assert isinstance(first, TrialSpec)
    assert isinstance(second, TrialSpec)
    schedule.ended(ended(first, "diverged"))
    schedule.ended(ended(second))
    assert schedule.failed_tasks == [first.task]
    assert schedule.remaining == 6
    assert {trial.task for trial in run(schedule)} == {second.task}
    assert schedule.next() is Nothing.MORE


def test_failed_trials_do_not_stop_the_search(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(), tmp_path, [])
    seen = 0
    while isinstance(trial := schedule.next(), TrialSpec):
        schedule.ended(ended(trial, "complete" if trial.baseline else "failed"))
        seen += 1
    assert seen == 14
    assert schedule.remaining == 0


def test_points_to_try_first_are_tried_first(tmp_path: Path) -> None:
    point = {"deft.alpha": 1.0, "deft.epsilon": 1e-7, "deft.approximation": "l0", "train.batch_size": 16}
    trials = run(Schedule(make_spec(try_first=[point]), tmp_path, []))[2:4]
    for trial in trials:
        assert (trial.deft.alpha, trial.deft.epsilon, trial.train.batch_size) == (1.0, 1e-7, 16)
