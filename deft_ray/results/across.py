"""A sweep of one configuration for all tasks: its settings as records of one more task, the mean of the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from deft_ray.results.records import Record, lost_tasks

#: Stands for all tasks of a sweep together.
ALL_TASKS = "all-tasks"


def across_tasks(records: Iterable[Record], tasks: Sequence[str]) -> list[Record]:
    """Return one record for each setting and seed that is complete on all tasks: mean score and mean density.

    A task that has lost a baseline does not count; before all baselines have ended there are none.

    The mean score less that of the baselines is the mean score change, so fronts and score limits of these records are
    those of mean score change and mean density.

    Args:
        records: Records of one sweep whose trials of one point have one ``setting``.
        tasks: The sweep's tasks.
    """
    records = list(records)
    ended = {record.task for record in records if record.baseline}
    usable = ended - lost_tasks(records)
    if ended != set(tasks):
        return []
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if record.task in usable:
            groups.setdefault((record.setting or record.trial, record.seed), []).append(record)
    return [
        _mean(setting, members)
        for (setting, _), members in groups.items()
        if {record.task for record in members} == usable and all(record.status == "complete" for record in members)
    ]


def _mean(setting: str, members: Sequence[Record]) -> Record:
    first = members[0]
    taus = [tau for tau in first.dial if all(tau in record.dial for record in members)]
    return Record(
        trial=first.trial,
        task=ALL_TASKS,
        seed=first.seed,
        baseline=first.baseline,
        setting=setting,
        status="complete",
        score_metric="mean score",
        score=_mean_of([record.score for record in members]),
        density=_mean_of([record.density for record in members]),
        dial={tau: _mean_dial(tau, members) for tau in taus},
        dtype=first.dtype,
        activation=first.activation,
        config=first.config,
        steps=sum(record.steps for record in members),
        wall_s=math.nan,
        ended_at=max(record.ended_at for record in members),
    )


def _mean_dial(tau: str, members: Sequence[Record]) -> dict[str, float]:
    found = {key: _mean_of([record.dial[tau].get(key) for record in members]) for key in members[0].dial[tau]}
    return {key: value for key, value in found.items() if value is not None}


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
