"""Two sweeps beside each other, in numbers and in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deft_ray.cli import main
from deft_ray.errors import RecordsError
from deft_ray.results.against import compare_sweeps
from deft_ray.results.records import Record, RecordLog
from deft_ray.results.report import early_stopping, write_results


def record(trial: str, score: float | None, density: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {"task": "rte", "seed": 0, "baseline": False, "status": "complete", "steps": 90}
    fixed = {"score_metric": "accuracy", "dtype": "float32", "activation": "gelu", "config": {"train.steps": 90}}
    return Record(trial=trial, score=score, density=density, **{**values, **fixed, **changes})


BASELINE = record("t0", 0.90, 0.8, baseline=True)
WITHOUT = [BASELINE, record("t1", 0.90, 0.5), record("t2", 0.89, 0.2), record("t3", 0.5, 0.1)]
WITH = [
    BASELINE,
    record("t1", 0.90, 0.5),
    record("t2", 0.7, 0.3, status="pruned", steps=30),
    record("t3", 0.5, 0.1, status="pruned", steps=10),
]


def test_what_each_found_and_took() -> None:
    here, there = compare_sweeps(WITH, WITHOUT, 0.02, (0.5, 0.8))["rte"]
    assert (here.trials, here.steps, there.trials, there.steps) == (4, 220, 4, 360)
    assert here.hypervolume == pytest.approx(0.4 * 0.3)
    assert there.hypervolume == pytest.approx(0.4 * 0.3 + 0.39 * 0.3)
    assert here.lowest is not None
    assert there.lowest is not None
    assert (here.lowest.trial, there.lowest.trial) == ("t1", "t2")


def test_only_tasks_of_both_count() -> None:
    more = [*WITHOUT, record("u0", 0.5, 0.5, task="cola", baseline=True)]
    assert list(compare_sweeps(WITH, more, None)) == ["rte"]
    with pytest.raises(RecordsError, match="no task in common: rte here, cola there"):
        compare_sweeps(WITH, more[-1:], None)


def test_sweeps_of_two_dtypes_are_not_compared() -> None:
    other = [record("t0", 0.9, 0.8, baseline=True, dtype="bfloat16")]
    with pytest.raises(RecordsError, match=r"task rte: measured in more than one dtype \(bfloat16, float32\)"):
        compare_sweeps(WITH, other, None)


def test_sweeps_of_two_activations_are_not_compared() -> None:
    """The same block fused has other zeros; records from before it was kept say nothing."""
    other = [replace(each, activation="GELUTanh") for each in WITH]
    unknown = [replace(each, activation="") for each in WITH]
    with pytest.raises(RecordsError, match=r"task rte: measured in more than one activation \(GELUTanh, .+\); exact"):
        compare_sweeps(WITH, other, None)
    assert list(compare_sweeps(unknown, other, None)) == ["rte"]


def test_the_report_says_both(tmp_path: Path) -> None:
    write_results(tmp_path, "s", WITH, 0.02, against=("without", WITHOUT))
    text = (tmp_path / "report.md").read_text()
    assert "- Early stopping: 2 trials pruned: 220 steps trained, 140 (39%) saved" in text
    area, whole = 0.9 * 0.5, 0.9 * 0.5 + 0.89 * 0.3
    assert text.split("## Against without\n")[1].strip().split("\n\n")[0].splitlines() == [
        "| task | sweep | trials | steps | hypervolume | lowest density within 0.02 | its score |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| rte | this one | 4 | 220 | {area:.4f} | 0.5000 (t1) | 0.9000 |",
        f"| rte | without | 4 | 360 | {whole:.4f} | 0.2000 (t2) | 0.8900 |",
        f"| rte | difference | 0 | -38.9% | {100 * (area / whole - 1):.2f}% |  |  |",
    ]
    assert early_stopping(WITHOUT) == ""
    assert "Early stopping" not in write_results(tmp_path / "other", "s", WITHOUT)[-1].read_text()


def test_lengths_in_epochs_are_those_of_the_baseline() -> None:
    """1,000 steps are two epochs of batches of 8: one epoch of 16 is 250."""
    base, pruned = (
        record(name, 0.9, 0.8, baseline=name == "t0", status=status, steps=steps)
        for name, status, steps in (("t0", "complete", 1000), ("t1", "pruned", 100))
    )
    config = {"train.steps": None, "train.epochs": 2, "train.batch_size": 8}
    base = replace(base, config=config)
    pruned = replace(pruned, config={**config, "train.epochs": 1, "train.batch_size": 16})
    assert early_stopping([base, pruned]) == "1 trials pruned: 1,100 steps trained, 150 (12%) saved"
    assert early_stopping([replace(pruned, task="other"), base]) == ""


def test_the_command_takes_another_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, records in (("with", WITH), ("without", WITHOUT)):
        log = RecordLog(tmp_path / name / "records.jsonl")
        for each in records:
            log.append(each)
        spec = "name: s\nmodel: {name: nano}\ndata: {tasks: [rte]}\nsearch: {}\nconstraint: {max_score_drop: 0.02}\n"
        (tmp_path / name / "spec.yaml").write_text(spec)
    assert main(["report", str(tmp_path / "with"), "--against", str(tmp_path / "without")]) == 0
    assert "## Against without" in (tmp_path / "with" / "report.md").read_text()
    assert main(["report", str(tmp_path / "with"), "--against", str(tmp_path / "nothing")]) == 5
    assert "nothing: is no run directory" in capsys.readouterr().err
