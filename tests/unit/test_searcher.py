"""One task's searcher: a conditional space, samplers, and every way in which a point can end."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan
from deft_ray.spec.points import grid
from deft_ray.spec.resolve import resolve_trial
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.rungs import JOURNAL, Rungs
from deft_ray.sweep.schedule import Schedule
from deft_ray.sweep.searcher import TaskSearch, _best, _judge, changes
from deft_ray.sweep.tuning import RungScheduler
from tests import searches
from tests.tiny import tiny_trial

TASK = "nano-sentiment"
SPACE: dict[str, Any] = {
    "approximation": {"choice": ["l0", "tanh", "sigmoid", "l1"]},
    "alpha": {"loguniform": [0.1, 10.0]},
    "epsilon": {"loguniform": [1e-7, 1e-2]},
    "beta": {"uniform": [1.0, 30.0]},
    "adaptive": {"choice": [True, False]},
    "lambda_init": {"uniform": [0.5, 1.0]},
}


def make_spec(deft: dict[str, Any] | None = None, limit: float | None = None, **search: Any) -> SweepSpec:
    tree: dict[str, Any] = {
        "name": "s",
        "data": {"tasks": [TASK]},
        "adapter": {"kind": {"choice": ["lora", "bottleneck"]}, "r": {"randint": [2, 8]}},
        "deft": SPACE if deft is None else deft,
        "train": {"steps": 27},
        "baseline": {"adapter.kind": "lora", "adapter.r": 4},
        "search": {"trials": 40, "startup_trials": 5, **search},
        "constraint": {"max_score_drop": limit},
    }
    if deft is not None:
        del tree["adapter"], tree["baseline"]
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return spec


def record(status: str = "complete", score: float | None = 0.9, density: float | None = 0.5, **fields: Any) -> Record:
    named = {"trial": "t0001", "task": TASK, "seed": 0, "baseline": False, "score_metric": "accuracy"}
    return Record(**{**named, "dtype": "float32", "activation": "", "steps": 7, **fields}, **{
        "status": status, "score": score, "density": density
    })  # fmt: skip


BASELINE = record(score=0.9, density=0.99, baseline=True)


def told(folder: Path) -> list[FrozenTrial]:
    return searches.told(folder, TASK)


# --- a conditional space ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "nsga2", "random", "gp"])
def test_a_leaf_is_sampled_only_where_a_trial_reads_it(tmp_path: Path, sampler: str) -> None:
    spec = make_spec(sampler=sampler)
    search = TaskSearch(spec, TASK, tmp_path)
    seen = set()
    for number in range(30 if sampler != "gp" else 7):
        values = search.point(number)
        kind, adaptive = values["deft.approximation"], values["deft.adaptive"]
        assert ("deft.epsilon" in values) == (kind == "l0")
        assert ("deft.beta" in values) == (kind in ("tanh", "sigmoid"))
        assert ("deft.lambda_init" in values) == adaptive
        assert ("adapter.r" in values) == (values["adapter.kind"] == "lora")
        trial = resolve_trial(spec, "t0001", TASK, 0, values)
        assert trial.deft.alpha == values["deft.alpha"]
        assert trial.deft.epsilon == values.get("deft.epsilon", 1e-7), "the default, where nobody reads it"
        search.tell(number, [record(density=trial.deft.alpha / 10)], [BASELINE])
        seen.add(kind)
    assert len(seen) >= 3


def test_a_point_lacks_no_leaf_that_it_reads() -> None:
    spec = make_spec()
    with pytest.raises(ValueError, match=r"^no value for deft.epsilon$"):
        resolve_trial(
            spec,
            "t",
            TASK,
            0,
            {"adapter.kind": "bottleneck", "deft.approximation": "l0", "deft.alpha": 1.0, "deft.adaptive": False},
        )
    with pytest.raises(ValueError, match=r"^no value for adapter.kind, deft.adaptive$"):
        resolve_trial(spec, "t", TASK, 0, {"deft.approximation": "l1", "deft.alpha": 1.0})


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "random", "gp"])
@pytest.mark.parametrize("told_before", [0, 7])
def test_an_ask_that_was_cut_short_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, told_before: int
) -> None:
    """Killed before any of the lines that it writes to the journal."""
    deft = {"alpha": {"loguniform": [0.1, 10.0]}, "epsilon": {"loguniform": [1e-7, 1e-2]}}
    spec = make_spec(deft, sampler=sampler)

    def begun(folder: Path) -> TaskSearch:
        search = TaskSearch(spec, TASK, folder)
        for number in range(told_before):
            alpha = float(search.point(number)["deft.alpha"])
            search.tell(number, [record(score=1 - alpha / 20, density=1 / (1 + alpha))], [BASELINE])
        return search

    write, left = JournalFileBackend.append_logs, [0]

    def dies(journal: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(journal, logs)

    whole = begun(tmp_path / "whole").point(told_before)
    lines = {"mo_tpe": 1, "gp": 1, "tpe": 3, "random": 3}[sampler]
    for line in range(lines + 1):
        folder = tmp_path / f"cut{line}"
        cut = begun(folder)
        left[0] = line
        monkeypatch.setattr(JournalFileBackend, "append_logs", dies)
        with pytest.raises(KeyboardInterrupt) if line < lines else nullcontext():
            cut.point(told_before)
        monkeypatch.undo()
        again = TaskSearch(spec, TASK, folder)

        assert again.point(told_before) == whole
        again.tell(told_before, [record()], [BASELINE])
        assert again.point(told_before + 1).keys() == whole.keys()


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "random", "grid"])
def test_a_point_of_the_queue_that_was_cut_short_is_the_one_of_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Killed after the first leaf of a point that was not sampled; another was told before it is asked again."""
    tree: dict[str, Any] = {
        "approximation": {"choice": ["l0", "sigmoid"]},
        "alpha": {"choice": [0.1, 0.2, 0.3]},
        "epsilon": {"choice": [1e-7, 1e-6]},
        "beta": {"choice": [5.0, 20.0]},
    }
    first = [{"deft.approximation": "sigmoid", "deft.alpha": alpha, "deft.beta": 5.0} for alpha in (0.2, 0.3)]
    spec = make_spec(tree, sampler=sampler, **({"trials": 8} if sampler == "grid" else {"try_first": first}))
    want = grid(spec)[:2] if sampler == "grid" else first
    search = TaskSearch(spec, TASK, tmp_path)
    assert search.point(0) == want[0]
    suggest, calls = optuna.Trial.suggest_categorical, list[str]()

    def dies(trial: optuna.Trial, name: str, choices: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return suggest(trial, name, choices)

    monkeypatch.setattr(optuna.Trial, "suggest_categorical", dies)
    with pytest.raises(KeyboardInterrupt):
        search.point(1)
    monkeypatch.undo()
    again = TaskSearch(spec, TASK, tmp_path)
    again.tell(0, [record()], [BASELINE])
    assert again.point(1) == want[1]
    assert told(tmp_path)[1].params == want[1]


def test_points_that_were_not_all_noted_down_are_noted_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec({"alpha": {"choice": [0.1, 0.2, 0.3, 0.4, 0.5]}}, sampler="grid", trials=8)
    enqueue, calls = optuna.Study.enqueue_trial, list[Any]()

    def dies(study: optuna.Study, params: dict[str, Any]) -> None:
        calls.append(params)
        if len(calls) == 3:
            raise KeyboardInterrupt
        enqueue(study, params)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", dies)
    with pytest.raises(KeyboardInterrupt):
        TaskSearch(spec, TASK, tmp_path)
    monkeypatch.undo()
    again = TaskSearch(spec, TASK, tmp_path)

    assert [again.point(number)["deft.alpha"] for number in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_grid_is_every_combination_that_is_read_once(tmp_path: Path) -> None:
    deft = {
        "approximation": {"choice": ["l0", "l1"]},
        "epsilon": {"choice": [1e-5, 1e-3]},
        "alpha": {"choice": [0.5, 1.0, 2.0]},
    }
    spec = make_spec(deft, sampler="grid", trials=8)
    assert build_plan(spec, "out", Machine(1, 0)).trials == 1 + 9
    assert Schedule(spec, tmp_path / "all", []).remaining == 1 + 9
    points = grid(spec)
    assert len(points) == 3 * (2 + 1)
    search = TaskSearch(spec, TASK, tmp_path)
    asked = [search.point(number) for number in range(9)]
    assert sorted(map(repr, (sorted(p.items()) for p in asked))) == sorted(
        map(repr, (sorted(p.items()) for p in points))
    )
    assert all(("deft.epsilon" in point) == (point["deft.approximation"] == "l0") for point in asked)


# --- how points end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "ending", "state", "values", "broken"),
    [
        (record(score=0.895), "complete", TrialState.COMPLETE, [-0.005, 0.5], 0.0),
        (record(score=0.95), "complete", TrialState.COMPLETE, [0.05, 0.5], 0.0),
        (record(score=0.85), "infeasible", TrialState.COMPLETE, [-0.05, 0.5], 0.04),
        (record("pruned", score=0.6), "pruned", TrialState.PRUNED, None, 0.0),
        (record("diverged", score=None, density=None), "diverged", TrialState.PRUNED, None, 1.0),
        (record("failed", score=None, density=None), "failed", TrialState.FAIL, None, 0.0),
        (record("stopped", score=0.6), "stopped", TrialState.FAIL, None, 0.0),
        (record(score=math.nan), "diverged", TrialState.PRUNED, None, 1.0),
        (record(score=None), "diverged", TrialState.PRUNED, None, 1.0),
        (record(score=-math.inf), "diverged", TrialState.PRUNED, None, 1.0),
        (record(density=math.inf), "diverged", TrialState.PRUNED, None, 1.0),
    ],
)
def test_each_ending_is_told_as_what_it_is(
    tmp_path: Path, result: Record, ending: str, state: TrialState, values: list[float] | None, broken: float
) -> None:
    search = TaskSearch(make_spec(limit=0.01), TASK, tmp_path)
    search.point(0)
    search.tell(0, [result], [BASELINE])
    search.tell(0, [replace(result, score=0.1)], [BASELINE])  # again, after a resume: nothing happens
    (trial,) = told(tmp_path)

    assert trial.state == state
    pruned = trial.user_attrs.pop("pruned_at", None)
    assert trial.user_attrs == {"ending": ending, "steps": 7}
    assert (pruned is not None) == (ending == "pruned")
    assert sum(max(0.0, value) for value in trial.constraints.values()) == pytest.approx(broken)
    assert (None if trial.values is None else pytest.approx(trial.values)) == values


def test_a_pruned_point_is_told_at_its_rung_with_what_it_missed_there(tmp_path: Path) -> None:
    rungs = Rungs(3.0, 0.05, tmp_path / JOURNAL)
    rungs.arrive(task=TASK, trial="b", seed=0, baseline=True, rung=0, step=9, score=0.6, density=0.9)
    for trial, rung, score in (("t1", 0, 0.4), ("t2", 0, 0.58), ("t2", 1, 0.7)):
        rungs.arrive(task=TASK, trial=trial, seed=0, baseline=False, rung=rung, step=9, score=score, density=0.1)
    search = TaskSearch(make_spec(limit=0.05), TASK, tmp_path)
    search.point(0)
    search.tell(0, [record("pruned", score=0.4, density=0.1, trial="t1")], [BASELINE])
    search.point(1)
    search.tell(
        1, [record("pruned", score=s, density=0.1, trial=t) for t, s in (("t1", 0.4), ("t2", 0.7))], [BASELINE] * 2
    )
    search.point(2)
    search.tell(2, [record("pruned", score=0.7, density=0.1, trial="t2")], [BASELINE])
    first, both, second = (trial.user_attrs["pruned_at"] for trial in told(tmp_path))
    assert first == {"rung": 0, "missed": pytest.approx(0.15), "values": pytest.approx([-0.5, 0.1])}
    assert second == {"rung": 1, "missed": 0.0, "values": pytest.approx([-0.2, 0.1])}
    assert (both["rung"], both["missed"]) == (0, pytest.approx(0.15)), "several seeds: the first rung, the worst miss"


def test_what_was_stopped_early_is_ranked_as_the_rungs_saw_it(tmp_path: Path) -> None:
    """Further before less far; of those that came as far the feasible ones first; what diverged last."""
    rungs = Rungs(3.0, 0.05, tmp_path / JOURNAL)
    rungs.arrive(task=TASK, trial="b", seed=0, baseline=True, rung=0, step=9, score=0.6, density=0.9)
    search, ends = TaskSearch(make_spec(limit=0.05), TASK, tmp_path), list[Record]()
    for number, (status, rung, score, density) in enumerate(
        [
            ("pruned", 0, 0.3, 0.01),  # collapsed
            ("pruned", 0, 0.6, 0.5),
            ("diverged", 0, None, None),
            ("pruned", 1, 0.6, 0.8),
            ("complete", None, 0.7, 0.01),  # infeasible
            ("complete", None, 0.9, 0.6),
        ]
    ):
        named = {"task": TASK, "trial": f"t{number}", "seed": 0, "baseline": False}
        for below in range(rung + 1 if rung is not None and score is not None else 0):
            rungs.arrive(**named, rung=below, step=9, score=score, density=density)
        ends.append(record(status, score=score, density=density, trial=f"t{number}"))
        search.point(number)
        search.tell(number, [ends[-1]], [BASELINE])
    want = [5, 4, 3, 1, 0, 2]
    judged = [one for one in map(_judge, told(tmp_path)) if one is not None]
    for count in range(len(want) + 1):
        assert {trial.number for trial in _best(judged, count)} == set(want[:count])


@pytest.mark.parametrize("status", ["failed", "stopped", "complete"])
def test_no_point_of_a_finite_space_is_asked_twice(tmp_path: Path, status: str) -> None:
    """Neither while points are drawn at random, nor when one failed, nor while others are under way."""
    deft = {"alpha": {"choice": [0.1, 0.2, 0.4, 0.8, 1.6]}, "epsilon": {"choice": [1e-7, 1e-6, 1e-5, 1e-4]}}
    spec = make_spec(deft, sampler="mo_tpe", try_first=[{"deft.alpha": 0.4, "deft.epsilon": 1e-5}])
    search, asked = TaskSearch(spec, TASK, tmp_path), list[tuple[Any, ...]]()
    for number in range(20):
        values = search.point(number)
        asked.append(tuple(values.values()))
        if number >= 2:
            alpha = float(dict(search.point(number - 2))["deft.alpha"])
            fails = alpha > 0.3 and status != "complete"
            end = record(status) if fails else record(density=1.0 - alpha / 2)
            search.tell(number - 2, [end], [BASELINE])
    assert len(set(asked)) == 20
    assert search.point(20), "then one of them again"


def test_without_anything_to_search_every_point_is_the_same(tmp_path: Path) -> None:
    search = TaskSearch(make_spec({"alpha": 1.0}, sampler="mo_tpe"), TASK, tmp_path)
    for number in range(8):
        assert search.point(number) == {}
        search.tell(number, [record()], [BASELINE])


def test_of_several_seeds_the_worst_ending_counts(tmp_path: Path) -> None:
    search = TaskSearch(make_spec(limit=0.01), TASK, tmp_path)
    cases = [("complete", "failed"), ("diverged", "complete"), ("pruned", "diverged"), ("complete", "complete")]
    for number, statuses in enumerate(cases):
        search.point(number)
        search.tell(number, [record(status) for status in statuses], [BASELINE, BASELINE])
    assert [t.user_attrs["ending"] for t in told(tmp_path)] == ["failed", "diverged", "diverged", "complete"]


def test_changes_are_means_over_seeds_against_their_own_baselines() -> None:
    results = [record(score=0.8, density=0.2), record(score=0.7, density=0.4)]
    baselines = [record(score=0.9), record(score=0.5)]
    assert changes(results, baselines) == pytest.approx((0.05, 0.3))
    assert changes(results, [baselines[0], record("failed")]) is None
    assert changes([results[0], record(density=None)], baselines) is None
    assert changes([], []) is None


@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "nsga2", "gp"])
def test_the_sampler_keeps_away_from_what_breaks_the_limit(tmp_path: Path, sampler: str) -> None:
    """α above 1 misses the score limit, above 5 diverges; the density alone would drive α up without end.

    The best lies at the edge. Drawn at random, half of the points are above 1 and a third above 5.
    """
    deft = {"alpha": {"loguniform": [0.01, 100.0]}, "epsilon": {"loguniform": [1e-7, 1e-2]}}
    seeds, count = (1, 24) if sampler == "gp" else (4, 60)
    late = list[float]()
    for seed in range(seeds):
        spec = make_spec(deft, 0.01, sampler=sampler, startup_trials=8, seed=seed)
        search, asked = TaskSearch(spec, TASK, tmp_path / str(seed)), list[float]()
        for number in range(count):
            alpha = float(search.point(number)["deft.alpha"])
            asked.append(alpha)
            if alpha > 5:
                result = record("diverged", score=None, density=None)
            else:
                result = record(score=0.9 if alpha <= 1 else 0.7, density=1.0 / (1.0 + alpha))
            search.tell(number, [result], [BASELINE])
        late += asked[count // 2 :]

    assert sum(alpha > 5 for alpha in late) / len(late) < 0.2, "three fifths of what chance would ask for"
    assert sum(0.2 < alpha <= 1 for alpha in late) / len(late) > 0.35, "twice what chance would ask for"


@pytest.mark.parametrize("sampler", ["mo_tpe", "nsga2", "gp"])
def test_the_sampler_keeps_away_from_what_collapses_at_a_rung(tmp_path: Path, sampler: str) -> None:
    """α above 1 leaves no activation and no score, and is pruned each time; half of what chance would ask for.

    Optuna's TPE, which sees no values of what was pruned, hardly learns it: 0.45.
    """
    deft = {"alpha": {"loguniform": [0.01, 100.0]}, "epsilon": {"loguniform": [1e-7, 1e-2]}}
    seeds, count = (1, 24) if sampler == "gp" else (4, 60)
    late = list[float]()
    for seed in range(seeds):
        folder = tmp_path / str(seed)
        spec = make_spec(deft, 0.05, sampler=sampler, startup_trials=8, seed=seed, scheduler="mo_asha")
        rungs, search, asked = Rungs(3.0, 0.05, folder / JOURNAL), TaskSearch(spec, TASK, folder), list[float]()
        rungs.arrive(task=TASK, trial="b", seed=0, baseline=True, rung=0, step=9, score=0.9, density=0.99)
        for number in range(count):
            alpha, trial = float(search.point(number)["deft.alpha"]), f"t{number}"
            asked.append(alpha)
            score, density = (0.9, 1.0 / (1.0 + alpha)) if alpha <= 1 else (0.1, 0.001)
            if alpha > 1:
                named = {"task": TASK, "trial": trial, "seed": 0, "baseline": False}
                rungs.arrive(**named, rung=0, step=9, score=score, density=density)
            result = record("complete" if alpha <= 1 else "pruned", score=score, density=density, trial=trial)
            search.tell(number, [result], [BASELINE])
        late += asked[count // 2 :]

    assert sum(alpha > 1 for alpha in late) / len(late) < 0.4


# --- a thresholded density --------------------------------------------------------------------------------------------


def test_a_search_at_a_threshold_is_told_score_and_density_there(tmp_path: Path) -> None:
    """The baseline stays as it was trained: a threshold may not lower what is compared with."""
    tree = {
        "name": "s",
        "data": {"tasks": [TASK]},
        "dial": {"taus": [0.1, 0.3]},
        "deft": {"alpha": {"uniform": [0.1, 1]}},
        "train": {"steps": 1},
        "search": {"trials": 3, "objectives": {"score": "max", "density@0.3": "min"}},
        "constraint": {"max_score_drop": 0.1},
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    search = TaskSearch(spec, TASK, tmp_path)
    baseline = record(score=0.9, density=0.99, baseline=True, dial={"0.3": {"score": 0.7, "density": 0.2}})
    dials = ({"0.1": (0.87, 0.5), "0.3": (0.85, 0.25)}, {"0.3": (0.6, 0.1)}, {})
    ends = [
        record(score=0.88, dial={tau: {"score": at[0], "density": at[1]} for tau, at in dial.items()}) for dial in dials
    ]
    for number, end in enumerate(ends):
        search.point(number)
        search.tell(number, [end], [baseline])

    first, second, third = told(tmp_path)
    assert first.values == pytest.approx([-0.05, 0.25])
    assert first.user_attrs["ending"] == "complete"
    assert second.values == pytest.approx([-0.3, 0.1])
    assert second.user_attrs["ending"] == "infeasible"
    assert third.user_attrs["ending"] == "failed"


def test_a_rung_judges_at_the_threshold_and_the_baseline_as_it_is() -> None:
    judged: list[dict[str, Any]] = []

    class Judge:
        def arrive(self, **arrival: Any) -> bool:
            judged.append(arrival)
            return len(judged) < 3

    def trial(name: str, alpha: float) -> Any:
        spec = tiny_trial(Path("m"), "bert", None, TASK, trial=name, deft__alpha=alpha, judged_at=0.1, dial__taus=[0.1])
        return SimpleNamespace(config={"trial": name, "spec": spec.model_dump_json()})

    row = {"kind": "eval", "rung": 0, "step": 2, "score": 0.8, "density": 0.9}
    row |= {"dial": {"0": {"score": 0.8, "density": 0.9}, "0.1": {"score": 0.75, "density": 0.4}}}
    scheduler = RungScheduler(Judge())  # type: ignore[arg-type]
    trials = [trial(f"t{number}", float(number)) for number in range(3)]
    answers = [scheduler.on_trial_result(None, one, {"rows": [row]}) for one in trials]
    seen = [(arrival["trial"], arrival["score"], arrival["density"]) for arrival in judged]
    assert seen == [("t0", 0.8, 0.9), ("t1", 0.75, 0.4), ("t2", 0.75, 0.4)]
    assert answers == ["CONTINUE", "CONTINUE", "STOP"]
