r"""Which points are worth keeping: Pareto dominance, hypervolume, and what users ask of a front first.

Two objectives: score (more is better) and density (less is better). With P the settings of one task,

.. math:: a \prec b \iff s_a \ge s_b,\ d_a \le d_b,\ (s_a, d_a) \ne (s_b, d_b)

the front is the settings of P that none of P dominates. Two with the same score and the same density do not dominate
each other: both are kept, because they are two between which a user may choose. A setting that was trained with several
seeds stands at their means.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from deft_ray.results.files import write_text
from deft_ray.results.points import Point, compare, is_feasible, merge, of_first
from deft_ray.results.records import Record

CSV_COLUMNS = (
    "task", "trial", "seed", "score", "density", "score_drop", "density_change", "tau", "seeds", "score_std",
    "density_std", "front_probability", "drop_low", "drop_high", "p_worse", "baseline", "steps", "dtype",
)  # fmt: skip
"""Columns that every table of points starts with; the settings that vary follow under their dotted names."""

REFERENCE = (0.0, 1.0)
"""Score and density of the hypervolume's reference point where a spec gives none."""

_LEAST = 1e-9
"""What is less is rounding: of a knee's bend, of a reference point's place."""


def points(records: Iterable[Record], max_score_drop: float | None = None) -> list[Point]:
    """Compare every record with its baseline, and say of each point whether its setting stands on the front.

    Arguments, order and errors as of :func:`~deft_ray.results.points.compare`.
    """
    return mark(compare(records, max_score_drop), max_score_drop)


def mark(points: Iterable[Point], max_score_drop: float | None = None) -> list[Point]:
    """Say of each point, of any number of tasks, whether its setting stands on the front of its task."""
    points = list(points)
    chosen, likely = set[tuple[str, str, float]](), dict[tuple[str, str, float], float]()
    for task in _tasks(points):
        mine = [point for point in points if point.task == task]
        chosen |= {member.key for member in front(mine)}
        likely |= front_probability(mine, max_score_drop)
    return [
        replace(p, on_front=p.eligible and p.key in chosen, front_probability=likely.get(p.key) if p.eligible else None)
        for p in points
    ]


def front_probability(
    points: Iterable[Point], max_score_drop: float | None = None, draws: int = 500
) -> dict[tuple[str, str, float], float]:
    """Estimate how likely each eligible setting of one task stands on the front.

    Score and density of a setting with n seeds are taken to lie about their means with s / √n, where s is the standard
    deviation over seeds, pooled over all settings that have several: one seed alone says nothing of its scatter. With a
    limit a setting has to keep it in each draw, too: its drop, each seed against its own baseline, scatters likewise.

    Args:
        points: Points of one task.
        max_score_drop: The score limit, or None.
        draws: Samples of the whole task; the same ones every time.

    Returns:
        Probability by the points' ``key``; nothing where no setting has several seeds.
    """
    points = list(points)
    eligible = _eligible(points)
    several = [point for point in eligible if point.seeds > 1]
    if not several:
        return {}
    freedom = np.array([point.seeds - 1 for point in several], dtype=np.float64)
    variances = np.array([[point.score_std or 0.0, point.density_std or 0.0] for point in several]) ** 2
    pooled = np.sqrt(freedom @ variances / freedom.sum())
    spread = pooled / np.sqrt([[point.seeds] for point in eligible])
    means, dice = _objectives(eligible), np.random.default_rng(0)
    hits = np.zeros(len(eligible))
    drops = np.array([0.0 if p.reference else p.score_drop or 0.0 for p in eligible])
    drop_spread = _spread_of_drops(points) / np.sqrt([point.seeds for point in eligible])
    drop_spread[[point.reference for point in eligible]] = 0.0
    most = math.inf if max_score_drop is None else max_score_drop + _LEAST
    for _ in range(draws):
        noise = dice.standard_normal(means.shape)
        drawn = means + spread * noise
        kept = np.flatnonzero(drops + drop_spread * noise[:, 0] <= most)  # a worse score is a larger drop
        hits[kept] += moocore.is_nondominated(drawn[kept], keep_weakly=True)
    return {point.key: float(count) / draws for point, count in zip(eligible, hits, strict=True)}


def _spread_of_drops(points: Iterable[Point]) -> float:
    """Standard deviation of score drops over the seeds of a setting, pooled; 0 where no setting has several."""
    drops = defaultdict[tuple[str, str, float], list[float]](list)
    for point in points:
        if point.eligible and not point.reference and point.score_drop is not None:
            drops[point.key].append(point.score_drop)
    several = [found for found in drops.values() if len(found) > 1]
    freedom = sum(len(found) - 1 for found in several)
    squares = sum((len(found) - 1) * np.var(found, ddof=1) for found in several)
    return math.sqrt(squares / freedom) if several else 0.0


