"""The report's words and links, and the set of files that a sweep leaves."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from deft_ray.errors import RecordsError
from deft_ray.results.front import points
from deft_ray.results.records import Record
from deft_ray.results.report import first_line, write_report, write_results


def make_record(trial: str, score: float | None, density: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "task": "squad",
        "seed": 0,
        "baseline": False,
        "status": "complete",
        "score_metric": "f1",
        "dtype": "bfloat16",
        "activation": "gelu_new",
    }
    return Record(trial=trial, score=score, density=density, **{**values, **changes})


TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 1\nValueError: a|b\n"

SWEEP = [
    make_record("t0", 0.875, 0.5, baseline=True, config={"deft.alpha": 0.0}, wall_s=10.0, times={"train_s": 4.0}),
    make_record("t1", 0.865, 0.25, config={"deft.alpha": 0.5}, wall_s=30.0, times={"train_s": 8.0, "eval_s": 2.0}),
    make_record("t2", 0.5, 0.125, config={"deft.alpha": 1.0}, wall_s=float("nan")),
    make_record("t3", None, None, status="failed", cause=TRACEBACK, times={"train_s": 99.0}),
    make_record("t4", None, None, status="failed", cause=TRACEBACK),
    make_record("t5", None, None, status="diverged", cause="loss is nan at step 7"),
    make_record("u0", 0.25, 0.5, task="glue/cola", seed=1, score_metric="matthews", wall_s=20.0),
]


def report(tmp_path: Path, records: list[Record], **changes: Any) -> str:
    values: dict[str, Any] = {"max_score_drop": 0.02, "stop_reason": "all trials ended", "extra": {"GPU hours": 1.5}}
    values |= changes
    found = points(records, values["max_score_drop"])
    return write_report(tmp_path, "glue", records, found, **values).read_text()


def test_the_table_holds_baseline_and_front(tmp_path: Path) -> None:
    text = report(tmp_path, SWEEP)
    rows = [line for line in text.splitlines() if re.match(r"\| t\d", line)]
    assert rows == [
        "| t0 (baseline) | 0 | 0.8750 | +0.0000 | 0.5000 | +0.0 % | yes | 0 |",
        "| t1 | 0 | 0.8650 | +0.0100 | 0.2500 | +50.0 % | yes | 0.5 |",
    ]
    assert "| trial | seed | f1 ↑ | score drop ↓ | density ↓ | density change ↑ | on front | deft.alpha |" in text
    assert "Trials: 6, 3 complete, of them 1 infeasible and 2 on the front; 3 not complete." in text
    assert "Hypervolume 0.6538" in text


def test_another_reference_point_moves_every_hypervolume(tmp_path: Path) -> None:
    """From score 0.8 and density 0.45, the front's one point is 0.065 and 0.2 away."""
    write_results(tmp_path, "glue", SWEEP, 0.02, ref=(0.8, 0.45))
    area = "0.0130"
    assert f"Hypervolume {area} (reference: score 0.8, density 0.45)." in (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "hypervolume.csv").read_text().splitlines()))
    assert [float(row["hypervolume"]) for row in rows if row["task"] == "squad"][-1] == pytest.approx(0.065 * 0.2)
    assert f"Hypervolume {area}" in (tmp_path / "pareto-squad.html").read_text()


def test_heading(tmp_path: Path) -> None:
    assert report(tmp_path, SWEEP).splitlines()[:7] == [
        "# Sweep glue",
        "",
        "- Trials: 4 complete, 2 failed, 1 diverged",
        "- Score limit: a score may be 0.02 below the baseline of its task and seed",
        "- Ended because: all trials ended",
        "- GPU hours: 1.5",
        "",
    ]


def test_the_fullest_workers_memory_is_told(tmp_path: Path) -> None:
    peaks = [make_record(f"t{i}", 0.8, 0.2, peak_memory_gib=peak) for i, peak in enumerate((1.25, None, 2.5, 0.0))]
    assert "\n- Peak memory: 2.50 GiB in the fullest worker" in report(tmp_path, peaks)
    assert "Peak memory" not in report(tmp_path, peaks[1:2])


