"""Which trials are better than others, with two objectives and a score limit: an order, not a number.

Used by the rungs of successive halving, and by the sampler that learns from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import moocore
import numpy as np

#: Distances that differ by less are one: roundings decide about no trial.
_TIE = 1e-12


class Judged(Protocol):
    """A trial with what it is judged by."""

    @property
    def score(self) -> float:
        """Task score, up."""

    @property
    def density(self) -> float:
        """Density, down."""

    @property
    def missed(self) -> float:
        """By how much it misses the score limit; 0 where it does not."""


def best(trials: Sequence[Judged], count: int) -> list[int]:
    """Return the places in ``trials`` of the best ``count``, all of them if they are fewer.

    They are taken in this order:

    1. feasible trials before those that miss the score limit, the latter by how much they miss it;
    2. feasible ones by non-dominated sorting: a front before the next;
    3. of the front that there is not room for, an ε-net: the best score first, then always the one that is farthest
       from all before it, with both objectives scaled to the range of the feasible ones.

    (Schmucker et al., arXiv:2106.12639.) Ties go to the earlier trial.
    """
    feasible = [index for index, trial in enumerate(trials) if trial.missed == 0.0]
    rest = sorted(set(range(len(trials))) - set(feasible), key=lambda index: (trials[index].missed, index))
    chosen = _best_feasible(trials, feasible, count)
    return chosen + rest[: count - len(chosen)]


def _best_feasible(trials: Sequence[Judged], feasible: Sequence[int], count: int) -> list[int]:
    chosen: list[int] = []
    if not feasible:
        return chosen
    values = np.array([[-trials[index].score, trials[index].density] for index in feasible], dtype=np.float64)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    ranks = moocore.pareto_rank(values)
    for rank in np.unique(ranks):
        front, room = np.flatnonzero(ranks == rank), count - len(chosen)
        spread = range(len(front)) if len(front) <= room else islice(epsilon_net(scaled[front]), room)
        chosen += (feasible[front[place]] for place in spread)
    return chosen


def epsilon_net(points: np.ndarray) -> Iterator[int]:
    """Yield points so that every first few of them are spread: the first objective's best, then always the farthest.

    Args:
        points: (n, 2), each column to be minimised, scaled alike. Ties go to the earlier point.
    """
    following = int(np.lexsort((points[:, 1], points[:, 0]))[0])
    nearest = np.full(len(points), np.inf)
    for _ in range(len(points)):
        yield following
        nearest = np.minimum(nearest, np.hypot(*(points - points[following]).T))
        nearest[following] = -np.inf
        following = int(np.argmax(nearest >= nearest.max() - _TIE))
