"""The order of trials: baselines first, deterministic, the same after an interruption anywhere."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.schedule import Nothing, Schedule, trial_id
from tests.searches import killed_while_asking, made_up, run_into, told


def make_spec(steps: int = 1, **search: Any) -> SweepSpec:
    tree: dict[str, Any] = {
        "name": "s",
        "data": {"tasks": ["nano-sentiment", "nano-entailment"]},
        "deft": {
            "alpha": {"loguniform": [0.1, 10.0]},
            "epsilon": {"loguniform": [1e-7, 1e-2]},
            "approximation": {"choice": ["l0", "tanh"]},
            "beta": 20.0,
        },
        "train": {"steps": steps, "batch_size": {"choice": [8, 16]}},
        "baseline": {"train.batch_size": 8},
        "search": {"trials": 6, "startup_trials": 2, **search},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return spec


def ended(trial: TrialSpec, status: str = "complete") -> Record:
    """A made-up result: the more weight, the less density and score."""
    weight = 0.0 if trial.baseline else min(1.0, trial.deft.alpha / 10)
    return made_up(trial, 0.9 - 0.3 * weight**2, 1.0 - 0.8 * weight, status)


def run(schedule: Schedule, stop_after: int = 10**9) -> list[TrialSpec]:
    """Run trials one at a time."""
    return run_into([], schedule, ended, stop_after)


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


def test_the_score_of_a_baseline_is_known_when_it_has_ended(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(seeds=[0, 3]), tmp_path, [])
    first = schedule.next()
    assert isinstance(first, TrialSpec)
    assert schedule.baseline_score(first.task, first.seed) is None
    schedule.ended(made_up(first, 0.75, 0.5))
    assert [schedule.baseline_score(first.task, seed) for seed in (0, 3)] == [0.75, None]


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


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "nsga2", "random"])
def test_one_at_a_time_a_seed_gives_one_search(tmp_path: Path, sampler: str) -> None:
    spec = make_spec(sampler=sampler, seed=3)
    assert run(Schedule(spec, tmp_path / "a", [])) == run(Schedule(spec, tmp_path / "b", []))
    other = run(Schedule(make_spec(sampler=sampler, seed=4), tmp_path / "c", []))
    assert other[2:] != run(Schedule(spec, tmp_path / "d", []))[2:]


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "nsga2", "random"])
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


def test_sampled_trials_may_be_given_out_behind_a_baseline_that_trains(tmp_path: Path) -> None:
    """The study is told of them once there is something to compare them with; what it has then is the same."""
    spec = make_spec(seeds=[0, 5], trials=3)
    schedule = Schedule(spec, tmp_path / "early", [])
    given = [schedule.next(beside_baselines=True) for _ in range(6)]
    assert all(isinstance(trial, TrialSpec) for trial in given)
    trials = [trial for trial in given if isinstance(trial, TrialSpec)]
    assert [schedule.behind(trial) for trial in trials] == [[], [], [], [], ["t0000", "t0001"], ["t0000", "t0001"]]
    assert trials == run(Schedule(spec, tmp_path / "in-turn", []), 6)
    for trial in trials[4:]:
        schedule.ended(ended(trial))
    assert [trial.state for trial in told(tmp_path / "early", "nano-sentiment")][:1] == [TrialState.RUNNING]
    schedule.ended(ended(trials[0]))
    assert [schedule.behind(trial) for trial in trials[4:]] == [["t0001"], ["t0001"]]
    assert [trial.state for trial in told(tmp_path / "early", "nano-sentiment")][:1] == [TrialState.RUNNING]
    schedule.ended(ended(trials[1]))
    mine, other = (told(tmp_path / name, "nano-sentiment")[0] for name in ("early", "in-turn"))
    assert (mine.state, mine.values) == (TrialState.COMPLETE, other.values)


def test_a_search_that_was_killed_before_its_baselines_ended_goes_on(tmp_path: Path) -> None:
    spec = make_spec(trials=4)
    schedule = Schedule(spec, tmp_path, [])
    trials = [schedule.next(beside_baselines=True) for _ in range(4)]
    early = trials[2]
    assert isinstance(early, TrialSpec)
    schedule.ended(ended(early))
    again = Schedule(spec, tmp_path, [ended(early)])
    assert [again.next(beside_baselines=True) for _ in range(3)] == [trials[0], trials[1], trials[3]]
    again.ended(ended(trials[0]))  # type: ignore[arg-type]
    assert told(tmp_path, early.task)[0].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "changes",
    [
        {"search.scheduler": "asha"},
        {"search.scope": "shared"},
        {"reference": {"density": 0.9}},
        {"path": True},
    ],
    ids=str,
)
def test_who_judges_by_baselines_or_starts_from_them_waits_for_their_end(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    tree: dict[str, Any] = {
        "name": "s",
        "data": {"tasks": ["nano-sentiment"]},
        "deft": {"alpha": {"loguniform": [0.1, 10.0]}, "epsilon": 1e-4},
        "train": {"steps": 100},
        "search": {"trials": 3},
    }
    if "path" in changes:
        tree["deft"]["alpha"] = {"choice": [0.1, 1.0]}
        tree["search"] = {"path": "alpha"}
    for name, value in changes.items():
        section, _, leaf = name.partition(".")
        if leaf:
            tree[section][leaf] = value
        elif name != "path":
            tree[name] = value
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    schedule = Schedule(spec, tmp_path, [])
    baseline = schedule.next(beside_baselines=True)
    assert isinstance(baseline, TrialSpec)
    assert baseline.baseline
    assert schedule.next(beside_baselines=True) is Nothing.YET
    schedule.ended(ended(baseline))
    assert isinstance(schedule.next(beside_baselines=True), TrialSpec)


def test_baselines_can_be_asked_for_alone(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(), tmp_path, [])
    first, second = schedule.next_baseline(), schedule.next_baseline()
    assert isinstance(first, TrialSpec)
    assert isinstance(second, TrialSpec)
    schedule.ended(ended(first))
    assert schedule.next_baseline() is Nothing.YET
    schedule.ended(ended(second))
    assert schedule.next_baseline() is Nothing.MORE


def test_an_abandoned_trial_is_waited_for_no_longer(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(front_seeds=2, trials=1), tmp_path, [])
    trials = [schedule.next(beside_baselines=True) for _ in range(4)]
    assert schedule.under_way == 4
    for trial in trials[2:]:
        assert isinstance(trial, TrialSpec)
        schedule.abandoned(trial.trial)
    for trial in trials[:2]:
        assert isinstance(trial, TrialSpec)
        schedule.ended(ended(trial, "failed"))
    assert schedule.under_way == 0
    assert schedule.next(beside_baselines=True) is Nothing.MORE


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


# --- front seeds ------------------------------------------------------------------------------------------------------


def noisy(trial: TrialSpec, status: str = "complete") -> Record:
    """As :func:`ended`, but a seed scatters about the made-up result."""
    dice, before = random.Random(f"{trial.setting} {trial.seed}"), ended(trial, status)
    if before.score is None or before.density is None:
        return before
    density = min(1.0, before.density + dice.uniform(-0.05, 0.05))
    return replace(before, score=before.score + dice.uniform(-0.05, 0.05), density=density)


def run_noisy(schedule: Schedule, records: list[Record], stop_after: int = 10**9) -> list[TrialSpec]:
    return run_into(records, schedule, noisy, stop_after)


def front_by_hand(records: list[Record], task: str) -> set[str]:
    """Settings whose mean score and density no other setting's beat."""
    means = {}
    for setting in {record.setting for record in records if record.task == task}:
        mine = [record for record in records if record.setting == setting]
        means[setting] = tuple(sum(getattr(r, key) for r in mine) / len(mine) for key in ("score", "density"))
    return {
        one
        for one, (score, density) in means.items()
        if not any(s >= score and d <= density and (s, d) != (score, density) for s, d in means.values())
    }