def test_what_packing_saved_is_told(tmp_path: Path) -> None:
    def packed(trial: str, **packing: float) -> Record:
        return make_record(trial, 0.8, 0.2, packing=packing)

    alone = [packed("t0", slots=1, passes=10, shared=0, part_s=0.0, alone_s=0.0)]
    shared = [
        packed("t1", slots=2, passes=20, shared=10, part_s=3.0, alone_s=5.0),
        packed("t2", slots=4, passes=70, shared=70, part_s=20.0, alone_s=41.0),
    ]
    told = "- Packing: up to 4 trials at once on a host; 80% of 100 passes were shared, in 23 s where 46 s are expected"
    assert f"{told} one by one (23 s of passes saved)" in report(tmp_path, [*alone, *shared])
    assert "Packing" not in report(tmp_path, alone)
    padded = [packed("t5", slots=2, passes=20, shared=20, part_s=4.0, alone_s=5.0, tokens=800, padding=100)]
    told = "100% of 20 passes were shared, with 12.5% of padding to each other's length, in 4 s"
    assert told in report(tmp_path, padded)
    worse = [packed("t3", slots=2, passes=20, shared=20, part_s=7.0, alone_s=5.0)]
    assert "in 7 s where 5 s are expected one by one (2 s lost)" in report(tmp_path, worse)
    unknown = [packed("t4", slots=2, passes=20, shared=2, part_s=0.0, alone_s=0.0)]
    assert "10% of 20 passes were shared\n" in report(tmp_path, unknown)


def test_of_what_hosts_measured_the_tightest_is_told(tmp_path: Path) -> None:
    found = [
        make_record("t0", 0.8, 0.2, host_memory_gib={"base": 1.5, "slot": 0.25, "free": 12.0}),
        make_record("t1", 0.8, 0.2, host_memory_gib={"base": 1.25, "slot": 0.5, "free": 20.0}),
        make_record("t2", 0.8, 0.2),
    ]
    told = "- Memory of a host: 1.5 GiB before a trial, 0.5 GiB for a trial at its longest; 12 GiB free beside the base"
    assert told in report(tmp_path, found)
    assert "Memory of a host" not in report(tmp_path, found[2:])


def test_a_path_is_told(tmp_path: Path) -> None:
    path = [
        make_record("t1", 0.8, 0.2, started_from="t0", steps=10),
        make_record("t2", 0.8, 0.1, started_from="t1", steps=10),
    ]
    told = "- Path: 2 trials train on from another one as α rises, for up to 10 steps"
    assert told in report(tmp_path, [make_record("t0", 0.9, 0.9, baseline=True), *path])
    assert "- Path" not in report(tmp_path, SWEEP)


def test_causes_come_once_with_their_trials(tmp_path: Path) -> None:
    text = report(tmp_path, SWEEP)
    assert "- failed: ValueError: a\\|b (2×: t3, t4)\n- diverged: loss is nan at step 7 (1×: t5)" in text
    many = [make_record(f"t{i}", None, None, status="failed", cause="no") for i in range(7)]
    assert "- failed: no (7×: t0, t1, t2, t3, t4, …)" in report(tmp_path, many)


def test_times_are_medians_of_complete_trials(tmp_path: Path) -> None:
    text = report(tmp_path, SWEEP)
    rest = "| trials beside it on its host, checkpoints | 13.0 |"  # 6 and 20 s
    assert f"| training | 6.0 |\n| evaluation | 2.0 |\n{rest}\n| whole trial | 20.0 |" in text
    assert "start-up" not in text


def test_no_records(tmp_path: Path) -> None:
    text = report(tmp_path, [], max_score_drop=None, stop_reason="", extra={})
    assert text.startswith("# Sweep glue\n\n- Trials: none\n- Score limit: none\n\n## More")


def test_a_task_with_nothing_to_show(tmp_path: Path) -> None:
    assert "No trial has both a score and a density." in report(tmp_path, [SWEEP[3]])
    *_, free = write_results(tmp_path / "free", "glue", [SWEEP[6]], None, "all trials ended")
    for text in (report(tmp_path, [SWEEP[6]]), free.read_text()):  # with a score limit, and without
        assert "No usable baseline: nothing to compare these scores with." in text
        assert "No trial has" not in text
    assert "| u0 |" in free.read_text()


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        (
            "sqlite:////runs/my run/mlflow.db",
            "- MLflow: `mlflow ui --backend-store-uri 'sqlite:////runs/my run/mlflow.db'`",
        ),
        ("http://server:5000", "- MLflow: http://server:5000"),
    ],
)
def test_how_to_open_mlflow(tmp_path: Path, uri: str, line: str) -> None:
    assert line in report(tmp_path, SWEEP, tracking_uri=uri)
    assert "MLflow" not in report(tmp_path, SWEEP)


