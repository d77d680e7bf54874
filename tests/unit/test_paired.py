"""Paired tests against the standard error, a slow bootstrap in plain Python, and the metrics' own library."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deft_ray.errors import RecordsError
from deft_ray.results.front import points
from deft_ray.results.paired import paired_drop, with_paired_tests
from deft_ray.results.predictions import read_predictions, write_predictions
from deft_ray.results.records import Record
from deft_ray.tasks.scoring import score_labels

METRICS = ["accuracy", "f1", "matthews", "pearson", "spearman"]


def answers(metric: str, size: int, errors: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True labels, and what a model says that is wrong so often."""
    dice = np.random.default_rng(seed)
    true = np.random.default_rng(99).integers(2, size=size).astype(np.float64)
    if metric in ("pearson", "spearman"):
        graded = np.random.default_rng(98).integers(26, size=size) / 5  # with ties, as STS-B has them
        return graded, graded + 6 * errors * dice.standard_normal(size)
    return true, np.where(dice.random(size) < errors, 1 - true, true)


def pair(metric: str, size: int, seed: int = 0) -> tuple[dict[str, np.ndarray], float, dict[str, np.ndarray], float]:
    true, worse = answers(metric, size, 0.3, seed)
    return {"label": true, "0.1": worse}, 0.1, {"label": true, "0": answers(metric, size, 0.2, seed + 50)[1]}, 0.0


def slow_drops(metric: str, pairs: list[Any], draws: int) -> list[float]:
    """Resample row by row and ask the metrics' library."""
    dice, found = random.Random(7), []
    for _ in range(draws):
        size = len(pairs[0][0]["label"])
        rows = [dice.randrange(size) for _ in range(size)]
        drops = []
        for mine, tau, other, at in pairs:
            true = [mine["label"][row] for row in rows]
            said, theirs = ([columns[f"{t:g}"][row] for row in rows] for columns, t in ((mine, tau), (other, at)))
            drops.append(score_labels([metric], theirs, true)[metric] - score_labels([metric], said, true)[metric])
        found.append(sum(drops) / len(drops))
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seeds", [1, 3])
def test_as_a_slow_bootstrap(metric: str, seeds: int) -> None:
    pairs = [pair(metric, 150, seed) for seed in range(seeds)]
    found = paired_drop(metric, pairs)
    assert found is not None
    slow = np.array(slow_drops(metric, pairs, 1500))
    within = 5 * slow.std() / 1500**0.5 + 5 * slow.std() / 2000**0.5
    assert found.drops.mean() == pytest.approx(slow.mean(), abs=within)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(slow, [0.025, 0.975])), abs=0.25 * slow.std())
    limit = float(np.quantile(slow, 0.8))
    assert found.chance_worse(limit) == pytest.approx(0.2, abs=0.06)


def test_as_the_standard_error_of_paired_differences() -> None:
    """Not that of two independent sets: what both models get wrong together falls out."""
    dice = np.random.default_rng(1)
    true = np.ones(4000)
    hard = dice.random(4000) < 0.3
    mine, other = (np.where(hard | (dice.random(4000) < extra), 0.0, 1.0) for extra in (0.03, 0.01))
    found = paired_drop("accuracy", [({"label": true, "0": mine}, 0.0, {"label": true, "0": other}, 0.0)])
    assert found is not None
    difference = other - mine
    assert found.drop == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / 4000**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    independent = 1.96 * (mine.var() / 4000 + other.var() / 4000) ** 0.5
    assert half < 0.4 * independent, "the test would be as weak as one without pairs"


