r"""Which trials are worth keeping: feasibility, Pareto dominance and hypervolume of one task's records.

Two objectives: score (more is better) and density (less is better). With P a set of trials of one task,

.. math:: a \prec b \iff s_a \ge s_b,\ d_a \le d_b,\ (s_a, d_a) \ne (s_b, d_b)

the front is the trials of P that no trial of P dominates. Two trials with the same score and the same density do not
dominate each other: both are kept, because they are two settings between which a user may choose.

Where the sweep has a threshold dial, a trial gives several points: itself, and itself with all activations of magnitude
of at most τ set to zero. The baseline too: *PEFT + threshold* is the rival of every DEFT point. Which τ of a trial
stand is chosen on the calibration split, which nothing was trained on and nothing is reported on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from deft_ray.errors import RecordsError
from deft_ray.metrics import tau_key
from deft_ray.results.files import write_text
from deft_ray.results.records import Record, Scalar

CSV_COLUMNS = (
    "task", "trial", "seed", "score", "density", "score_drop", "density_change", "tau", "baseline", "steps", "dtype",
)  # fmt: skip
"""Columns that every table of points starts with; the settings that vary follow under their dotted names."""

_ROUNDING = 1e-9
"""A limit of 0.01 must admit 0.90 - 0.89, which is 0.010000000000000009 in floating point."""


@dataclass(frozen=True)
class Point:
    """One trial as the front sees it, as it was trained or at one threshold.

    Args:
        task: Task of the trial.
        trial: Its name within the sweep.
        seed: Its seed.
        status: Status of its record.
        baseline: Whether the density loss was off.
        score: The task's metric; None if not measured.
        density: Density; None if not measured.
        score_drop: Baseline score minus score; None without a usable baseline. The baseline is as it was trained.
        density_change: (baseline density - density) / baseline density; None without a usable baseline.
        tau: Activations of magnitude of at most this are set to zero; 0 for none.
        feasible: Whether the score limit admits it; true where there is no limit or no baseline to judge by.
        on_front: Whether no eligible trial of the task dominates it.
        steps: Optimizer steps done.
        dtype: Compute dtype.
        config: Flat settings, dotted names.
    """

    task: str
    trial: str
    seed: int
    status: str
    baseline: bool
    score: float | None
    density: float | None
    score_drop: float | None = None
    density_change: float | None = None
    tau: float = 0.0
    feasible: bool = True
    on_front: bool = False
    steps: int = 0
    dtype: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict, hash=False)

    @property
    def reference(self) -> bool:
        """Whether it is a baseline as it was trained, which the others are compared with."""
        return self.baseline and self.tau == 0.0

    @property
    def name(self) -> str:
        """The trial's name, with the threshold if there is one."""
        return f"{self.trial} at τ = {self.tau:g}" if self.tau else self.trial

    @property
    def eligible(self) -> bool:
        """Whether it may stand on a front: complete, feasible, score and density both finite."""
        return self.status == "complete" and self.feasible and self.measured

    @property
    def measured(self) -> bool:
        """Whether score and density are both finite numbers."""
        return _is_finite(self.score) and _is_finite(self.density)


def is_feasible(score_drop: float | None, max_score_drop: float | None) -> bool:
    """Whether the score limit admits a trial; true where there is no limit, or no baseline to judge by.

    >>> is_feasible(0.90 - 0.89, 0.01), is_feasible(0.02, 0.01), is_feasible(None, 0.01)
    (True, False, True)
    """
    return max_score_drop is None or score_drop is None or score_drop <= max_score_drop + _ROUNDING


def points(records: Iterable[Record], max_score_drop: float | None = None) -> list[Point]:
    """Compare every record with the complete baseline of its task, seed and dtype.

    Args:
        records: Records of one sweep, any number of tasks.
        max_score_drop: Largest admissible baseline score minus score; None for no limit. A baseline is always feasible
            as it was trained.

    Returns:
        For each record its point as it was trained, then those of the dial by rising τ; ``on_front`` is set within each
        task.

    Raises:
        RecordsError: If one task was measured in more than one dtype.
    """
    records = list(records)
    _check_one_dtype(records)
    baselines = _baselines(records)
    found = []
    for record in records:
        baseline = baselines.get(_peer_key(record))
        taus = (0.0, *chosen_taus(record, baseline, max_score_drop))
        found += [_point(record, tau, baseline, max_score_drop) for tau in taus]
    fronts = [front([point for point in found if point.task == task]) for task in _tasks(found)]
    chosen = {(point.task, point.trial, point.tau) for members in fronts for point in members}
    return [replace(p, on_front=(p.task, p.trial, p.tau) in chosen) for p in found]


