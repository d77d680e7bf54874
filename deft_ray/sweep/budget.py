"""When a sweep has had enough: no new trial starts then, those that train go on to their end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from deft_ray.results.across import across_tasks
from deft_ray.results.front import hypervolume
from deft_ray.results.points import compare
from deft_ray.results.records import Record, lost_tasks
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
        self._judged = -1, False

    def spent(self, records: Sequence[Record]) -> str | None:
        """Return what is spent, for the report; None while there is some left.

        Args:
            records: Ended trials, in the order in which they ended.
        """
        budget, hours = self._budget, (time.time() - self._began) / 3600
        if budget.wall_hours is not None and hours >= budget.wall_hours:
            return f"budget.wall_hours = {budget.wall_hours:g} is spent"
        busy_s = sum(sum(record.times.values()) or record.wall_s for record in records)
        gpu_hours = busy_s * self.gpus / 3600
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
        if budget.stall_trials is None:
            return None
        if self._judged[0] != len(records):
            self._judged = len(records), self._stalls(records, budget.stall_trials)
        if not self._judged[1]:
            return None
        return f"no hypervolume has grown by {budget.stall_growth:g} in the last {budget.stall_trials} trials"

    def _stalls(self, records: Sequence[Record], last: int) -> bool:
        """Whether no front's hypervolume has grown enough by its last so many points.

        A point counts once all its trials have ended, front seeds aside. A task that has lost a baseline has no more
        points, and nothing to say. Where a point is for all tasks, the front is that of all of them together.
        """
        records = [record for record in records if not record.is_front_seed]
        tasks, shared = set(self._spec.data.tasks) - lost_tasks(records), self._spec.search.scope == "shared"
        if not tasks:
            return False
        for members in [tasks] if shared else [{task} for task in tasks]:
            mine = [record for record in records if record.task in members]
            ends: dict[str, list[int]] = {}
            for place, record in enumerate(mine):
                if not record.baseline:
                    ends.setdefault(record.setting or record.trial, []).append(place)
            trials = len(self._spec.search.seeds) * len(members)
            whole = [name for name, places in ends.items() if len(places) == trials]
            late = sorted(whole, key=lambda name: ends[name][-1])[-last:]
            if len(whole) < last:
                return False
            judged = across_tasks(records, self._spec.data.tasks) if shared else mine
            found = compare(judged, self._spec.constraint.max_score_drop)
            known = [point for point in found if point.baseline or point.key[1] in whole]
            before = [point for point in known if point.baseline or point.key[1] not in late]
            ref = self._spec.reference.point
            if hypervolume(known, ref) - hypervolume(before, ref) >= self._budget.stall_growth:
                return False
        return True