def front(points: Iterable[Point]) -> list[Point]:
    """The eligible settings of one task that no other dominates, by rising density, then trial.

    Settings with equal score and equal density are all kept.

    Args:
        points: Points of one task; those of several seeds are merged, and those that are infeasible, not complete or
            not finite are left out.

    Raises:
        ValueError: If the points belong to more than one task.
    """
    eligible = _eligible(points)
    if not eligible:
        return []
    keep = moocore.is_nondominated(_objectives(eligible), keep_weakly=True)
    chosen = [replace(point, on_front=True) for point, kept in zip(eligible, keep, strict=True) if kept]
    return sorted(chosen, key=lambda p: (p.density, p.trial, p.tau))


def hypervolume(points: Iterable[Point], ref: tuple[float, float] = REFERENCE) -> float:
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


def misplaced_reference(
    points: Iterable[Point], max_score_drop: float | None, ref: tuple[float, float] = REFERENCE
) -> list[str]:
    """Say where a reference point lies inside the front: what is admissible there would add nothing to a hypervolume.

    Of the default one nothing is asked, in the score nor in the density.

    Args:
        points: Points of any number of tasks; the baselines among them, as they were trained, are looked at.
        max_score_drop: Score limit, or None.
        ref: Score and density of the reference point.

    Returns:
        What is wrong, by leaf of the spec; empty where the baselines are better in both.
    """
    faults = []
    for point in merge(p for p in points if p.reference):
        least = (point.score or 0.0) - (max_score_drop or 0.0)
        if ref[0] != REFERENCE[0] and ref[0] > least + _LEAST:
            less = f" less constraint.max_score_drop = {max_score_drop:g}" if max_score_drop else ""
            what = f"the baseline of {point.task} scores {point.score:.4g}{less}"
            most = math.floor(1e4 * (least + _LEAST)) / 1e4
            faults.append(f"reference.score: lies inside the front: {what} (got {ref[0]:g}); at most {most:g}")
        if ref[1] != REFERENCE[1] and ref[1] < (point.density or 0.0) - _LEAST:
            what = f"the baseline of {point.task} has a density of {point.density:.4g} (got {ref[1]:g})"
            enough = math.ceil(1e4 * ((point.density or 0.0) - _LEAST)) / 1e4
            faults.append(f"reference.density: lies inside the front: {what}; at least {enough:g}, at most 1")
    return faults


def hypervolume_history(
    records: Iterable[Record], task: str, max_score_drop: float | None = None, ref: tuple[float, float] = REFERENCE
) -> list[float]:
    """Hypervolume of one task after each of its ended trials, in record order.

    With one seed it never falls; a further seed may lower the means of a setting.

    Feasibility is judged by all records, so a trial that ended before its baseline counts from its own end on.
    """
    found = [point for point in points(records, max_score_drop) if point.task == task]
    trials = len({point.trial for point in found})
    return [hypervolume(of_first(found, ended), ref) for ended in range(1, trials + 1)]


def attainment(points: Iterable[Point]) -> dict[int, list[tuple[float, float]]]:
    """What at least so many seeds attain: the empirical attainment function (Grunert da Fonseca et al., 2001).

    A seed attains a score at a density if one of its own points is as good in both. Only settings that were trained
    with every seed of the task count, so that no seed has more points than another.

    Args:
        points: Points of one task.

    Returns:
        By number of seeds, from one to all: (density, score), by rising density, between which nothing better is
        attained by so many. Empty where fewer than two seeds have points, or no setting has them all.
    """
    eligible = [point for point in points if point.eligible]
    _check_one_task(eligible)
    seeds = sorted({point.seed for point in eligible})
    trained: dict[tuple[str, str, float], set[int]] = {}
    for point in eligible:
        trained.setdefault(point.key, set()).add(point.seed)
    mine = [point for point in eligible if len(trained[point.key]) == len(seeds)]
    mine.sort(key=lambda point: point.seed)  # moocore takes a set's rows for one set only where they follow each other
    if len(seeds) < 2 or not mine:
        return {}
    found = moocore.eaf(_objectives(mine), [seeds.index(point.seed) for point in mine])
    attained: dict[int, list[tuple[float, float]]] = {count: [] for count in range(1, len(seeds) + 1)}
    for loss, density, percentile in found:
        attained[round(percentile * len(seeds) / 100)].append((float(density), -float(loss)))
    return {count: sorted(corners) for count, corners in attained.items()}


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
    return chosen[best] if gains[best] > _LEAST else None


def varying(points: Iterable[Point]) -> list[str]:
    """Names of the settings that are not the same in all points; those of the method (``deft.``) first, then by name.

    ``seed`` and ``task`` are left out: every table has them anyway.
    """
    configs = [point.config for point in points]
    names = {name for config in configs for name in config if not name.startswith("dial.")} - set(CSV_COLUMNS)
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


def _tasks(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point.task for point in points))


def _check_one_task(points: Sequence[Point]) -> None:
    tasks = _tasks(points)
    if len(tasks) > 1:
        raise ValueError(f"a front belongs to one task (got {', '.join(tasks)})")


def _eligible(points: Iterable[Point]) -> list[Point]:
    points = list(points)
    _check_one_task(points)
    return merge(point for point in points if point.eligible)


def _objectives(points: Sequence[Point]) -> np.ndarray:
    """(n, 2) float64, both to be minimised: minus score, density."""
    return np.array([[-(p.score or 0.0), p.density or 0.0] for p in points], dtype=np.float64)
