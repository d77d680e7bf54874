"""Dominance and hypervolume against brute force, staircases and closed forms; feasibility and comparison by hand."""

from __future__ import annotations

import csv
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from deft_ray.errors import RecordsError
from deft_ray.results.across import ALL_TASKS, across_tasks
from deft_ray.results.front import (
    attainment,
    front,
    front_probability,
    hypervolume,
    hypervolume_history,
    knee,
    lowest_density,
    misplaced_reference,
    points,
    varying,
    write_front_csv,
)
from deft_ray.results.points import Point, chosen_taus, is_feasible, of_first
from deft_ray.results.records import Record

SEEDS = range(40)
#: Ten thousand sets of points, a thousand a test.
BATCHES = [range(start, start + 1000) for start in range(0, 10_000, 1000)]


def make_record(trial: str, score: float | None, density: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "task": "rte",
        "seed": 0,
        "baseline": False,
        "status": "complete",
        "score_metric": "accuracy",
        "dtype": "bfloat16",
        "activation": "relu",
        "config": {},
    }
    return Record(trial=trial, score=score, density=density, **{**values, **changes})


def make_point(trial: str, score: float | None, density: float | None, **changes: Any) -> Point:
    values: dict[str, Any] = {"task": "rte", "seed": 0, "status": "complete", "baseline": False}
    return Point(trial=trial, score=score, density=density, **{**values, **changes})


def random_points(seed: int) -> list[Point]:
    """Points on a coarse grid, so that ties and duplicates abound, some of them not numbers, some not eligible."""
    rng = random.Random(seed)
    grid = rng.choice([2, 4, 10, 1000])
    odd = [None, math.nan, math.inf, -math.inf]
    made = []
    for index in range(rng.randrange(0, 40)):
        score, density = (rng.randint(0, grid) / grid, rng.randint(0, grid) / grid)
        if rng.random() < 0.15:
            score, density = rng.choice([(rng.choice(odd), density), (score, rng.choice(odd))])  # type: ignore[assignment]
        status = rng.choice(["complete"] * 6 + ["failed", "diverged", "stopped"])
        made.append(make_point(f"t{index:04d}", score, density, status=status, feasible=rng.random() < 0.8))
    return made


def is_candidate(point: Point) -> bool:
    numbers = (point.score, point.density)
    return point.status == "complete" and point.feasible and all(n is not None and math.isfinite(n) for n in numbers)


def dominates(a: Point, b: Point) -> bool:
    return a.score >= b.score and a.density <= b.density and (a.score, a.density) != (b.score, b.density)  # type: ignore[operator]


def staircase(made: list[Point], ref: tuple[float, float]) -> float:
    """Area below the best score so far, swept from low density to the reference."""
    inside = sorted((p.density, p.score) for p in made if p.density < ref[1] and p.score > ref[0])  # type: ignore[operator]
    area, best = 0.0, ref[0]
    for (density, score), (following, _) in itertools.pairwise([*inside, (ref[1], 0.0)]):
        best = max(best, score)
        area += (best - ref[0]) * (following - density)
    return area


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: str(batch.start))
def test_front_against_brute_force(batch: range) -> None:
    for seed in batch:
        check_front(random_points(seed))


def check_front(made: list[Point]) -> None:
    able = [p for p in made if is_candidate(p)]
    expected = {p.trial for p in able if not any(dominates(q, p) for q in able)}
    chosen = front(made)
    assert {p.trial for p in chosen} == expected
    assert len(chosen) == len(expected)
    assert [(p.density, p.trial) for p in chosen] == sorted((p.density, p.trial) for p in chosen)
    assert all(p.on_front for p in chosen)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: str(batch.start))
