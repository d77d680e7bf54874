"""The books of a sweep, whoever ends first: records, the search, the front and MLflow agree in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan
from deft_ray.spec.schema import TrialSpec
from deft_ray.sweep.books import Books
from deft_ray.sweep.run_dir import RunDir
from deft_ray.sweep.schedule import Schedule
from tests.searches import told

TREE: dict[str, Any] = {
    "name": "s",
    "data": {"tasks": ["nano-sentiment"]},
    "deft": {"alpha": {"loguniform": [0.1, 10.0]}, "epsilon": 1e-4},
    "train": {"steps": 2},
    "search": {"trials": 2},
    "constraint": {"max_score_drop": 0.1},
}


def rows(score: float, density: float) -> list[dict[str, Any]]:
    measured = {"score": score, "density": density, "score_metric": "accuracy"}
    return [
        {"kind": "train", "step": 1, "time": 1.0, "loss": 0.5},
        {"kind": "eval", "step": 2, "time": 2.0, **measured},
        {"kind": "end", "step": 2, "time": 3.0, "status": "complete", "steps": 2, "wall_s": 2.0, **measured},
    ]


def test_a_trial_that_ends_before_its_baseline_is_compared_once_that_has_ended(tmp_path: Path) -> None:
    spec, faults = check_tree(TREE)
    assert spec is not None, faults
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(spec, build_plan(spec, str(run_dir.path), Machine(2, 0)))
    schedule = Schedule(spec, run_dir.search, [])
    baseline, early, late = (schedule.next(beside_baselines=True) for _ in range(3))
    assert isinstance(baseline, TrialSpec)
    assert isinstance(early, TrialSpec)
    assert isinstance(late, TrialSpec)
    books = Books(spec, run_dir, schedule, 3)
    books.ended(early, rows(0.85, 0.5))
    front = (run_dir.path / "front.csv").read_text().splitlines()
    assert len(front) == 1, "with a limit nobody is admitted before there is a baseline"
    books.ended(baseline, rows(0.9, 1.0))
    books.ended(late, [{"kind": "end", "status": "abandoned", "cause": "no reason"}])
    assert books.finish("all trials have ended", "complete", {}) == []
    assert [record.trial for record in books.records] == ["t0001", "t0000"]
    assert schedule.under_way == 0
    point = told(run_dir.search, "nano-sentiment")[0]
    assert point.state == TrialState.COMPLETE
    assert point.values == pytest.approx([-0.05, 0.5])
    front = (run_dir.path / "front.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in front[1:]] == ["t0001", "t0000"]
    assert books.summary() == [
        "nano-sentiment: 2 on the front, the baseline with them; lowest density 0.500 (t0001, accuracy 0.850), "
        "baseline 1.000 (0.900)"
    ]
    client = MlflowClient(books.tracking_uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == spec.tracking.experiment]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    mine = runs["t0001 nano-sentiment"].data
    assert mine.metrics["score_drop"] == pytest.approx(0.05)
    assert mine.metrics["density_change"] == pytest.approx(0.5)
    assert mine.metrics["loss"] == 0.5
    assert mine.tags["on_front"] == "true"