def test_whoever_stands_on_the_front_in_the_end_has_all_its_seeds(tmp_path: Path) -> None:
    spec, records = make_spec(front_seeds=3, trials=12, seeds=[5], scheduler="none"), list[Record]()
    done = run_noisy(Schedule(spec, tmp_path, []), records)
    points, extra = done[: 2 * 13], done[2 * 13 :]
    assert [trial.trial for trial in points] == [trial_id(index) for index in range(26)]
    assert {trial.seed for trial in points} == {5}
    assert len({trial.trial for trial in done}) == len(done)
    for trial in extra:
        first = next(one for one in points if one.trial == trial.setting)
        place = int(trial.trial.removeprefix(f"{trial.setting}-s"))
        assert trial.seed == 5 + place in (6, 7)
        assert (trial.task, trial.baseline) == (first.task, first.baseline)
        assert (trial.deft, trial.train) == (first.deft, first.train)
        before = [one for one in done[: done.index(trial) + 1] if one.baseline and one.seed == trial.seed]
        assert trial.task in {one.task for one in before}, "first the baseline of the same seed"
    for task in spec.data.tasks:
        standing = front_by_hand(records, task)
        assert len(standing) > 2
        for setting in standing | {trial.setting for trial in points if trial.task == task and trial.baseline}:
            assert sorted(r.seed for r in records if r.setting == setting) == [5, 6, 7], setting
    alone = {trial.setting for trial in points} - {trial.setting for trial in extra}
    assert alone, "who never stood on the front has one seed"