def test_hypervolume_against_the_staircase(batch: range) -> None:
    for seed in batch:
        made, ref = random_points(seed), ((0.0, 1.0), (0.25, 0.75))[seed % 2]
        expected = staircase([p for p in made if is_candidate(p)], ref)
        assert hypervolume(made, ref) == pytest.approx(expected, abs=1e-12), seed
        assert hypervolume(front(made), ref) == pytest.approx(expected, abs=1e-12), seed


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5])
def test_lowest_density_against_brute_force(seed: int, drop: float) -> None:
    """Two seeds, whose baselines scored 0.5 and 0.9."""
    made = random_points(seed)
    made = [
        replace(p, seed=n % 2, score_drop=(0.5, 0.9)[n % 2] - p.score) if is_candidate(p) else p
        for n, p in enumerate(made)
    ]  # type: ignore[operator]
    near = [p.density for p in made if is_candidate(p) and p.score >= (0.5, 0.9)[p.seed] - drop - 1e-9]  # type: ignore[operator]
    found = lowest_density(made, drop)
    assert (found.density if found else None) == min(near, default=None)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_knee_is_farthest_from_the_line_between_the_ends(seed: int) -> None:
    chosen = front(random_points(seed))
    found = knee(chosen)
    if len({(p.score, p.density) for p in chosen}) < 3:
        assert found is None
        return
    (s0, d0), (s1, d1) = ((p.score, p.density) for p in (chosen[0], chosen[-1]))
    assert None not in (s0, d0, s1, d1)
    above = {  # twice the triangle's area over the base, which is the same for all
        p.trial: (d1 - d0) * (p.score - s0) - (s1 - s0) * (p.density - d0)  # type: ignore[operator]
        for p in chosen
    }
    if max(above.values()) < 1e-9:
        assert found is None
    else:
        assert found is not None
        assert above[found.trial] == pytest.approx(max(above.values()), abs=1e-12)


def test_a_knee_by_hand() -> None:
    bent = [make_point("t0", 0.5, 0.1), make_point("t1", 0.85, 0.2), make_point("t2", 0.9, 0.9)]
    hollow = [make_point("t0", 0.5, 0.1), make_point("t1", 0.55, 0.6), make_point("t2", 0.9, 0.9)]
    assert knee(bent) is not None
    assert knee(bent).trial == "t1"  # type: ignore[union-attr]
    assert knee(hollow) is None
    assert knee(bent[:2]) is None
    assert knee([]) is None


def test_hypervolume_by_hand() -> None:
    # widths 0.2, 0.3, 0.3 (from densities 0.2, 0.4, 0.7 to 1) under scores 0.5, 0.8, 0.9
    made = [make_point("a", 0.5, 0.2), make_point("b", 0.8, 0.4), make_point("c", 0.9, 0.7), make_point("d", 0.6, 0.5)]
    assert hypervolume(made) == pytest.approx(0.2 * 0.5 + 0.3 * 0.8 + 0.3 * 0.9)


@pytest.mark.parametrize(
    ("score", "density", "expected"),
    [(1.0, 0.0, 1.0), (0.5, 0.5, 0.25), (-0.2, 0.5, 0.0), (0.0, 0.5, 0.0), (0.5, 1.0, 0.0), (0.5, 1.5, 0.0)],
)
def test_hypervolume_of_one_point(score: float, density: float, expected: float) -> None:
    assert hypervolume([make_point("a", score, density)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ((0.5, 1.0), 0.1 * 0.1 + 0.1 * 0.3 + 0.5 * 0.4),
        ((0.8, 1.0), 0.5 * 0.1),
        ((0.5, 0.6), 0.1 * 0.1 + 0.1 * 0.3 + 0.1 * 0.4),
        ((0.9, 0.4), 0.0),
    ],
)
def test_hypervolume_to_another_reference_point(ref: tuple[float, float], expected: float) -> None:
    """Only what is better than the reference in both counts, and only as far as it."""
    made = [make_point("a", 0.8, 0.4), make_point("b", 0.9, 0.5), make_point("c", 0.6, 0.3)]
    assert hypervolume(made, ref) == pytest.approx(expected)


def test_a_reference_point_inside_the_front_is_told() -> None:
    made = [
        make_record("t0", 0.9, 0.8, baseline=True),
        make_record("t1", 0.95, 0.2),
        make_record("u0", 0.7, 0.99, baseline=True, task="cola"),
    ]
    found = points(made)
    assert misplaced_reference(found, None) == []
    assert misplaced_reference(found, 0.1, (0.6, 0.99)) == []
    assert misplaced_reference(found, 0.05, (0.66, 0.9)) == [
        "reference.score: lies inside the front: the baseline of cola scores 0.7 less constraint.max_score_drop = 0.05 "
        "(got 0.66); at most 0.65",
        "reference.density: lies inside the front: the baseline of cola has a density of 0.99 (got 0.9); "
        "at least 0.99, at most 1",
    ]
    assert [fault.split(":")[0] for fault in misplaced_reference(found, None, (0.95, 1.0))] == ["reference.score"] * 2
    odd = points([make_record("t0", 0.917456, 0.87654, baseline=True)])
    assert [fault.split("at ")[1:] for fault in misplaced_reference(odd, 0.01, (0.95, 0.5))] == [
        ["most 0.9074"], ["least 0.8766, ", "most 1"]
    ], "what is told can be given"  # fmt: skip
    assert misplaced_reference(points([make_record("t0", 0.95, 0.9, baseline=True)]), 0.05, (0.9, 0.9)) == []
    collapsed = points([make_record("t0", -0.1, 1.0, baseline=True)])
    assert misplaced_reference(collapsed, None) == [], "the default asks nothing of a baseline"