def test_write_results_leaves_all_files_and_no_other(tmp_path: Path) -> None:
    written = write_results(tmp_path / "run", "glue", SWEEP, 0.02, "all trials ended")
    stems = ["pareto-squad", "pareto-glue-cola"]
    figures = [f"{stem}.{ending}" for stem in stems for ending in ("html", "png", "csv")]
    assert [path.name for path in written] == ["front.csv", "hypervolume.csv", *figures, "report.md"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in written}
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "run" / "report.md").read_text())
    assert set(links) - {"records.jsonl"} == {"front.csv", "hypervolume.csv", *figures}


def test_front_csv_has_every_setting_that_varies_in_the_sweep(tmp_path: Path) -> None:
    records = [*SWEEP[:2], make_record("t9", 0.1, 0.9, config={"deft.alpha": 0.5, "adapter.r": 4})]
    text = write_results(tmp_path, "glue", records)[0].read_text()
    assert text.splitlines()[0].endswith("dtype,deft.alpha,adapter.r")


def test_hypervolume_csv_follows_trials_and_steps(tmp_path: Path) -> None:
    records = [
        make_record("t0", 0.8, 1.0, baseline=True, steps=90),
        make_record("x0", 0.5, 0.5, task="rte", steps=7),
        make_record("t1", None, None, status="failed", steps=5),
        make_record("t2", 0.7, 0.4, steps=90),
        make_record("t3", 0.8, 0.5, steps=90),
    ]
    rows = list(csv.DictReader(write_results(tmp_path, "glue", records)[1].read_text().splitlines()))
    assert [(row["task"], row["trials"], row["trial"], row["steps"]) for row in rows] == [
        ("squad", "1", "t0", "90"),
        ("squad", "2", "t1", "95"),
        ("squad", "3", "t2", "185"),
        ("squad", "4", "t3", "275"),
        ("rte", "1", "x0", "7"),
    ]
    volumes = [float(row["hypervolume"]) for row in rows]
    assert volumes == pytest.approx([0.0, 0.0, 0.7 * 0.6, 0.7 * 0.1 + 0.8 * 0.5, 0.5 * 0.5])


def test_what_every_seed_attains_is_written_and_drawn(tmp_path: Path) -> None:
    """Seed 0 reaches 0.8 at 0.2 and 0.9 at 0.5, seed 1 the same scores at 0.4 and 0.3: both reach 0.9 at 0.5."""
    values = {"t1": [(0.8, 0.2), (0.8, 0.4)], "t2": [(0.9, 0.5), (0.9, 0.3)]}
    records = [
        make_record(f"{name}-s{seed}" if seed else name, *measured, seed=seed, setting=name)
        for name, both in values.items()
        for seed, measured in enumerate(both)
    ]
    written = write_results(tmp_path, "glue", records)
    assert [path.name for path in written][:3] == ["front.csv", "attainment.csv", "hypervolume.csv"]
    rows = [tuple(row.values()) for row in csv.DictReader((tmp_path / "attainment.csv").read_text().splitlines())]
    assert rows == [
        ("squad", "1", "2", "0.2", "0.8"),
        ("squad", "1", "2", "0.3", "0.9"),
        ("squad", "2", "2", "0.3", "0.8"),
        ("squad", "2", "2", "0.5", "0.9"),
    ]
    assert "attained by every seed" in (tmp_path / "pareto-squad.html").read_text()
    assert "attainment.csv" in (tmp_path / "report.md").read_text()


def test_write_results_twice_is_the_same(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_results(tmp_path, "glue", SWEEP, 0.02)}
    assert {path.name: path.read_bytes() for path in write_results(tmp_path, "glue", SWEEP, 0.02)} == first


def test_write_results_of_nothing(tmp_path: Path) -> None:
    assert [path.name for path in write_results(tmp_path, "glue", [])] == ["front.csv", "hypervolume.csv", "report.md"]


def test_two_dtypes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    records = [SWEEP[0], make_record("t9", 0.5, 0.5, dtype="float32")]
    with pytest.raises(RecordsError, match="task squad: measured in more than one dtype"):
        write_results(tmp_path / "run", "glue", records)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (None, "no cause recorded"),
        ("  \n", "no cause recorded"),
        ("out of memory\nat step 3", "out of memory"),
        (TRACEBACK, "ValueError: a|b"),
    ],
)
def test_first_line(cause: str | None, expected: str) -> None:
    assert first_line(cause) == expected


def test_warnings_come_once_with_their_trials(tmp_path: Path) -> None:
    records = [make_record(f"t{i}", 0.5, 0.5, warning="tanh on GELU" if i else None) for i in range(3)]
    text = report(tmp_path, records, max_score_drop=None)

    assert "## Warnings\n\n- tanh on GELU (2×: t1, t2)" in text
    assert "## Trials that did not complete" not in text