def test_a_setting_that_its_seeds_take_off_the_front_gets_no_more_and_the_next_one_some(tmp_path: Path) -> None:
    spec = make_spec(front_seeds=3, trials=2, scheduler="none")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"tasks": ["nano-sentiment"]})})
    results = {
        ("t0000", 0): (0.90, 0.9), ("t0000", 1): (0.90, 0.9), ("t0000", 2): (0.90, 0.9),
        ("t0001", 0): (0.80, 0.4), ("t0001", 1): (0.30, 0.8),  # a lucky first seed: 0.55 at 0.6 on average
        ("t0002", 0): (0.70, 0.5), ("t0002", 1): (0.70, 0.5), ("t0002", 2): (0.70, 0.5),
    }  # fmt: skip
    schedule, order = Schedule(spec, tmp_path, []), list[str]()
    while isinstance(trial := schedule.next(), TrialSpec):
        score, density = results[trial.setting, trial.seed]
        schedule.ended(replace(ended(trial), score=score, density=density))
        order.append(trial.trial)
    assert order == ["t0000", "t0001", "t0002", "t0000-s1", "t0001-s1", "t0002-s1", "t0000-s2", "t0002-s2"]


def test_no_front_seed_goes_to_who_misses_the_score_limit(tmp_path: Path) -> None:
    """Neither by the first seed, however low the density, nor by the mean once the second has run."""
    spec = make_spec(front_seeds=3, trials=3, scheduler="none")
    sections = {
        "data": spec.data.model_copy(update={"tasks": ["nano-sentiment"]}),
        "constraint": spec.constraint.model_copy(update={"max_score_drop": 0.05}),
    }
    schedule, order = Schedule(spec.model_copy(update=sections), tmp_path, []), list[str]()
    scores = {"t0000": [0.90] * 3, "t0001": [0.88, 0.70], "t0002": [0.80], "t0003": [0.89] * 3}
    densities = {"t0000": 0.9, "t0001": 0.3, "t0002": 0.1, "t0003": 0.6}
    while isinstance(trial := schedule.next(), TrialSpec):
        score, density = scores[trial.setting][trial.seed], densities[trial.setting]
        schedule.ended(replace(ended(trial), score=score, density=density))
        order.append(trial.trial)
    assert order[4:] == ["t0000-s1", "t0001-s1", "t0003-s1", "t0000-s2", "t0003-s2"]