def test_nothing_gives_nothing() -> None:
    assert (front([]), hypervolume([]), points([])) == ([], 0.0, [])
    assert front([make_point("a", None, 0.5), make_point("b", 0.5, math.nan)]) == []


def test_equal_trials_are_all_kept() -> None:
    chosen = front([make_point("t2", 0.5, 0.5), make_point("t1", 0.5, 0.5), make_point("t0", 0.5, 0.6)])
    assert [p.trial for p in chosen] == ["t1", "t2"]


@pytest.mark.parametrize("function", [front, hypervolume])
def test_a_front_belongs_to_one_task(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^a front belongs to one task \(got rte, sst2\)$"):
        function([make_point("a", 1.0, 0.5), make_point("b", 1.0, 0.5, task="sst2")])


def test_comparison_with_the_baseline_of_the_same_task_and_seed() -> None:
    records = [
        make_record("t0", 0.80, 0.50, baseline=True),
        make_record("t1", 0.90, 0.40, baseline=True, seed=1),
        make_record("t2", 0.70, 0.10, baseline=True, task="sst2"),
        make_record("t3", 0.79, 0.25),
        make_record("t4", 0.79, 0.25, seed=1),
        make_record("t5", 0.75, 0.15, task="sst2"),
        make_record("t6", 0.75, 0.15, seed=2),
    ]
    found = {p.trial: p for p in points(records)}
    assert (found["t0"].score_drop, found["t0"].density_change) == (0.0, 0.0)
    assert found["t3"].score_drop == pytest.approx(0.01)
    assert found["t3"].density_change == pytest.approx(0.5)
    assert found["t4"].score_drop == pytest.approx(0.11)
    assert found["t4"].density_change == pytest.approx(0.375)
    assert found["t5"].score_drop == pytest.approx(-0.05)
    assert found["t5"].density_change == pytest.approx(-0.5)
    assert (found["t6"].score_drop, found["t6"].density_change) == (None, None)


@pytest.mark.parametrize(
    "baseline",
    [
        make_record("b", 0.8, 0.5, baseline=True, status="failed"),
        make_record("b", None, 0.5, baseline=True),
        make_record("b", 0.8, math.nan, baseline=True),
        make_record("b", 0.8, 0.5, baseline=True, seed=9),
    ],
)
def test_an_unusable_baseline_compares_with_nothing(baseline: Record) -> None:
    """So nobody knows whether it is within a limit; where there is one, it does not stand on the front."""
    records = [baseline, make_record("t", 0.1, 0.1)]
    point = points(records, max_score_drop=0.01)[1]
    assert (point.score_drop, point.density_change, point.feasible, point.on_front) == (None, None, False, False)
    assert points(records)[1].on_front


def test_the_first_usable_baseline_counts() -> None:
    first, second = make_record("b0", 0.8, 0.5, baseline=True), make_record("b1", 0.9, 0.5, baseline=True)
    failed = make_record("b2", None, None, baseline=True, status="failed")
    assert points([failed, first, second, make_record("t", 0.8, 0.5)])[3].score_drop == 0.0


def test_a_baseline_of_density_zero_has_no_relative_change() -> None:
    point = points([make_record("b", 0.8, 0.0, baseline=True), make_record("t", 0.8, 0.1)])[1]
    assert (point.score_drop, point.density_change) == (0.0, None)


def test_score_limit() -> None:
    records = [
        make_record("t0", 0.90, 0.50, baseline=True),
        make_record("t1", 0.89, 0.30),
        make_record("t2", 0.88, 0.10),
        make_record("t3", 0.70, 0.40, baseline=True, seed=1),
    ]
    found = {p.trial: p for p in points(records, max_score_drop=0.01)}
    assert [t for t, p in found.items() if p.feasible] == ["t0", "t1", "t3"]
    assert [t for t, p in found.items() if p.on_front] == ["t0", "t1"]
    assert [p.trial for p in points(records) if p.on_front] == ["t0", "t1", "t2"]


def test_a_baseline_is_always_feasible() -> None:
    records = [make_record("b0", 0.9, 0.5, baseline=True), make_record("b1", 0.5, 0.4, baseline=True)]
    second = points(records, max_score_drop=0.01)[1]
    assert second.score_drop == pytest.approx(0.4)
    assert (second.feasible, second.on_front) == (True, True)


@pytest.mark.parametrize(
    ("drop", "limit", "expected"),
    [
        (0.02, 0.01, False),
        (0.90 - 0.89, 0.01, True),
        (0.0101, 0.01, False),
        (0.0, 0.0, True),
        (-1.0, 0.0, True),
        (None, 0.0, False),
        (None, None, True),
        (9.0, None, True),
    ],
)
def test_is_feasible(drop: float | None, limit: float | None, expected: bool) -> None:
    assert is_feasible(drop, limit) is expected


def test_tasks_have_their_own_fronts() -> None:
    records = [make_record("t0", 0.9, 0.1), make_record("t1", 0.5, 0.5), make_record("t2", 0.1, 0.9, task="sst2")]
    assert [p.on_front for p in points(records)] == [True, False, True]


def test_stopped_and_failed_trials_stand_on_no_front() -> None:
    records = [make_record(f"t{i}", 0.9, 0.1, status=s) for i, s in enumerate(["stopped", "failed", "diverged"])]
    assert not any(p.on_front for p in points(records))


def test_two_dtypes_of_one_task_are_refused() -> None:
    records = [make_record("t0", 0.9, 0.1), make_record("t1", 0.9, 0.1, dtype="float32")]
    with pytest.raises(RecordsError) as caught:
        points(records)
    assert str(caught.value) == (
        "task rte: measured in more than one dtype (bfloat16, float32); "
        "exact zeros depend on the dtype, so compare only records of one"
    )


def test_a_dtype_without_a_measurement_does_not_matter() -> None:
    records = [make_record("t0", 0.9, 0.1), make_record("t1", None, None, status="failed", dtype="float32")]
    assert len(points(records)) == 2
    assert len(points([records[0], make_record("t2", 0.9, 0.1, dtype="float32", task="sst2")])) == 2


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_history_never_falls_and_ends_at_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    records = [make_record("b", 0.8, 0.5, baseline=True)]
    records += [
        make_record(f"t{i}", rng.random(), rng.random(), task=rng.choice(["rte", "sst2"]), config={}) for i in range(30)
    ]
    history = hypervolume_history(records, "rte", max_score_drop=0.3)
    own = [p for p in points(records, 0.3) if p.task == "rte"]
    assert len(history) == len(own)
    assert history == sorted(history)
    assert history[0] == pytest.approx(0.4)
    assert history[-1] == pytest.approx(staircase([p for p in own if is_candidate(p)], (0.0, 1.0)))


def test_a_failed_trial_repeats_the_value_of_the_history() -> None:
    records = [make_record("t0", 0.5, 0.5), make_record("t1", None, None, status="failed"), make_record("t2", 1.0, 0.5)]
    assert hypervolume_history(records, "rte") == pytest.approx([0.25, 0.25, 0.5])
    assert hypervolume_history(records, "sst2") == []


def test_varying_settings_of_the_method_come_first() -> None:
    configs = [
        {"adapter.r": 8, "deft.alpha": 0.0, "deft.beta": 20.0, "seed": 0},
        {"adapter.r": 4, "deft.alpha": 0.1, "deft.beta": 20.0, "seed": 1, "only.here": 1},
    ]
    made = [make_point(f"t{i}", 0.5, 0.5, config=config) for i, config in enumerate(configs)]
    assert varying(made) == ["deft.alpha", "adapter.r", "only.here"]
    assert varying([]) == []


def test_front_csv(tmp_path: Path) -> None:
    records = [
        make_record("t0", 0.9, 0.5, baseline=True, config={"deft.alpha": 0.0, "lr": 1e-4}, steps=7),
        make_record("t1", 0.8, 1 / 3, config={"deft.alpha": 0.1, "lr": 1e-4}),
        make_record("t2", 0.8, 0.1, task="a,b", config={"deft.alpha": 0.2}),
    ]
    found = points(records)
    fronts = {task: front(p for p in found if p.task == task) for task in ("rte", "a,b")}
    path = write_front_csv(tmp_path / "run" / "front.csv", fronts)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0])[:7] == ["task", "trial", "seed", "score", "density", "score_drop", "density_change"]
    assert list(rows[0])[-2:] == ["deft.alpha", "lr"]
    assert [row["trial"] for row in rows] == ["t1", "t0", "t2"]
    assert float(rows[0]["density"]) == 1 / 3
    assert (rows[1]["baseline"], rows[1]["steps"]) == ("True", "7")
    assert (rows[2]["task"], rows[2]["score_drop"], rows[2]["lr"]) == ("a,b", "", "")
    assert [p.name for p in path.parent.iterdir()] == ["front.csv"]


