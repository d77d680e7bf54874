"""A path through the real command: killed in its middle and resumed, each point goes on from the one before it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.sweeps import records, sweep

SPEC = """
name: path
data: {tasks: [nano-sentiment], train_examples: 300, validation_examples: 60}
deft: {alpha: {choice: [0.1, 1, 10]}}
train: {steps: 40, learning_rate: 3e-3, batch_size: 16}
search: {path: alpha, path_share: 0.25}
resources: {workers_per_host: 2}
"""


def test_a_path_goes_on_from_point_to_point(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    cut = sweep(tmp_path / "spec.yaml", tmp_path / "run", "--set", "budget.steps=45")
    assert cut.returncode == 0, cut.stdout + cut.stderr
    assert len(records(tmp_path / "run")) < 4
    done = sweep(tmp_path / "spec.yaml", tmp_path / "run", "--resume", "--set", "budget.steps=1000")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "run")
    assert [(r["trial"], r["started_from"], r["steps"], r["config"]["deft.alpha"]) for r in found] == [
        ("t0000", "", 40, 0.0),
        ("t0001", "t0000", 10, 0.1),
        ("t0002", "t0001", 10, 1),
        ("t0003", "t0002", 10, 10),
    ]
    assert all(record["status"] == "complete" for record in found)
    losses = {trial: first_loss(tmp_path / "run", trial) for trial in ("t0000", "t0001")}
    assert losses["t0001"] < losses["t0000"] - 0.1, "it does not begin anew"
    densities = [record["density"] for record in found]
    assert densities == sorted(densities, reverse=True)
    assert (
        "- Path: 3 trials train on from another one as α rises, for up to 10 steps"
        in (tmp_path / "run" / "report.md").read_text()
    )


def first_loss(run: Path, trial: str) -> float:
    rows = [json.loads(line) for line in (run / "curves" / f"{trial}.jsonl").read_text().splitlines()]
    return float(next(row["task_loss"] for row in rows if row["kind"] == "train"))
