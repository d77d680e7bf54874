"""Front seeds: further seeds for the settings that stand on a front, so that nobody is on it by luck.

They are due once all points have ended, and again for whoever stands on the front when the means have moved it. A
baseline gets every seed first that another setting is due: each seed is compared with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deft_ray.results.front import front
from deft_ray.results.points import compare
from deft_ray.results.records import FRONT_SEED, Record
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.searcher import changes


@dataclass(frozen=True)
class FrontTrial:
    """A setting of the front with one more seed.

    Args:
        task: Its task.
        setting: Trial of the same settings with the first seed.
        place: Which seed it is; 0 is the first.
        baseline: Whether the setting is the task's baseline.
    """

    task: str
    setting: str
    place: int
    baseline: bool

    @property
    def trial(self) -> str:
        """Its id: ``t0007-s2`` is the third seed of ``t0007``."""
        return f"{self.setting}{FRONT_SEED}{self.place}"


def front_trials(spec: SweepSpec, ended: Mapping[str, Record], baselines: Mapping[str, str]) -> list[FrontTrial]:
    """Return the front seeds that are due, whether they have ended or not, a seed's baseline before the others.

    Args:
        spec: The sweep's spec.
        ended: Records of all ended trials by id.
        baselines: Id of the baseline of each task that has one.
    """
    count = spec.search.front_seeds or 1
    found: list[FrontTrial] = []
    compared = compare(ended.values(), spec.constraint.max_score_drop)
    for task, baseline in baselines.items():
        standing = dict.fromkeys(point.key[1] for point in front(point for point in compared if point.task == task))
        others = [setting for setting in standing if setting != baseline]
        for place in range(1, count) if others else ():
            first = FrontTrial(task, baseline, place, baseline=True)
            found.append(first)
            before = ended.get(first.trial)
            if before is None or changes([before], [before]) is not None:  # else nothing can be compared with it
                found += [FrontTrial(task, setting, place, baseline=False) for setting in others]
    return found