def chosen_taus(record: Record, baseline: Record | None, max_score_drop: float | None) -> list[float]:
    """Choose the thresholds at which a trial stands beside itself, on the calibration split alone.

    Those that no other one of the trial, 0 among them, equals or beats in both score and density, and that lose no more
    than the limit against the baseline as it was trained.

    Args:
        record: A complete trial's record; of others none stands.
        baseline: The baseline of its task and seed.
        max_score_drop: The score limit; None for none.

    Returns:
        τ above 0, rising.
    """
    dial = [(float(tau), found) for tau, found in record.dial.items()]
    keys = ("calibration_score", "calibration_density")
    dial = sorted((tau, found) for tau, found in dial if all(_is_finite(found.get(key)) for key in keys))
    if record.status != "complete" or not dial:
        return []
    values = np.array([[-found["calibration_score"], found["calibration_density"]] for _, found in dial])
    keep = moocore.is_nondominated(values, keep_weakly=False)
    before = None if baseline is None else baseline.dial.get(tau_key(0.0), {}).get("calibration_score")
    return [
        tau
        for (tau, found), kept in zip(dial, keep, strict=True)
        if tau > 0.0
        and kept
        and is_feasible(None if before is None else before - found["calibration_score"], max_score_drop)
    ]


def of_first(points: Sequence[Point], trials: int) -> list[Point]:
    """Return the points of the first so many trials, in the order of the points."""
    names = list(dict.fromkeys((point.task, point.trial) for point in points))[:trials]
    kept = set(names)
    return [point for point in points if (point.task, point.trial) in kept]


def front(points: Iterable[Point]) -> list[Point]:
    """The eligible points of one task that no other dominates, by rising density, then trial.

    Trials with equal score and equal density are all kept.

    Args:
        points: Points of one task; those that are infeasible, not complete or not finite are left out.

    Raises:
        ValueError: If the points belong to more than one task.
    """
    eligible = _eligible(points)
    if not eligible:
        return []
    keep = moocore.is_nondominated(_objectives(eligible), keep_weakly=True)
    chosen = [replace(point, on_front=True) for point, kept in zip(eligible, keep, strict=True) if kept]
    return sorted(chosen, key=lambda p: (p.density, p.trial, p.tau))


def hypervolume(points: Iterable[Point], ref: tuple[float, float] = (0.0, 1.0)) -> float:
    """Area that the eligible points of one task dominate within the reference (score, density).

    Args:
        points: Points of one task; what :func:`front` would leave out is left out here.
        ref: Score and density of the reference point; a point that is not better in both adds nothing.

    Returns:
        An area in [0, 1] for the default reference; 0 for no points.

    Raises:
        ValueError: If the points belong to more than one task.
    """
    eligible = _eligible(points)
    if not eligible:
        return 0.0
    return float(moocore.hypervolume(_objectives(eligible), ref=[-ref[0], ref[1]]))


def hypervolume_history(
    records: Iterable[Record], task: str, max_score_drop: float | None = None, ref: tuple[float, float] = (0.0, 1.0)
) -> list[float]:
    """Hypervolume of one task after each of its ended trials, in record order; never falls.

    Feasibility is judged by all records, so a trial that ended before its baseline counts from its own end on.
    """
    found = [point for point in points(records, max_score_drop) if point.task == task]
    trials = len({point.trial for point in found})
    return [hypervolume(of_first(found, ended), ref) for ended in range(1, trials + 1)]


def lowest_density(points: Iterable[Point], max_score_drop: float) -> Point | None:
    """The eligible point of the lowest density whose score is at most so far below its baseline's; None without one.

    Each is compared with the baseline of its own seed, so it need not stand on a front of scores over several seeds.

    Args:
        points: Points of one task.
        max_score_drop: In units of the score.
    """
    near = [p for p in _eligible(points) if p.score_drop is not None and is_feasible(p.score_drop, max_score_drop)]
    return min(near, key=lambda point: (point.density, point.trial, point.tau), default=None)


