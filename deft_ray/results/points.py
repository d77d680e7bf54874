r"""Records as points that can be compared: against the baseline, at thresholds, over seeds.

Where the sweep has a threshold dial, a trial gives several points: itself, and itself with all activations of magnitude
of at most τ set to zero. The baseline too: *PEFT + threshold* is the rival of every DEFT point. Which τ of a trial
stand is chosen on the calibration split, which nothing was trained on and nothing is reported on.

A setting that was trained with several seeds is one point: the means over its seeds, each seed compared with its own
baseline.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import moocore
import numpy as np

from deft_ray.errors import RecordsError
from deft_ray.metrics import tau_key
from deft_ray.results.records import Record, Scalar

_ROUNDING = 1e-9
"""A limit of 0.01 must admit 0.90 - 0.89, which is 0.010000000000000009 in floating point."""


@dataclass(frozen=True)
class Point:
    """One trial, or the trials of one setting, as the front sees it: as trained or at one threshold.

    Args:
        task: Task of the trial.
        trial: Its name within the sweep; of several seeds the first.
        seed: Its seed; of several the first.
        status: Status of its record.
        baseline: Whether the density loss was off.
        score: The task's metric; None if not measured.
        density: Density; None if not measured.
        score_drop: Baseline score minus score; None without a usable baseline. The baseline is as it was trained.
        density_change: (baseline density - density) / baseline density; None without a usable baseline.
        tau: Activations of magnitude of at most this are set to zero; 0 for none.
        feasible: Whether the score limit admits it, by the mean over its setting's seeds; true where there is no limit,
            false where there is no baseline to judge by.
        whole: Whether no seed of its setting diverged or was pruned.
        on_front: Whether no eligible setting of the task dominates its own.
        steps: Optimizer steps done.
        dtype: Compute dtype.
        config: Flat settings, dotted names.
        setting: Name of the setting: the trial of its first seed.
        seeds: How many seeds are in it.
        score_std: Standard deviation of the score over seeds; None for one.
        density_std: The same of the density.
        drop_low: Lower end of the 95 % interval of the score drop over resampled validation examples, each seed paired
            with its baseline; None where it was not tested.
        drop_high: Upper end of the same.
        p_worse: Level at which that test refuses "the score is worse by more than the limit"; see ``results.paired``.
        front_probability: Probability that its setting keeps the limit and stands on the front, if scores and densities
            scatter about their means as they do over seeds; None where no setting of the task has several.
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
    whole: bool = True
    on_front: bool = False
    steps: int = 0
    dtype: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    setting: str = ""
    seeds: int = 1
    score_std: float | None = None
    density_std: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    p_worse: float | None = None
    front_probability: float | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What makes it one point with those of other seeds: task, setting, threshold."""
        return self.task, self.setting or self.trial, self.tau

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
        return self.status == "complete" and self.feasible and self.whole and self.measured

    @property
    def measured(self) -> bool:
        """Whether score and density are both finite numbers."""
        return is_finite(self.score) and is_finite(self.density)


def is_finite(value: float | None) -> bool:
    """Whether there is a number, and it is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


def is_feasible(score_drop: float | None, max_score_drop: float | None) -> bool:
    """Whether the score limit admits a trial: there is none, or a baseline to judge by and the loss is within it.

    >>> is_feasible(0.90 - 0.89, 0.01), is_feasible(0.02, 0.01), is_feasible(None, 0.01), is_feasible(None, None)
    (True, False, False, True)
    """
    return max_score_drop is None or (score_drop is not None and score_drop <= max_score_drop + _ROUNDING)


def compare(records: Iterable[Record], max_score_drop: float | None = None) -> list[Point]:
    """Compare every record with the complete baseline of its task, seed and dtype.

    Args:
        records: Records of one sweep, any number of tasks.
        max_score_drop: Largest admissible baseline score minus score; None for no limit. A baseline is always feasible
            as it was trained.

    Returns:
        For each record its point as it was trained, then those of the dial by rising τ.

    Raises:
        RecordsError: If one task was measured in more than one dtype, or with more than one activation.
    """
    records = list(records)
    check_comparable(records)
    baselines = _baselines(records)
    settings: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        settings.setdefault((record.task, record.setting or record.trial), []).append(record)
    taus, broken = {}, set()
    for name, mine in settings.items():
        taus[name] = chosen_taus(mine, [baselines.get(_peer_key(record)) for record in mine], max_score_drop)
        if any(record.status in ("diverged", "pruned") for record in mine):
            broken.add(name)
    found = []
    for record in records:
        name, baseline = (record.task, record.setting or record.trial), baselines.get(_peer_key(record))
        standing = (0.0, *taus[name]) if record.status == "complete" else (0.0,)
        found += [replace(_point(record, tau, baseline), whole=name not in broken) for tau in standing]
    return _judged(found, max_score_drop)