def test_front_csv_of_nothing_has_its_header(tmp_path: Path) -> None:
    path = write_front_csv(tmp_path / "front.csv", {})
    assert path.read_text().startswith("task,trial,seed,score,density,score_drop,density_change")
    assert len(path.read_text().splitlines()) == 1


# --- the threshold dial -----------------------------------------------------------------------------------------------


def dialled(score: float, density: float, calibration_score: float, calibration_density: float) -> dict[str, float]:
    return {
        "score": score,
        "density": density,
        "calibration_score": calibration_score,
        "calibration_density": calibration_density,
    }


BASELINE_DIAL = {
    "0": dialled(0.90, 0.99, 0.92, 0.98),
    "0.1": dialled(0.89, 0.60, 0.93, 0.61),
    "0.2": dialled(0.88, 0.40, 0.90, 0.41),
    "0.4": dialled(0.95, 0.10, 0.80, 0.11),  # lucky on the validation split: calibration knows better
}
TRIAL_DIAL = {
    "0": dialled(0.88, 0.70, 0.91, 0.70),
    "0.05": dialled(0.88, 0.50, 0.91, 0.70),  # equals 0 in calibration: of equals the first stands
    "0.1": dialled(0.70, 0.35, 0.91, 0.35),  # stands by calibration, and is infeasible where it is reported
    "0.2": dialled(0.87, 0.30, 0.905, 0.30),
    "0.3": dialled(0.87, 0.31, 0.90, 0.31),  # beaten by 0.2 in calibration
}
DIALLED = [
    make_record("t0", 0.90, 0.99, baseline=True, dial=BASELINE_DIAL),
    make_record("t1", 0.88, 0.70, dial=TRIAL_DIAL),
]