@pytest.mark.parametrize("killed_after", [20, 26, 27, 30, 33])
def test_front_seeds_go_on_after_an_interruption(tmp_path: Path, killed_after: int) -> None:
    spec = make_spec(steps=9, front_seeds=2, trials=12, scheduler="mo_asha", first_rung=0.5)
    whole = run_noisy(Schedule(spec, tmp_path / "whole", []), [])
    records: list[Record] = []
    first = run_noisy(Schedule(spec, tmp_path / "cut", []), records, killed_after)
    again = Schedule(spec, tmp_path / "cut", records)
    assert again.remaining > 0
    assert first + run_noisy(again, records) == whole
    assert again.remaining == 0
    assert {bool(trial.rungs) for trial in whole[:26]} == {True}
    assert {bool(trial.rungs) for trial in whole[26:]} == {False}, "they train to the end"


def test_a_seed_whose_baseline_is_lost_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    spec, records = make_spec(front_seeds=2, trials=4), list[Record]()
    schedule = Schedule(spec, tmp_path, [])
    run_noisy(schedule, records, 10)
    extra = []
    while isinstance(trial := schedule.next(), TrialSpec):
        lost = trial.task == "nano-sentiment" and trial.baseline
        schedule.ended(noisy(trial, "failed" if lost else "complete"))
        extra.append((trial.task, trial.baseline))
    assert extra.count(("nano-sentiment", True)) == 1
    assert ("nano-sentiment", False) not in extra
    assert ("nano-entailment", False) in extra


def test_who_samples_no_more_still_gets_front_seeds(tmp_path: Path) -> None:
    schedule, records = Schedule(make_spec(front_seeds=2, trials=12), tmp_path, []), list[Record]()
    started = run_noisy(schedule, records, 9)
    running = schedule.next()
    assert isinstance(running, TrialSpec)
    schedule.sample_no_more()
    assert schedule.next() is Nothing.YET, "one still trains"
    assert (schedule.skipped, schedule.remaining) == (26 - 10, 1)
    schedule.ended(noisy(running))
    rest = run_noisy(schedule, records)
    assert rest
    assert all("-s1" in trial.trial for trial in rest)
    assert {trial.setting for trial in rest} <= {trial.trial for trial in [*started, running]}
    assert (schedule.skipped, schedule.remaining) == (16, 0)


# --- one configuration for all tasks ----------------------------------------------------------------------------------


def test_a_shared_point_runs_on_every_task_and_is_told_by_its_means(tmp_path: Path) -> None:
    spec = make_spec(scope="shared", trials=5)
    schedule, records = Schedule(spec, tmp_path, []), list[Record]()
    trials: list[TrialSpec] = []
    while isinstance(trial := schedule.next(), TrialSpec):
        shift = 0.1 if trial.task == "nano-entailment" else 0.0
        made = ended(trial)
        assert made.score is not None
        assert made.density is not None
        lower = 0.0 if trial.baseline else shift
        records.append(replace(made, score=made.score - lower, density=made.density - shift))
        schedule.ended(records[-1])
        trials.append(trial)

    assert [trial.task for trial in trials] == ["nano-sentiment", "nano-entailment"] * 6
    for first, second in zip(trials[2::2], trials[3::2], strict=True):
        assert first.deft == second.deft
        assert first.setting == second.setting == first.trial
    assert {trial.setting for trial in trials[:2]} == {"t0000"}
    assert [file.name for file in tmp_path.glob("*.log")] == ["all-tasks.log"], "one study"
    for point, first in zip(told(tmp_path, "all-tasks"), trials[2::2], strict=True):
        weight = min(1.0, first.deft.alpha / 10)
        assert point.values == pytest.approx([-0.3 * weight**2 - 0.05, 1.0 - 0.8 * weight - 0.05])


@pytest.mark.parametrize("killed_after", [1, 2, 3, 6, 7, 11])
def test_a_killed_shared_search_goes_on_as_if_it_had_not_been(tmp_path: Path, killed_after: int) -> None:
    spec = make_spec(scope="shared", trials=5)
    whole = run(Schedule(spec, tmp_path / "whole", []))
    before = run(Schedule(spec, tmp_path / "cut", []), killed_after)
    assert before + run(Schedule(spec, tmp_path / "cut", [ended(trial) for trial in before])) == whole


