"""When a sweep has had enough: no new trial starts then, those that train go on to their end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from deft_ray.results.front import hypervolume
from deft_ray.results.points import compare, of_first
from deft_ray.results.records import Record
from deft_ray.spec.schema import SweepSpec


class Budget:
    """Judges a sweep by its ended trials and by the clock.

    Args:
        spec: The sweep's spec.
        began: When this run of the sweep began, unix seconds; a resumed sweep has its wall time anew.

    Attributes:
        gpus: GPUs of one host, once the cluster is known.
    """

    def __init__(self, spec: SweepSpec, began: float) -> None:
        self._spec, self._budget, self._began = spec, spec.budget, began
        self.gpus = 0

    def spent(self, records: Sequence[Record]) -> str | None:
        """Return what is spent, for the report; None while there is some left.

        Args:
            records: Ended trials, in the order in which they ended.
        """
        budget, hours = self._budget, (time.time() - self._began) / 3600
        if budget.wall_hours is not None and hours >= budget.wall_hours:
            return f"budget.wall_hours = {budget.wall_hours:g} is spent"
        gpu_hours = sum(record.wall_s for record in records) * self.gpus / 3600
        if budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours:
            return f"budget.gpu_hours = {budget.gpu_hours:g} is spent ({gpu_hours:.1f})"
        steps = sum(record.steps for record in records)
        if budget.steps is not None and steps >= budget.steps:
            return f"budget.steps = {budget.steps:,} is spent ({steps:,})"
        return None

    def stalled(self, records: Sequence[Record]) -> str | None:
        """Return that no front grows any longer, for the report; None while one does.

        Args:
            records: Ended trials, in the order in which they ended.
        """
        budget = self._budget
        if budget.stall_trials is None or not self._stalls(records, budget.stall_trials):
            return None
        return f"no hypervolume has grown by {budget.stall_growth:g} in the last {budget.stall_trials} trials"

    def _stalls(self, records: Sequence[Record], last: int) -> bool:
        """Whether no task's hypervolume has grown enough in its last so many sampled trials.

        A task whose baseline was lost has no more trials, and nothing to say.
        """
        lost = {record.task for record in records if record.baseline and record.status != "complete"}
        for task in set(self._spec.data.tasks) - lost:
            mine = [record for record in records if record.task == task]
            if len(mine) < sum(record.baseline for record in mine) + last:
                return False
            found = compare(mine, self._spec.constraint.max_score_drop)
            before = of_first(found, len(mine) - last)
            if hypervolume(found) - hypervolume(before) >= self._budget.stall_growth:
                return False
        return True