def test_calibration_alone_chooses_the_thresholds_that_stand() -> None:
    found = [(p.trial, p.tau, p.score, p.density, p.feasible, p.on_front) for p in points(DIALLED, 0.05)]
    assert found == [
        ("t0", 0.0, 0.90, 0.99, True, True),
        ("t0", 0.1, 0.89, 0.60, True, True),
        ("t0", 0.2, 0.88, 0.40, True, True),
        ("t1", 0.0, 0.88, 0.70, True, False),
        ("t1", 0.1, 0.70, 0.35, False, False),
        ("t1", 0.2, 0.87, 0.30, True, True),
    ]
    drops = {(p.trial, p.tau): p.score_drop for p in points(DIALLED, 0.05)}
    assert drops["t1", 0.2] == pytest.approx(0.90 - 0.87), "against the baseline as it was trained"
    assert drops["t0", 0.2] == pytest.approx(0.90 - 0.88)
    changes = {(p.trial, p.tau): p.density_change for p in points(DIALLED, 0.05)}
    assert changes["t0", 0.2] == pytest.approx((0.99 - 0.40) / 0.99)


def test_without_a_limit_every_threshold_stands_that_none_beats_in_calibration() -> None:
    assert [(p.trial, p.tau) for p in points(DIALLED)] == [
        ("t0", 0.0), ("t0", 0.1), ("t0", 0.2), ("t0", 0.4), ("t1", 0.0), ("t1", 0.1), ("t1", 0.2)
    ]  # fmt: skip


def test_a_thresholded_baseline_is_a_rival_and_no_reference() -> None:
    found = points(DIALLED, 0.01)
    assert [(p.trial, p.tau) for p in found if p.reference] == [("t0", 0.0)]
    assert [p.name for p in found if p.baseline] == ["t0", "t0 at τ = 0.1"]
    assert [p.feasible for p in points([replace(DIALLED[0], dial=BASELINE_DIAL | {
        "0.1": dialled(0.5, 0.6, 0.93, 0.61)})], 0.01)] == [True, False]  # fmt: skip
    best = lowest_density(found, 0.01)
    assert best is not None
    assert (best.trial, best.tau) == ("t0", 0.1)


@pytest.mark.parametrize("status", ["pruned", "stopped", "failed", "diverged"])
def test_a_trial_that_did_not_complete_has_no_thresholds(status: str) -> None:
    assert [p.tau for p in points([DIALLED[0], replace(DIALLED[1], status=status)])] == [0.0, 0.1, 0.2, 0.4, 0.0]