def test_a_shared_search_goes_on_without_a_task_that_has_no_baseline(tmp_path: Path) -> None:
    schedule = Schedule(make_spec(scope="shared", trials=3), tmp_path, [])
    done = []
    while isinstance(trial := schedule.next(), TrialSpec):
        lost = trial.baseline and trial.task == "nano-sentiment"
        schedule.ended(ended(trial, "failed" if lost else "complete"))
        done.append((trial.task, trial.baseline))
    assert done[2:] == [("nano-entailment", False)] * 3
    assert schedule.remaining == 0


# --- killed while a point was asked -----------------------------------------------------------------------------------


def test_a_point_that_was_half_asked_is_whole_in_the_study_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(front_seeds=2, trials=4, sampler="tpe")
    whole = run_noisy(Schedule(spec, tmp_path / "whole", []), [])
    records: list[Record] = []
    first = Schedule(spec, tmp_path / "cut", [])
    before = run_noisy(first, records, 4)
    with killed_while_asking(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        first.next()
    after = run_noisy(Schedule(spec, tmp_path / "cut", list(records)), records)
    assert before + after == whole
    for trial in told(tmp_path / "cut", "nano-sentiment"):
        assert {"deft.alpha", "deft.approximation", "train.batch_size"} <= trial.params.keys()


@pytest.mark.parametrize(("search", "ended"), [({}, 5), ({"seeds": [0, 1]}, 5), ({"scope": "shared"}, 5)])
def test_no_point_stays_running_when_a_sweep_ends_in_the_middle(
    tmp_path: Path, search: dict[str, Any], ended: int
) -> None:
    """One trial under way, or one seed or task of a point still to come: told as stopped, and gone on with later."""
    spec = make_spec(sampler="tpe", **search)
    whole = run_noisy(Schedule(spec, tmp_path / "whole", []), [])
    records: list[Record] = []
    first = Schedule(spec, tmp_path / "cut", [])
    before = run_noisy(first, records, ended)
    assert isinstance(first.next(), TrialSpec)
    first.close()
    names = sorted(file.stem for file in (tmp_path / "cut").glob("*.log"))
    points = [point for name in names for point in told(tmp_path / "cut", name)]
    stopped = [point for point in points if point.user_attrs.get("ending") == "stopped"]
    assert stopped
    assert {point.state for point in stopped} == {TrialState.FAIL}
    assert not any(point.state == TrialState.RUNNING for point in points)
    assert before + run_noisy(Schedule(spec, tmp_path / "cut", list(records)), records) == whole
    after = [point for name in names for point in told(tmp_path / "cut", name)]
    assert {point.user_attrs["ending"] for point in after} <= {"complete", "infeasible"}


def test_sampling_no_more_leaves_no_point_with_half_its_seeds(tmp_path: Path) -> None:
    spec = make_spec(seeds=[0, 1, 2], trials=6)
    records: list[Record] = []
    schedule = Schedule(spec, tmp_path, [])
    started = run_noisy(schedule, records, 6 + 4)
    schedule.sample_no_more()
    rest = run_noisy(schedule, records)
    assert [trial.setting for trial in rest] == [started[-1].setting] * 2
    assert {trial.seed for trial in rest} == {1, 2}
    assert schedule.remaining == 0
    assert len(records) + schedule.skipped == 6 + 6 * 2 * 3


def test_a_trial_that_was_under_way_goes_on_although_sampling_has_ended_since(tmp_path: Path) -> None:
    spec, records = make_spec(trials=6), list[Record]()
    schedule = Schedule(spec, tmp_path, [])
    run_noisy(schedule, records, 6)
    lost = schedule.next()
    assert isinstance(lost, TrialSpec)
    again = Schedule(spec, tmp_path, list(records))
    again.sample_no_more()
    assert run_noisy(again, records) == [lost]