def _judged(found: list[Point], max_score_drop: float | None) -> list[Point]:
    """The points with what the score limit says of their settings."""
    drops: dict[tuple[str, str, float], list[float]] = {}
    for point in found:
        if point.status == "complete" and point.score_drop is not None:
            drops.setdefault(point.key, []).append(point.score_drop)
    means = {key: sum(values) / len(values) for key, values in drops.items()}
    return [replace(p, feasible=p.reference or is_feasible(means.get(p.key), max_score_drop)) for p in found]


def merge(points: Iterable[Point]) -> list[Point]:
    """Make one point of each setting and threshold: means over the seeds that are complete and measured.

    Args:
        points: Points; those that are not complete, or have no finite score and density, are left out.

    Returns:
        In the order of the settings' first points.
    """
    groups: dict[tuple[str, str, float], list[Point]] = {}
    for point in points:
        if point.status == "complete" and point.measured:
            groups.setdefault(point.key, []).append(point)
    return [_mean(members) for members in groups.values()]


def _mean(members: Sequence[Point]) -> Point:
    if len(members) == 1:
        return members[0]
    members = sorted(members, key=lambda point: (point.trial != point.setting, point.seed))
    scores, densities = ([float(getattr(p, name)) for p in members] for name in ("score", "density"))
    return replace(
        members[0],
        score=statistics.fmean(scores),
        density=statistics.fmean(densities),
        score_drop=_mean_or_none([p.score_drop for p in members]),
        density_change=_mean_or_none([p.density_change for p in members]),
        seeds=len(members),
        score_std=statistics.stdev(scores),
        density_std=statistics.stdev(densities),
    )


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def chosen_taus(
    records: Sequence[Record], baselines: Sequence[Record | None], max_score_drop: float | None
) -> list[float]:
    """Choose the thresholds at which a setting stands beside itself, on the calibration split alone.

    Those that no other one of the setting, 0 among them, equals or beats in both score and density, and that lose no
    more than the limit against the baseline as it was trained; by means over the seeds.

    Args:
        records: The setting's records; those that are not complete say nothing.
        baselines: The baseline of each.
        max_score_drop: The score limit; None for none.

    Returns:
        τ above 0, rising.
    """
    curves: dict[float, list[tuple[float, float]]] = {}
    drops: dict[float, list[float]] = {}
    for record, baseline in zip(records, baselines, strict=True):
        before = None if baseline is None else baseline.dial.get(tau_key(0.0), {}).get("calibration_score")
        for tau, found in record.dial.items() if record.status == "complete" else ():
            score, density = found.get("calibration_score"), found.get("calibration_density")
            if score is None or density is None or not (is_finite(score) and is_finite(density)):
                continue
            curves.setdefault(float(tau), []).append((score, density))
            if before is not None:
                drops.setdefault(float(tau), []).append(before - score)
    if not curves:
        return []
    taus = sorted(curves)
    means = np.array([np.mean(curves[tau], axis=0) for tau in taus])
    keep = moocore.is_nondominated(means * [-1.0, 1.0], keep_weakly=False)
    within = [is_feasible(_mean_or_none(drops.get(tau, ())), max_score_drop) for tau in taus]
    return [tau for tau, kept, near in zip(taus, keep, within, strict=True) if tau > 0.0 and kept and near]


def of_first(points: Sequence[Point], trials: int) -> list[Point]:
    """Return the points of the first so many trials, in the order of the points."""
    names = list(dict.fromkeys((point.task, point.trial) for point in points))[:trials]
    kept = set(names)
    return [point for point in points if (point.task, point.trial) in kept]


def _peer_key(record: Record) -> tuple[str, int, str]:
    return record.task, record.seed, record.dtype


def _baselines(records: Iterable[Record]) -> dict[tuple[str, int, str], Record]:
    """The first usable baseline of each task, seed and dtype."""
    usable: dict[tuple[str, int, str], Record] = {}
    for record in records:
        measured = is_finite(record.score) and is_finite(record.density)
        if record.baseline and record.status == "complete" and measured:
            usable.setdefault(_peer_key(record), record)
    return usable


def _point(record: Record, tau: float, baseline: Record | None) -> Point:
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
        steps=record.steps,
        dtype=record.dtype,
        config=record.config,
        setting=record.setting,
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


def check_comparable(records: Iterable[Record]) -> None:
    """Refuse records of which one task was measured in several dtypes, or with several activation functions.

    Raises:
        RecordsError: With the task and what differs.
    """
    records = [record for record in records if record.density is not None]
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        for what, seen in (("dtype", {r.dtype for r in own}), ("activation", {r.activation for r in own} - {""})):
            if len(seen) > 1:
                raise RecordsError(
                    f"task {task}: measured in more than one {what} ({', '.join(sorted(seen))}); "
                    f"exact zeros depend on the {what}, so compare only records of one"
                )