def test_the_history_grows_by_a_trial_at_all_its_thresholds() -> None:
    found = points(DIALLED, 0.05)
    first = [p for p in found if p.trial == "t0"]
    assert of_first(found, 1) == first
    assert hypervolume_history(DIALLED, "rte", 0.05) == [hypervolume(first), hypervolume(found)]
    by_hand = 0.87 * (0.40 - 0.30) + 0.88 * (0.60 - 0.40) + 0.89 * (0.99 - 0.60) + 0.90 * (1 - 0.99)
    assert hypervolume(found) == pytest.approx(by_hand)


def test_front_csv_names_the_threshold_of_every_point(tmp_path: Path) -> None:
    found = points(DIALLED, 0.05)
    with write_front_csv(tmp_path / "front.csv", {"rte": front(found)}).open() as stream:
        rows = [(row["trial"], float(row["tau"]), float(row["density"])) for row in csv.DictReader(stream)]
    assert rows == [("t1", 0.2, 0.30), ("t0", 0.2, 0.40), ("t0", 0.1, 0.60), ("t0", 0.0, 0.99)]


@pytest.mark.parametrize("seed", range(30))
def test_chosen_thresholds_against_brute_force(seed: int) -> None:
    dice = random.Random(seed)
    coarse = [index / 8 for index in range(9)]
    taus = ["0", "0.01", "0.1", "0.3", "1", "3"]
    dial = {tau: dialled(0.5, 0.5, dice.choice(coarse), dice.choice(coarse)) for tau in taus}
    limit = dice.choice([None, 0.25])
    before = make_record("b", 0.9, 0.9, baseline=True, dial={"0": dialled(0.9, 0.9, 0.75, 0.9)})
    want = []
    for place, tau in enumerate(taus[1:], start=1):
        mine = dial[tau]["calibration_score"], dial[tau]["calibration_density"]
        for index, other in enumerate(taus):
            theirs = dial[other]["calibration_score"], dial[other]["calibration_density"]
            if theirs[0] >= mine[0] and theirs[1] <= mine[1] and (theirs != mine or index < place):
                break
        else:
            if limit is None or 0.75 - mine[0] <= limit:
                want.append(float(tau))
    assert chosen_taus([make_record("t", 0.5, 0.5, dial=dial)], [before], limit) == want


# --- several seeds ----------------------------------------------------------------------------------------------------


def seeded(setting: str, *measured: tuple[float, float], baseline: bool = False, **fields: Any) -> list[Record]:
    """One record for each seed: (score, density)."""
    return [
        make_record(f"{setting}-{seed}", score, density, seed=seed, setting=f"{setting}-0", baseline=baseline, **fields)
        for seed, (score, density) in enumerate(measured)
    ]


BEFORE = seeded("b", (0.90, 0.99), (0.94, 0.97), baseline=True)


def test_a_setting_stands_at_its_means_over_seeds() -> None:
    found = points([*BEFORE, *seeded("x", (0.80, 0.30), (0.90, 0.50)), *seeded("y", (0.86, 0.35), (0.70, 0.45))])
    assert [(p.trial, p.on_front) for p in found] == [
        ("b-0", True), ("b-1", True), ("x-0", True), ("x-1", True), ("y-0", False), ("y-1", False)
    ]  # fmt: skip
    x, b = front(found)
    assert (x.trial, x.seeds, b.trial, b.seeds) == ("x-0", 2, "b-0", 2)
    assert (x.score, x.density) == pytest.approx((0.85, 0.40))
    assert (x.score_std, x.density_std) == pytest.approx((0.1 / 2**0.5, 0.2 / 2**0.5))
    assert x.score_drop == pytest.approx(((0.90 - 0.80) + (0.94 - 0.90)) / 2), "each seed against its own baseline"
    assert x.density_change == pytest.approx((0.69 / 0.99 + 0.47 / 0.97) / 2)
    assert hypervolume(found) == pytest.approx(0.85 * (0.98 - 0.40) + 0.92 * (1 - 0.98))


def test_the_score_limit_is_about_the_mean_over_seeds() -> None:
    """One seed within it and one beyond it: 0.10 and 0.04 off."""
    records = [*BEFORE, *seeded("x", (0.80, 0.30), (0.90, 0.50))]
    assert [p.feasible for p in points(records, 0.07)] == [True] * 4
    assert [p.feasible for p in points(records, 0.069)] == [True, True, False, False]