def knee(points: Iterable[Point]) -> Point | None:
    r"""The front's point beyond which the score falls faster than the density; None for a front of fewer than three.

    That of the largest distance from the line between the front's two ends, both objectives scaled to the front's range
    (Das, 1999):

    .. math:: \max_p \; \tilde s_p - \tilde d_p, \qquad \tilde s_p, \tilde d_p \in [0, 1]

    None too where no point lies above that line. Of equal ones the lower density.
    """
    chosen = front(points)
    values = _objectives(chosen) if chosen else np.empty((0, 2))
    span = np.ptp(values, axis=0) if len(values) else np.zeros(2)
    if len(chosen) < 3 or not span.all():
        return None
    scaled = (values - values.min(axis=0)) / span
    gains = 1.0 - scaled.sum(axis=1)
    best = int(np.argmax(gains))
    return chosen[best] if gains[best] > _ROUNDING else None


def varying(points: Iterable[Point]) -> list[str]:
    """Names of the settings that are not the same in all points; those of the method (``deft.``) first, then by name.

    ``seed`` and ``task`` are left out: every table has them anyway.
    """
    configs = [point.config for point in points]
    names = {name for config in configs for name in config} - set(CSV_COLUMNS)
    changing = [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]
    return sorted(changing, key=lambda name: (not name.startswith("deft."), name))


def write_front_csv(path: Path, fronts: Mapping[str, Sequence[Point]], settings: Sequence[str] | None = None) -> Path:
    """Write the fronts of all tasks as one table, all or nothing.

    Args:
        path: File to create or replace.
        fronts: Front of each task.
        settings: Settings to add as columns; those that vary among the fronts if not given.

    Returns:
        ``path``.
    """
    rows = [point for task in fronts for point in fronts[task]]
    settings = varying(rows) if settings is None else settings
    cells = [[getattr(p, name) for name in CSV_COLUMNS] + [p.config.get(name) for name in settings] for p in rows]
    return write_text(path, to_csv([*CSV_COLUMNS, *settings], cells))


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV text: full float precision, nothing for None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _peer_key(record: Record) -> tuple[str, int, str]:
    return record.task, record.seed, record.dtype


def _tasks(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point.task for point in points))


def _baselines(records: Iterable[Record]) -> dict[tuple[str, int, str], Record]:
    """The first usable baseline of each task, seed and dtype."""
    usable: dict[tuple[str, int, str], Record] = {}
    for record in records:
        measured = _is_finite(record.score) and _is_finite(record.density)
        if record.baseline and record.status == "complete" and measured:
            usable.setdefault(_peer_key(record), record)
    return usable


def _point(record: Record, tau: float, baseline: Record | None, max_score_drop: float | None) -> Point:
    score, density = record.at(tau)
    drop, change = _against(score, density, baseline)
    return Point(
        task=record.task,
        trial=record.trial,
        seed=record.seed,
        status=record.status,
        baseline=record.baseline,
        score=score,
        density=density,
        score_drop=drop,
        density_change=change,
        tau=tau,
        feasible=(record.baseline and tau == 0.0) or is_feasible(drop, max_score_drop),
        steps=record.steps,
        dtype=record.dtype,
        config=record.config,
    )


def _against(score: float | None, density: float | None, baseline: Record | None) -> tuple[float | None, float | None]:
    """Score drop and density change; None where either side has no finite number, or the baseline's density is zero."""
    if baseline is None or baseline.score is None or baseline.density is None:
        return None, None
    drop = change = None
    if score is not None and math.isfinite(score):
        drop = baseline.score - score
    if density is not None and math.isfinite(density) and baseline.density > 0:
        change = (baseline.density - density) / baseline.density
    return drop, change


def _check_one_dtype(records: Iterable[Record]) -> None:
    dtypes: dict[str, set[str]] = {}
    for record in records:
        if record.density is not None:
            dtypes.setdefault(record.task, set()).add(record.dtype)
    for task, seen in dtypes.items():
        if len(seen) > 1:
            raise RecordsError(
                f"task {task}: measured in more than one dtype ({', '.join(sorted(seen))}); "
                "exact zeros depend on the dtype, so compare only records of one"
            )


def _eligible(points: Iterable[Point]) -> list[Point]:
    points = list(points)
    tasks = _tasks(points)
    if len(tasks) > 1:
        raise ValueError(f"a front belongs to one task (got {', '.join(tasks)})")
    return [point for point in points if point.eligible]


def _objectives(points: Sequence[Point]) -> np.ndarray:
    """(n, 2) float64, both to be minimised: minus score, density."""
    return np.array([[-(p.score or 0.0), p.density or 0.0] for p in points], dtype=np.float64)
