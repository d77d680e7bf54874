"""Two sweeps beside each other: what one found with its steps, and what the other did with its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deft_ray.errors import RecordsError
from deft_ray.results.front import REFERENCE, hypervolume, lowest_density, points
from deft_ray.results.points import Point, check_comparable
from deft_ray.results.records import Record


@dataclass(frozen=True)
class Found:
    """What a sweep found for one task.

    Args:
        trials: Its trials.
        steps: Training steps of them all.
        hypervolume: Of its front.
        lowest: Its point of the lowest density within the score limit; None without one.
    """

    trials: int
    steps: int
    hypervolume: float
    lowest: Point | None


def compare_sweeps(
    mine: Sequence[Record],
    others: Sequence[Record],
    max_score_drop: float | None,
    ref: tuple[float, float] = REFERENCE,
) -> dict[str, tuple[Found, Found]]:
    """Say what two sweeps found for the tasks that both have, by the same limit and the same reference point.

    Args:
        mine: Records of one sweep.
        others: Records of the other.
        max_score_drop: Score limit, or None.
        ref: Reference point of the hypervolume, score and density.

    Returns:
        By task what the one found, and the other.

    Raises:
        RecordsError: If they have no task in common, or one was measured in several dtypes or with several
            activations.
    """
    tasks = [task for task in _tasks(mine) if task in _tasks(others)]
    if not tasks:
        raise RecordsError(f"no task in common: {', '.join(_tasks(mine))} here, {', '.join(_tasks(others))} there")
    check_comparable(record for record in (*mine, *others) if record.task in tasks)
    return {
        task: (_found(mine, task, max_score_drop, ref), _found(others, task, max_score_drop, ref)) for task in tasks
    }


def _tasks(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.task for record in records))


def _found(records: Iterable[Record], task: str, max_score_drop: float | None, ref: tuple[float, float]) -> Found:
    own = [record for record in records if record.task == task]
    found = points(own, max_score_drop)
    steps = sum(record.steps for record in own)
    return Found(len(own), steps, hypervolume(found, ref), lowest_density(found, max_score_drop or 0.0))