@pytest.mark.parametrize("status", ["diverged", "pruned"])
def test_a_setting_of_which_a_seed_diverged_does_not_stand(status: str) -> None:
    good, bad = seeded("x", (0.95, 0.1), (0.95, 0.1))
    assert [p.trial for p in front(points([*BEFORE, good, replace(bad, status=status)]))] == ["b-0"]
    failed = points([*BEFORE, good, replace(bad, status="failed")])
    assert [(p.trial, p.seeds) for p in front(failed)] == [("x-0", 1)], "a fault of the machine says nothing of it"


def test_thresholds_of_a_setting_are_chosen_by_the_means_over_its_seeds() -> None:
    curves = [
        {"0": (0.9, 0.9), "0.1": (0.8, 0.5), "0.2": (0.9, 0.4)},
        {"0": (0.9, 0.9), "0.1": (0.9, 0.3), "0.2": (0.5, 0.4)},
    ]
    dials = [{tau: dialled(0.5, 0.5, *at) for tau, at in curve.items()} for curve in curves]
    records = [
        replace(record, dial=dial) for record, dial in zip(seeded("x", (0.9, 0.9), (0.9, 0.9)), dials, strict=True)
    ]
    assert [chosen_taus([record], [None], None) for record in records] == [[0.2], [0.1]]
    assert chosen_taus(records, [None, None], None) == [0.1], "0.85 at 0.40 against 0.70 at 0.40"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_alike_settings_stand_on_the_front_as_often_as_maxima_of_random_points(count: int) -> None:
    """Of n points whose coordinates are independent, 1 + 1/2 + … + 1/n are not dominated on average."""
    several = [p for n in range(count) for p in points(seeded(f"s{n}", (0.4, 0.4), (0.5, 0.5), (0.6, 0.6)))]
    found = front_probability(several, draws=4000)
    want = sum(1 / n for n in range(1, count + 1)) / count
    assert list(found.values()) == pytest.approx([want] * count, abs=0.03)


def test_who_hardly_keeps_the_limit_stands_as_often_as_it_does() -> None:
    """Drop 0.0087 of 0.01 allowed, the mean of three that scatter by 0.011."""
    records = [
        *seeded("b", (0.90, 0.9), (0.90, 0.9), (0.90, 0.9), baseline=True),
        *seeded("x", (0.880, 0.4), (0.902, 0.4), (0.892, 0.4)),
    ]
    found = {p.trial: p.front_probability for p in points(records, 0.01)}
    scores = np.array([0.880, 0.902, 0.892])
    want = norm.cdf((0.01 - (0.90 - scores.mean())) / (scores.std(ddof=1) / np.sqrt(3)))
    assert found["x-0"] == pytest.approx(want, abs=0.06)
    assert 0.5 < want < 0.7
    assert {p.trial: p.front_probability for p in points(records)}["x-0"] == 1.0, "no limit, and the least density"


def test_drops_that_never_differ_keep_the_limit_surely_and_are_those_of_their_own_seeds() -> None:
    baselines = [(0.90, 0.9), (0.94, 0.9), (0.92, 0.9)]
    steady = seeded("x", *((score - 0.009, 0.4) for score, _ in baselines))
    found = points([*seeded("b", *baselines, baseline=True), *steady], 0.01)
    assert {p.trial: p.front_probability for p in found}["x-0"] == 1.0
    lone = points([*seeded("b", *baselines, baseline=True), *seeded("x", (0.8905, 0.4))], 0.01)
    assert {p.trial: p.front_probability for p in lone}["x-0"] == 1.0, "0.0095 below its own seed's baseline"


def test_who_is_far_ahead_stands_surely_and_one_seed_scatters_as_the_others_do() -> None:
    records = seeded("far", (0.90, 0.10), (0.91, 0.11)) + seeded("near", (0.50, 0.50), (0.51, 0.51))
    found = front_probability(points([*records, make_record("lone", 0.905, 0.105)]))
    assert found["rte", "near-0", 0.0] == 0.0
    assert 0.3 < found["rte", "far-0", 0.0] < 1.0
    assert 0.3 < found["rte", "lone", 0.0] < 1.0
    assert front_probability(points(records[:1])) == {}, "one seed says nothing of its scatter"
    probabilities = {p.trial: p.front_probability for p in points(records)}
    assert probabilities == {"far-0": 1.0, "far-1": 1.0, "near-0": 0.0, "near-1": 0.0}


# --- one configuration for all tasks ----------------------------------------------------------------------------------


