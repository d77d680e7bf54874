"""A search that is killed at random moments decides as one that was not: what is asked, who is pruned, what is left."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deft_ray.results.records import Record, RecordLog
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.rungs import JOURNAL, Rungs, build_rungs
from deft_ray.sweep.schedule import Schedule
from deft_ray.sweep.tuning import asha_lets_on
from deft_ray.train.host import rung_steps
from tests.searches import made_up, told

TASKS, STEPS = ["nano-sentiment", "nano-entailment"], 81


class KilledError(Exception):
    """The driver is gone, with all that it held in memory."""


def make_spec(sampler: str, **search: Any) -> SweepSpec:
    epsilon = {"choice": [1e-7, 1e-5, 1e-3]}
    spec, faults = check_tree(
        {
            "name": "s",
            "data": {"tasks": TASKS},
            "deft": {"alpha": {"choice": [0.1, 0.5, 1.0, 3.0]} if sampler == "grid" else {"loguniform": [0.1, 10.0]}}
            | {"epsilon": epsilon},
            "train": {"steps": STEPS},
            "search": {
                "sampler": sampler,
                **({} if sampler == "grid" else {"trials": 12, "startup_trials": 4}),
                **search,
            },
            "constraint": {"max_score_drop": 0.05},
        }
    )
    assert spec is not None, faults
    return spec


def measure(trial: TrialSpec, step: int) -> tuple[float, float]:
    """Made-up score and density after so many steps; noise of the trial's own."""
    done, weight = step / STEPS, 0.0 if trial.baseline else min(1.0, trial.deft.alpha / 10)
    noise = random.Random(f"{trial.trial} {step}").gauss(0.0, 0.01)
    return (0.5 + 0.4 * done - 0.3 * weight**2 + noise, 1.0 - done * (0.8 * weight + 0.1))


def run(spec: SweepSpec, folder: Path, kills: Iterator[bool]) -> list[Record]:
    """Run a search one trial at a time to its end; killed, it is followed by another in the same folder."""
    log = RecordLog(folder / "records.jsonl")

    def moment() -> None:
        if next(kills):
            raise KilledError

    def go_on() -> None:
        schedule = Schedule(spec, folder, log.read())
        rungs = build_rungs(spec, folder, asha_lets_on, schedule.baseline_score)
        while isinstance(trial := schedule.next(), TrialSpec):
            moment()
            record = train(trial, rungs)
            log.append(record)
            moment()
            schedule.ended(record)
            moment()

    def train(trial: TrialSpec, rungs: Rungs | None) -> Record:
        named = {"task": trial.task, "trial": trial.trial, "seed": trial.seed, "baseline": trial.baseline}
        for step, rung in rung_steps(STEPS, trial.rungs).items():
            moment()
            score, density = measure(trial, step)
            assert rungs is not None
            if not rungs.arrive(**named, rung=rung, step=step, score=score, density=density):
                return made_up(trial, score, density, "pruned")
            moment()
        return made_up(trial, *measure(trial, STEPS))

    while True:
        try:
            go_on()
            return log.read()
        except KilledError:
            log = RecordLog(folder / "records.jsonl")


def left(folder: Path) -> list[Any]:
    """What lies on the disk: the rungs' journal, and each study but for its times."""
    rungs = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    names = sorted(file.stem for file in folder.glob("*.log"))
    return [rungs, names, [[(t.state, t.params, t.values, t.user_attrs) for t in told(folder, name)] for name in names]]


@pytest.mark.parametrize(
    ("sampler", "scope"),
    [*((sampler, "per-task") for sampler in ("mo_tpe", "tpe", "nsga2", "gp", "random", "grid")), ("mo_tpe", "shared")],
)
def test_a_search_killed_at_random_moments_decides_as_one_that_was_not(
    tmp_path: Path, sampler: str, scope: str
) -> None:
    spec = make_spec(sampler, scheduler="mo_asha", scope=scope)
    whole = run(spec, tmp_path / "whole", iter(lambda: False, None))
    assert {record.status for record in whole} == {"complete", "pruned"}
    for seed in range(2 if sampler == "gp" else 5):
        dice, folder = random.Random(seed), tmp_path / f"killed{seed}"
        killed = run(spec, folder, iter(lambda dice=dice: dice.random() < 0.15, None))
        assert [asdict(record) for record in killed] == [asdict(record) for record in whole]
        assert left(folder) == left(tmp_path / "whole")
