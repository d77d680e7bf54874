"""What a person sees: one line per ended trial, with what changed and how long it will take."""

from __future__ import annotations

import io

import pytest

from deft_ray.results.front import Point
from deft_ray.results.records import Record
from deft_ray.sweep.live import LiveLines, format_left, format_sample


def record(status: str = "complete", *, baseline: bool = False, wall_s: float = 10.0) -> Record:
    return Record(
        trial="t0003",
        task="sst2",
        seed=1,
        baseline=baseline,
        status=status,
        score=0.875,
        density=0.25,
        score_metric="accuracy",
        dtype="float32",
        activation="",
        wall_s=wall_s,
        cause=None if status == "complete" else "Traceback\n  File\nMemoryError: too much",
    )


def point(*, baseline: bool = False) -> Point:
    return Point("sst2", "t0003", 1, "complete", baseline, 0.875, 0.25, score_drop=0.025, density_change=0.75)


def line(rec: Record, pnt: Point, remaining: int) -> str:
    stream = io.StringIO()
    LiveLines(done=3, slots=2, stream=stream).ended(rec, pnt, {"deft.alpha": 0.5}, remaining)
    return stream.getvalue()


def test_a_complete_trial() -> None:
    text = line(record(), point(), remaining=8)
    assert text.count("\n") == 1
    for part in ("[ 4/12]", "t0003", "accuracy 0.875 (-0.025)", "density 0.250 ( -75.0%)", "40 s left", "alpha=0.5"):
        assert part in text


def test_a_baseline_is_compared_with_nothing() -> None:
    text = line(record(baseline=True), point(baseline=True), remaining=0)
    assert "baseline" in text
    assert "%" not in text
    assert "left" not in text


def test_a_failed_trial_says_why_in_one_line() -> None:
    text = line(record("failed"), point(), remaining=1)
    assert text.count("\n") == 1
    assert "failed: MemoryError: too much" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.0, "89 s"), (600.0, "10 min"), (5399.0, "90 min"), (9000.0, "2.5 h")]
)
def test_time_left(seconds: float, text: str) -> None:
    assert format_left(seconds) == text


def test_sample() -> None:
    assert format_sample({"deft.epsilon": 1e-7, "adapter.r": 8, "deft.approximation": "l0"}) == (
        "epsilon=1e-07 r=8 approximation=l0"
    )
