r"""Paired tests: how far one trained model's score lies below another's, were the validation set drawn again.

Both models answered the same examples, so each resample of the examples gives both of them a score, and the examples'
own difficulty falls out of the difference (Efron and Tibshirani, 1993; Koehn, 2004). With the differences
:math:`\Delta_b` of the resamples,

.. math:: p = \frac{1}{B} \left|\{ b : \Delta_b > d \}\right|

is the one-sided level at which "worse by more than d" is refused: a small p shows that the score is *not* worse by more
than d. With several seeds each is compared with its own partner on the same resample, and the mean counts. It is about
these trained models: the scatter of a setting over further seeds is told by its standard deviation, not here.

Who stands on a front was chosen by the same examples, out of many: its interval is of one that won, and leans to its
favour. What is to be trusted beyond that takes seeds or examples that had no say in the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, rankdata

from deft_ray.errors import RecordsError
from deft_ray.metrics import tau_key
from deft_ray.results.across import ALL_TASKS
from deft_ray.results.points import Point, is_feasible
from deft_ray.results.predictions import LABEL, read_predictions
from deft_ray.results.records import Record

_log = logging.getLogger(__name__)

_RESAMPLES = 2000
#: Numbers that a batch of resamples may hold.
_BATCH_NUMBERS = 4_000_000

#: Predictions of one model by column; see :data:`deft_ray.results.predictions.Predictions`.
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Paired:
    """How far a score lies below another.

    Args:
        drop: The other's score less this one's, as measured.
        low: Lower end of the 95 % interval over resamples.
        high: Its upper end.
        drops: The drop in each resample, (B,).
    """

    drop: float
    low: float
    high: float
    drops: np.ndarray

    def chance_worse(self, limit: float) -> float:
        """Share of the resamples in which the score is worse by more than ``limit``."""
        return float(np.mean([not is_feasible(float(drop), limit) for drop in self.drops]))


def paired_drop(metric: str, pairs: Sequence[tuple[Columns, float, Columns, float]]) -> Paired | None:
    """Compare trained models with their partners on the same examples.

    Args:
        metric: ``accuracy``, ``f1``, ``matthews``, ``pearson`` or ``spearman``; without labels the mean over examples.
        pairs: For each seed the predictions and the threshold of one model, then those of its partner.

    Returns:
        None where a model's predictions were not kept, are of other examples than its partner's, or of fewer than two.

    Raises:
        ValueError: If there are labels, and the metric is none of these.
    """
    columns = [(_column(mine, tau), _column(other, at)) for mine, tau, other, at in pairs]
    labels = [(mine.get(LABEL), other.get(LABEL)) for mine, _, other, _ in pairs]
    sizes = {len(column) for pair in columns for column in pair}
    if not pairs or len(sizes) != 1 or min(sizes) < 2 or not all(_is_same(*pair) for pair in labels):
        return None
    size = sizes.pop()

    def drop(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        found = [
            _score(metric, other[rows], true, axis) - _score(metric, mine[rows], true, axis)
            for (mine, other), (label, _) in zip(columns, labels, strict=True)
            for true in [None if label is None else label[rows]]
        ]
        return np.mean(found, axis=0)

    every = np.arange(size)
    found = bootstrap(
        (every,),
        drop,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_NUMBERS // size),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Paired(float(drop(every)), float(low), float(high), found.bootstrap_distribution)


def with_paired_tests(points: Iterable[Point], records: Iterable[Record], run_dir: Path, limit: float) -> list[Point]:
    """Say of each point on a front how far its score lies below its baseline's, were the validation set drawn again.

    Args:
        points: Points of one sweep.
        records: Its records.
        run_dir: Where the predictions were kept; points without stay as they are.
        limit: Drop d about which is asked; 0 where there is no score limit.
    """
    points, records = list(points), list(records)
    kept = lru_cache(maxsize=None)(partial(_kept, run_dir))
    baselines = {(record.task, record.seed): record for record in reversed(records) if record.baseline}
    metrics = {record.task: record.score_metric for record in records}
    members: dict[tuple[str, str, float], list[Point]] = {}
    for point in points:
        if point.on_front and not point.reference and point.task != ALL_TASKS:  # a mean over tasks has no examples
            members.setdefault(point.key, []).append(point)
    tested = {}
    for key, mine in members.items():
        partners = [baselines.get((point.task, point.seed)) for point in mine]
        if all(partner is not None for partner in partners):
            pairs = [
                (kept(point.trial), point.tau, kept(partner.trial), 0.0)
                for point, partner in zip(mine, partners, strict=True)
                if partner is not None
            ]
            tested[key] = paired_drop(metrics[key[0]], pairs)
    return [_with(point, tested.get(point.key), limit) for point in points]


def _kept(run_dir: Path, trial: str) -> Columns:
    try:
        return read_predictions(run_dir, trial)
    except RecordsError as error:
        _log.warning("no paired test of %s: %s", trial, error)
        return {}


def _with(point: Point, paired: Paired | None, limit: float) -> Point:
    if paired is None:
        return point
    return replace(point, drop_low=paired.low, drop_high=paired.high, p_worse=paired.chance_worse(limit))


def _column(columns: Columns, tau: float) -> np.ndarray:
    return np.asarray(columns.get(tau_key(tau), ()))


def _is_same(mine: np.ndarray | None, other: np.ndarray | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return np.array_equal(mine, other)


def _score(metric: str, said: np.ndarray, true: np.ndarray | None, axis: int) -> np.ndarray:
    if true is None:
        return np.mean(said, axis=axis)
    if metric not in _SCORES:
        raise ValueError(f"no paired test for {metric!r}; there is one for {', '.join(_SCORES)}")
    return _SCORES[metric](said, true, axis)


def _accuracy(said: np.ndarray, true: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(said == true, axis=axis)


def _f1(said: np.ndarray, true: np.ndarray, axis: int) -> np.ndarray:
    both = np.sum((said == 1) & (true == 1), axis=axis)
    return _ratio(2 * both, np.sum(said == 1, axis=axis) + np.sum(true == 1, axis=axis))


def _correlation(said: np.ndarray, true: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's, and of two classes Matthews', which is the same; 0 where one side is constant."""
    said, true = said - said.mean(axis=axis, keepdims=True), true - true.mean(axis=axis, keepdims=True)
    return _ratio(np.sum(said * true, axis=axis), np.sqrt(np.sum(said**2, axis=axis) * np.sum(true**2, axis=axis)))


def _rank_correlation(said: np.ndarray, true: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's: Pearson's of the ranks, equal ones shared."""
    return _correlation(rankdata(said, axis=axis), rankdata(true, axis=axis), axis)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    below = np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


_SCORES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _correlation,
    "pearson": _correlation,
    "spearman": _rank_correlation,
}