@pytest.mark.parametrize("metric", METRICS)
def test_the_measured_drop_is_that_of_the_metrics(metric: str) -> None:
    mine, tau, other, at = pair(metric, 200)
    found = paired_drop(metric, [(mine, tau, other, at)])
    true = list(mine["label"])
    before, after = (score_labels([metric], list(said), true)[metric] for said in (other["0"], mine["0.1"]))
    assert found is not None
    assert found.drop == pytest.approx(before - after, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_answer_scores_as_the_metrics_say(metric: str) -> None:
    true, said = answers(metric, 60, 0.2, 0)
    found = paired_drop(metric, [({"label": true, "0": np.zeros(60)}, 0.0, {"label": true, "0": said}, 0.0)])
    assert found is not None
    want = (
        score_labels([metric], list(said), list(true))[metric] - score_labels([metric], [0.0] * 60, list(true))[metric]
    )
    assert found.drop == pytest.approx(want, abs=1e-6)
    assert np.isfinite(found.drops).all()


def test_equal_models_are_not_worse_and_questions_have_means() -> None:
    same = {"0": np.array([0.0, 0.5, 1.0, 1.0])}
    found = paired_drop("f1", [(same, 0.0, same, 0.0)])
    assert found is not None
    assert (found.drop, found.low, found.high, found.chance_worse(0.0)) == (0.0, 0.0, 0.0, 0.0)
    less = paired_drop("f1", [({"0": np.array([0.0, 0.0, 0.5, 0.5])}, 0.0, same, 0.0)])
    assert less is not None
    assert less.drop == pytest.approx(0.625 - 0.25)


def test_what_was_not_kept_or_is_of_other_examples_is_not_tested() -> None:
    mine, tau, other, at = pair("accuracy", 20)
    assert paired_drop("accuracy", []) is None
    one = {"label": np.ones(1), "0": np.ones(1)}
    assert paired_drop("accuracy", [(one, 0.0, one, 0.0)]) is None
    with pytest.raises(ValueError, match="no paired test for 'bleu'"):
        paired_drop("bleu", [(mine, tau, other, at)])
    assert paired_drop("accuracy", [({}, 0.0, other, at)]) is None
    assert paired_drop("accuracy", [(mine, 0.2, other, at)]) is None, "no such threshold"
    assert paired_drop("accuracy", [(mine, tau, {**other, "label": 1 - other["label"]}, at)]) is None
    assert paired_drop("accuracy", [(mine, tau, {name: column[:9] for name, column in other.items()}, at)]) is None


def record(trial: str, score: float, density: float, **changes: Any) -> Record:
    known = {"task": "rte", "seed": 0, "baseline": False, "status": "complete", "score_metric": "accuracy"}
    return Record(trial=trial, score=score, density=density, dtype="float32", activation="", **{**known, **changes})


def test_points_of_a_sweep(tmp_path: Path) -> None:
    """Two seeds of one setting, each with its own baseline; the front's points have intervals, the rest none."""
    true = np.array([0.0, 1.0] * 50)
    wrong = {"t0": 10, "t1": 12, "t2": 14, "t2-s1": 14, "t3": 40, "t4": 20}
    for trial, count in wrong.items():
        said = true.copy()
        said[:count] = 1 - said[:count]
        write_predictions(tmp_path, trial, {"label": list(true), "0": list(said)})
    records = [
        record("t0", 0.90, 0.9, baseline=True),
        record("t1", 0.88, 0.9, baseline=True, seed=1, setting="t0"),
        record("t2", 0.86, 0.5),
        record("t2-s1", 0.86, 0.5, seed=1, setting="t2"),
        record("t3", 0.60, 0.6),
        record("t4", 0.80, 0.2),
        record("t5", 0.95, 0.1),  # its predictions were not kept
    ]
    found = {p.trial: p for p in with_paired_tests(points(records), records, tmp_path, 0.05)}
    assert found["t3"].p_worse is None, "not on the front"
    assert (found["t0"].p_worse, found["t5"].p_worse) == (None, None)
    assert not found["t2"].on_front
    on_front = {p.trial: p for p in with_paired_tests(points(records[:-1]), records, tmp_path, 0.05)}
    two = on_front["t2"]
    assert (two.drop_low, two.p_worse) == (on_front["t2-s1"].drop_low, on_front["t2-s1"].p_worse)
    dice, drops = random.Random(3), []
    for _ in range(3000):  # of 100 rows the first 10 tell nothing, 2 only the second seed, 2 both
        rows = [dice.randrange(100) for _ in range(100)]
        drops.append(sum((10 <= r < 14) / 2 + (12 <= r < 14) / 2 for r in rows) / 100)
    assert two.drop_low is not None
    assert two.drop_high is not None
    assert two.drop_low == pytest.approx(float(np.quantile(drops, 0.025)), abs=0.005)
    assert two.drop_high == pytest.approx(float(np.quantile(drops, 0.975)), abs=0.005)
    assert two.p_worse == pytest.approx(sum(drop > 0.05 + 1e-9 for drop in drops) / 3000, abs=0.03)
    assert on_front["t4"].p_worse == pytest.approx(1.0, abs=0.1), "ten of a hundred worse, five allowed"


def test_torn_predictions_cost_the_test_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for trial in ("t0", "t1"):
        write_predictions(tmp_path, trial, {"label": [0.0, 1.0, 1.0], "0": [0.0, 1.0, 0.0]})
    (tmp_path / "predictions" / "t1.parquet").write_bytes(b"")
    records = [record("t0", 0.9, 0.9, baseline=True), record("t1", 0.9, 0.5)]
    found = with_paired_tests(points(records), records, tmp_path, 0.0)
    assert [point.p_worse for point in found] == [None, None]
    assert "no paired test of t1" in caplog.text


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    said = {"label": [0.0, 1.0, 2.5], "0": [0.1, -1.0, 1e-9], "0.05": [1.0, 2.0, 3.0]}
    file = write_predictions(tmp_path, "t0001", said)
    assert [path.name for path in file.parent.iterdir()] == ["t0001.parquet"]
    assert {name: list(column) for name, column in read_predictions(tmp_path, "t0001").items()} == said
    assert read_predictions(tmp_path, "t0002") == {}
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RecordsError, match=r"t0001\.parquet: cannot be read"):
        read_predictions(tmp_path, "t0001")