def test_settings_across_tasks_stand_at_mean_score_change_and_mean_density() -> None:
    def both(setting: str, one: tuple[float, float], other: tuple[float, float], **fields: Any) -> list[Record]:
        return [
            make_record(f"{setting}-{task}", *at, task=task, setting=setting, **fields)
            for task, at in (("rte", one), ("cola", other))
        ]

    before = both("b", (0.8, 0.9), (0.4, 0.7), baseline=True)
    good, poor = both("x", (0.7, 0.5), (0.4, 0.3)), both("y", (0.6, 0.6), (0.4, 0.3))
    half = both("z", (0.9, 0.1), (0.9, 0.1))[:1]
    broken = [*both("w", (0.9, 0.1), (0.9, 0.1))[:1], replace(both("w", (0, 0), (0, 0))[1], status="diverged")]
    found = across_tasks([*before, *good, *poor, *half, *broken], ["rte", "cola"])
    assert {record.task for record in found} == {ALL_TASKS}
    assert [(r.setting, r.score, r.density) for r in found] == [
        ("b", pytest.approx(0.6), pytest.approx(0.8)),
        ("x", pytest.approx(0.55), pytest.approx(0.4)),
        ("y", pytest.approx(0.5), pytest.approx(0.45)),
    ]
    placed = {p.setting: (p.score_drop, p.feasible, p.on_front) for p in points(found, 0.06)}
    assert placed == {
        "b": (0.0, True, True),
        "x": (pytest.approx(0.05), True, True),  # 0.1 off on one task, nothing on the other
        "y": (pytest.approx(0.10), False, False),
    }
    assert across_tasks(before[:1] + good, ["rte", "cola"]) == [], "before all baselines have ended"
    lost = [before[0], replace(before[1], status="failed")]
    assert [r.score for r in across_tasks([*lost, good[0]], ["rte", "cola"])] == [0.8, 0.7], "of the task that is left"
    for how in ({"status": "diverged"}, {"score": math.nan}):  # of a second seed: the schedule drops the task
        second = [replace(record, seed=1, trial=f"{record.trial}-1") for record in before]
        lost = [*before, second[0], replace(second[1], **how)]
        found = across_tasks([*lost, good[0]], ["rte", "cola"])
        assert [(r.seed, r.score) for r in found] == [(0, 0.8), (1, 0.8), (0, 0.7)]
    further = replace(before[1], trial="b-s1", seed=1, status="diverged")
    assert len(across_tasks([*before, further, *good], ["rte", "cola"])) == 2, "a front seed is lost alone"


def test_a_setting_has_the_name_of_its_first_seed_whichever_ended_first() -> None:
    first, second = seeded("x", (0.8, 0.3), (0.9, 0.5))
    (point,) = front(points([second, first]))
    assert (point.trial, point.seed, point.seeds) == ("x-0", 0, 2)


def test_settings_of_the_dial_are_no_columns() -> None:
    old = make_record("t0", 0.5, 0.5, config={"deft.alpha": 1.0})
    new = make_record("t1", 0.5, 0.5, config={"deft.alpha": 2.0, "dial.taus": "", "dial.calibration_examples": 256})
    assert varying(points([old, new])) == ["deft.alpha"]


@pytest.mark.parametrize("case", range(60))
def test_attainment_against_counting_seeds(case: int) -> None:
    """At every place of a grid: does any point of a seed lie there or better, for how many seeds?"""
    dice = random.Random(case)
    seeds, settings = dice.choice([2, 3, 5]), [f"t{number}" for number in range(dice.randint(1, 6))]
    levels = [index / 8 for index in range(9)]
    made = [
        make_point(f"{name}-s{seed}", dice.choice(levels), dice.choice(levels), seed=seed, setting=name)
        for name in settings
        for seed in range(seeds)
    ]
    lone = make_point("lone", 1.0, 0.0, setting="lone")
    found = attainment([*made, lone])
    assert list(found) == list(range(1, seeds + 1))
    for count, corners in found.items():
        assert corners == sorted(set(corners))
        for score in levels:
            for density in levels:
                by = {p.seed for p in made if p.score >= score and p.density <= density}  # type: ignore[operator]
                attained = any(s >= score and d <= density for d, s in corners)
                assert attained == (len(by) >= count), (count, score, density)


def test_attainment_needs_settings_with_every_seed() -> None:
    assert attainment([]) == {}
    assert attainment([make_point("t0", 0.5, 0.5)]) == {}
    apart = [make_point("t0", 0.5, 0.5, setting="t0"), make_point("t1", 0.5, 0.5, seed=1, setting="t1")]
    assert attainment(apart) == {}
    with pytest.raises(ValueError, match="a front belongs to one task"):
        attainment([make_point("t0", 0.5, 0.5), make_point("u0", 0.5, 0.5, task="cola")])
