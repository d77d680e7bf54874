"""Which trials are better than others, with two objectives and a score limit: an order, not a number.

Used by the rungs of successive halving, and by the sampler that learns from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def best_first(trials: Sequence[Judged]) -> Iterator[int]:
    """Yield the places of trials in ``trials``, best first.

    1. Feasible trials before those that miss the score limit, the latter by how much they miss it;
    2. feasible ones by non-dominated sorting: a front before the next;
    3. within a front by an ε-net: the best score first, then always the one that is farthest from all before it, with
       both objectives scaled to the range of the feasible ones.

    (Schmucker et al., arXiv:2106.12639.) Ties go to the earlier trial.
    """
    feasible = [index for index, trial in enumerate(trials) if trial.missed == 0.0]
    rest = sorted(set(range(len(trials))) - set(feasible), key=lambda index: (trials[index].missed, index))
    if not feasible:
        yield from rest
        return
    values = np.array([[-trials[index].score, trials[index].density] for index in feasible], dtype=np.float64)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    ranks = moocore.pareto_rank(values)
    for rank in np.unique(ranks):
        front = np.flatnonzero(ranks == rank)
        yield from (feasible[front[place]] for place in epsilon_net(scaled[front]))
    yield from rest


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
