"""Searches that start from what other sweeps, or earlier tasks, know."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deft_ray.errors import SetupError
from deft_ray.results.records import Record, RecordLog
from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.run_dir import RunDir
from deft_ray.sweep.rungs import build_rungs, is_among_the_best
from deft_ray.sweep.schedule import Nothing, Schedule
from deft_ray.sweep.warm_start import check_warm_start
from tests.searches import killed_while_asking, made_up, run_into, told

SENTIMENT, ENTAILMENT = "nano-sentiment", "nano-entailment"
SPACE = {
    "approximation": {"choice": ["l0", "sigmoid"]},
    "alpha": {"loguniform": [0.1, 10.0]},
    "epsilon": {"loguniform": [1e-7, 1e-2]},
    "beta": {"uniform": [1.0, 20.0]},
}


def make_spec(tasks: tuple[str, ...] = (SENTIMENT,), deft: Any = None, **search: Any) -> SweepSpec:
    tree = {
        "name": "s",
        "data": {"tasks": list(tasks)},
        "dial": {"taus": [0.1]},
        "deft": deft or SPACE,
        "train": {"steps": 9},
        "search": {"trials": 8, "startup_trials": 3, **search},
        "constraint": {"max_score_drop": 0.2},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return spec


def result(trial: TrialSpec) -> Record:
    """A made-up result."""
    weight = 0.0 if trial.baseline else min(1.0, trial.deft.alpha / 10)
    dice = random.Random(f"{trial.task} {weight} {trial.seed}")
    level = 0.9 if trial.task == SENTIMENT else 0.5
    return made_up(trial, level - 0.4 * weight - 0.01 * dice.random(), 1.0 - 0.8 * weight)


def run(schedule: Schedule, log: list[Record], stop_after: int = 10**9) -> list[TrialSpec]:
    return run_into(log, schedule, result, stop_after)


def write_sweep(folder: Path, spec: SweepSpec, change: Any = None) -> list[Record]:
    """Make up a whole sweep; ``change`` may alter its records."""
    run_dir = RunDir(folder)
    run_dir.create(spec, build_plan(spec, str(folder), Machine(4, 0)))
    log: list[Record] = []
    run(Schedule(spec, run_dir.search, []), log)
    log = log if change is None else change(log)
    for record in log:
        RecordLog(run_dir.records).append(record)
    return log


def test_another_sweep_s_points_are_told_with_both_objectives(tmp_path: Path) -> None:
    theirs = write_sweep(tmp_path / "old", make_spec(seed=7))
    spec, log = make_spec(warm_start=[str(tmp_path / "old")]), list[Record]()
    check_warm_start(spec)
    mine = run(Schedule(spec, tmp_path / "new", []), log)
    trials = told(tmp_path / "new", SENTIMENT)

    assert [trial.trial for trial in mine] == [f"t{number:04d}" for number in range(9)], "ids are the plan's own"
    assert len(trials) == 8 + 8
    before = theirs[0]
    assert before.baseline
    for trial, record in zip(trials[:8], theirs[1:], strict=True):
        assert record.score is not None
        assert before.score is not None
        assert trial.values == pytest.approx([record.score - before.score, record.density])
        assert trial.params == {name: record.config[name] for name in trial.params}
        l0 = record.config["deft.approximation"] == "l0"
        assert trial.params.keys() == {"deft.approximation", "deft.alpha", "deft.epsilon" if l0 else "deft.beta"}
    cold = run(Schedule(make_spec(), tmp_path / "cold", []), [])
    assert [t.deft for t in mine[1:]] != [t.deft for t in cold[1:]], "what is known moves the search"


def test_known_points_that_miss_the_limit_or_diverged_are_told_as_that(tmp_path: Path) -> None:
    def change(log: list[Record]) -> list[Record]:
        return [
            log[0],
            replace(log[1], score=0.1),
            replace(log[2], status="diverged", score=None, density=None),
            replace(log[3], status="failed", score=None, density=None),
            replace(log[4], status="pruned"),
            replace(log[5], status="stopped"),
            *log[6:],
        ]

    write_sweep(tmp_path / "old", make_spec(seed=7), change)
    schedule = Schedule(make_spec(warm_start=[str(tmp_path / "old")]), tmp_path / "new", [])
    run(schedule, [], 2)
    endings = [trial.user_attrs.get("ending") for trial in told(tmp_path / "new", SENTIMENT)]
    assert endings[:3] == ["infeasible", "diverged", "pruned"], "failed and stopped ones say nothing"
    assert len(endings) == 6 + 1


def test_a_front_seed_that_failed_does_not_take_its_point_with_it(tmp_path: Path) -> None:
    def change(log: list[Record]) -> list[Record]:
        best = log[1]
        further = {"trial": f"{best.trial}-s1", "setting": best.trial, "seed": 1, "status": "failed"}
        return [*log, replace(log[0], trial="t0000-s1", seed=1), replace(best, score=None, density=None, **further)]

    write_sweep(tmp_path / "old", make_spec(seed=7), change)
    run(Schedule(make_spec(warm_start=[str(tmp_path / "old")]), tmp_path / "new", []), [], 2)
    assert [trial.user_attrs["ending"] for trial in told(tmp_path / "new", SENTIMENT)[:8]] == ["complete"] * 8


def test_known_points_were_pruned_where_they_were_and_not_where_ours_of_the_same_name_are(tmp_path: Path) -> None:
    """Two seeds here: t0001 is a baseline, which goes on at every rung."""
    write_sweep(
        tmp_path / "old",
        make_spec(seed=7),
        lambda log: (
            [replace(log[0], steps=81)]
            + [
                replace(record, status="pruned", steps=steps)
                for record, steps in zip(log[1:], (9, 27, 30, 9), strict=False)
            ]
        ),
    )
    spec = make_spec(warm_start=[str(tmp_path / "old")], seeds=[0, 1], scheduler="mo_asha")
    search = tmp_path / "new"
    rungs = build_rungs(spec, search, is_among_the_best, lambda _task, _seed: None)
    assert rungs is not None
    for number, rung in ((0, 0), (1, 0), (1, 1)):
        mine = {"task": SENTIMENT, "trial": f"t{number:04d}", "seed": number, "baseline": True}
        assert rungs.arrive(**mine, rung=rung, step=9 * 3**rung, score=0.9, density=1.0)
    run(Schedule(spec, search, []), [], 3)
    assert [trial.user_attrs["pruned_at"]["rung"] for trial in told(search, SENTIMENT)[:4]] == [0, 1, 1, 0]


def test_what_was_best_elsewhere_may_be_tried_here(tmp_path: Path) -> None:
    """With choices alone a known point and one that is drawn are equal to the last digit."""
    deft = {"alpha": {"choice": [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 9.9]}, "epsilon": 1e-5}
    spec = make_spec((SENTIMENT, ENTAILMENT), deft, warm_start=["tasks"], trials=4)
    done = run(Schedule(spec, tmp_path, []), [])
    alphas = [[t.deft.alpha for t in done if t.task == task and not t.baseline] for task in (SENTIMENT, ENTAILMENT)]
    assert set(alphas[0]) & set(alphas[1])
    assert all(len(set(mine)) == 4 for mine in alphas), "none is tried twice here"


def test_a_sweep_of_another_task_is_taken_where_it_has_not_this_one(tmp_path: Path) -> None:
    both = write_sweep(tmp_path / "both", make_spec((SENTIMENT, ENTAILMENT), seed=7))
    other = write_sweep(tmp_path / "other", make_spec((ENTAILMENT,), seed=8))
    for folder, count in (("both", 8), ("other", 8)):
        schedule = Schedule(make_spec(warm_start=[str(tmp_path / folder)]), tmp_path / f"new-{folder}", [])
        run(schedule, [], 2)
        assert len(told(tmp_path / f"new-{folder}", SENTIMENT)) == count + 1
    assert {record.task for record in both} == {SENTIMENT, ENTAILMENT}
    assert {record.task for record in other} == {ENTAILMENT}


def test_later_tasks_start_from_earlier_ones(tmp_path: Path) -> None:
    spec, log = make_spec((SENTIMENT, ENTAILMENT), warm_start=["tasks"]), list[Record]()
    done = run(Schedule(spec, tmp_path, []), log)
    assert [trial.task for trial in done] == [SENTIMENT, ENTAILMENT] + [SENTIMENT] * 8 + [ENTAILMENT] * 8
    assert len(told(tmp_path, SENTIMENT)) == 8
    later = told(tmp_path, ENTAILMENT)
    assert len(later) == 8 + 8
    baseline = log[0]
    for trial, record in zip(later[:8], log[2:10], strict=True):
        assert record.score is not None
        assert baseline.score is not None
        assert trial.values == pytest.approx([record.score - baseline.score, record.density]), (
            "against its own baseline"
        )


def test_a_later_task_waits_for_the_earlier_one_s_last_trial(tmp_path: Path) -> None:
    schedule = Schedule(make_spec((SENTIMENT, ENTAILMENT), warm_start=["tasks"]), tmp_path, [])
    run(schedule, [], 9)
    last = schedule.next()
    assert isinstance(last, TrialSpec)
    assert schedule.next() is Nothing.YET
    schedule.ended(result(last))
    following = schedule.next()
    assert isinstance(following, TrialSpec)
    assert following.task == ENTAILMENT


@pytest.mark.parametrize("killed_after", [1, 2, 5, 10, 11, 14, 17])
def test_a_killed_search_starts_from_the_same_again(tmp_path: Path, killed_after: int) -> None:
    write_sweep(tmp_path / "old", make_spec(seed=7))
    spec = make_spec((SENTIMENT, ENTAILMENT), warm_start=[str(tmp_path / "old"), "tasks"])
    whole = run(Schedule(spec, tmp_path / "whole", []), [])
    records: list[Record] = []
    first = Schedule(spec, tmp_path / "cut", [])
    before = run(first, records, killed_after)
    first.next()
    again = run(Schedule(spec, tmp_path / "cut", list(records)), records)
    assert before + again == whole


def test_another_space_or_other_objectives_are_refused_with_the_difference(tmp_path: Path) -> None:
    write_sweep(tmp_path / "old", make_spec())
    deft = {
        "alpha": {"loguniform": [0.1, 1.0]},
        "epsilon": {"loguniform": [1e-7, 1e-2]},
        "alpha_ramp": {"uniform": [0, 1]},
    }
    at_tau = {"score": "max", "density@0.1": "min"}
    for spec, faults in (
        (
            make_spec(deft=deft, warm_start=[str(tmp_path / "old")]),
            [
                "deft.alpha: is 'loguniform 0.1, 1' here, 'loguniform 0.1, 10' there",
                "deft.alpha_ramp: is 'uniform 0, 1' here, 'not searched' there",
                "deft.approximation: is 'not searched' here, 'choice l0, sigmoid' there",
                "deft.beta: is 'not searched' here, 'uniform 1, 20' there",
            ],
        ),
        (
            make_spec(objectives=at_tau, warm_start=[str(tmp_path / "old")]),
            ["search.objectives: are 'score, density@0.1' here, 'score, density' there"],
        ),
    ):
        with pytest.raises(SetupError) as caught:
            check_warm_start(spec)
        found = [line.removeprefix(f"{tmp_path}/old: ").partition("; ")[0] for line in str(caught.value).split("\n")]
        assert found == faults


def test_what_is_no_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "spec.yaml").write_text("name: [")
    (tmp_path / "broken" / "records.jsonl").write_text("")
    with pytest.raises(SetupError) as caught:
        check_warm_start(make_spec(warm_start=[str(tmp_path / "none"), str(tmp_path / "broken")]))
    first, second = str(caught.value).split("\n")
    assert first == f"{tmp_path}/none: is no run directory to start from; needs spec.yaml and records.jsonl"
    assert "spec.yaml: is no spec of a sweep" in second


def test_a_sampler_that_learns_nothing_has_no_use_for_it() -> None:
    tree = {"name": "s", "data": {"tasks": [SENTIMENT]}, "train": {"steps": 9}}
    for sampler in ("random", "grid"):
        search = {"sampler": sampler, "warm_start": ["x"]}
        assert check_tree({**tree, "search": search})[1] == [
            (
                ("search", "warm_start"),
                f"means nothing to the {sampler} sampler, which learns from no point; leave it out",
            )
        ]


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "gp"])
@pytest.mark.parametrize("after", [1, 2, 3, 7, 20])
def test_killed_while_known_points_are_told_the_study_is_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, after: int
) -> None:
    write_sweep(tmp_path / "old", make_spec(seed=7))
    spec = make_spec(warm_start=[str(tmp_path / "old")], trials=4, sampler=sampler)
    whole = run(Schedule(spec, tmp_path / "whole", []), [])
    records: list[Record] = []
    first = Schedule(spec, tmp_path / "cut", [])
    before = run(first, records, 1)
    with killed_while_asking(monkeypatch, after), pytest.raises(KeyboardInterrupt):
        first.next()
    assert before + run(Schedule(spec, tmp_path / "cut", list(records)), records) == whole
    one, other = (told(tmp_path / name, SENTIMENT) for name in ("whole", "cut"))
    assert [(t.params, t.values) for t in one] == [(t.params, t.values) for t in other]
