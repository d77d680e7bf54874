"""A search that is killed at random moments decides as one that was not: what is asked, who is pruned, what is left."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from deft_ray.results.records import Record, RecordLog
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.rungs import JOURNAL, Rungs, build_rungs
from deft_ray.sweep.schedule import Schedule
from deft_ray.sweep.tuning import asha_lets_on
from deft_ray.train.course import rung_steps
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


def run(spec: SweepSpec, folder: Path, kills: Iterator[bool], closes: Iterator[bool]) -> list[Record]:
    """Run a search one trial at a time to its end; killed, it is followed by another in the same folder.

    Args:
        spec: The sweep.
        folder: Where it lies.
        kills: At each moment, whether the driver goes.
        closes: At each kill, whether it was one that the driver saw coming, as Ctrl-C is.
    """
    log = RecordLog(folder / "records.jsonl")

    def moment() -> None:
        if next(kills):
            raise KilledError

    def go_on(schedule: Schedule) -> None:
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
                moment()
                return replace(made_up(trial, score, density, "pruned"), score=score, density=density, steps=step)
            moment()
        return made_up(trial, *measure(trial, STEPS))

    while True:
        schedule = Schedule(spec, folder, log.read())
        try:
            go_on(schedule)
            return log.read()
        except KilledError:
            if next(closes):
                schedule.close()
                points = [point for name in left(folder)[1] for point in told(folder, name)]
                assert not any(point.state == TrialState.RUNNING for point in points)
            log = RecordLog(folder / "records.jsonl")


def left(folder: Path) -> list[Any]:
    """What lies on the disk: the rungs' journal, and each study but for its times."""
    rungs = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    names = sorted(file.stem for file in folder.glob("*.log"))
    return [rungs, names, [[(t.state, t.params, t.values, t.user_attrs) for t in told(folder, name)] for name in names]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sampler", ["mo_tpe", "tpe", "random"])
def test_with_several_trials_at_once_a_kill_repeats_no_rung_and_loses_none(
    tmp_path: Path, sampler: str, seed: int
) -> None:
    """Trials that were under way come back as they were asked for; each arrives once at each rung that it reaches."""
    spec, log, dice = (
        make_spec(sampler, scheduler="mo_asha"),
        RecordLog(tmp_path / "records.jsonl"),
        random.Random(seed),
    )
    asked: dict[str, str] = {}
    lives = 0
    while len(log.read()) < 2 + 24:
        lives += 1
        schedule = Schedule(spec, tmp_path, log.read())
        rungs = build_rungs(spec, tmp_path, asha_lets_on, schedule.baseline_score)
        assert rungs is not None
        under_way: list[tuple[TrialSpec, list[tuple[int, int]]]] = []
        while dice.random() > 0.15:  # else the driver is gone
            trial = schedule.next() if len(under_way) < 3 else None
            if isinstance(trial, TrialSpec):
                assert asked.setdefault(trial.trial, trial.model_dump_json()) == trial.model_dump_json()
                under_way.append((trial, list(rung_steps(STEPS, trial.rungs).items())))
            if not under_way:
                break
            mine, to_come = one = dice.choice(under_way)
            named = {"task": mine.task, "trial": mine.trial, "seed": mine.seed, "baseline": mine.baseline}
            step, rung = to_come.pop(0) if to_come else (STEPS, None)
            score, density = measure(mine, step)
            if rung is not None and rungs.arrive(**named, rung=rung, step=step, score=score, density=density):
                continue
            status = "complete" if rung is None else "pruned"
            log.append(replace(made_up(mine, score, density, status), score=score, density=density, steps=step))
            schedule.ended(log.read()[-1])
            under_way.remove(one)

    records = log.read()
    assert lives > 1
    assert sorted(record.trial for record in records) == sorted(asked) == sorted({record.trial for record in records})
    arrived = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    each = [(row["trial"], row["rung"]) for row in arrived]
    assert len(each) == len(set(each))
    stopped = {row["trial"]: row["rung"] for row in arrived if not row["goes_on"]}
    for record in records:
        last = stopped.get(record.trial, 1)
        assert [rung for trial, rung in each if trial == record.trial] == list(range(last + 1))
        assert (record.status == "pruned") == (record.trial in stopped)
    assert all(point.state.is_finished() for name in TASKS for point in told(tmp_path, name))


@pytest.mark.parametrize(
    ("sampler", "scope", "scheduler"),
    [
        *((sampler, "per-task", "mo_asha") for sampler in ("mo_tpe", "tpe", "nsga2", "gp", "random", "grid")),
        ("mo_tpe", "shared", "mo_asha"),
        ("mo_tpe", "per-task", "asha"),
    ],
)
def test_a_search_killed_at_random_moments_decides_as_one_that_was_not(
    tmp_path: Path, sampler: str, scope: str, scheduler: str
) -> None:
    spec = make_spec(sampler, scheduler=scheduler, scope=scope)
    whole = run(spec, tmp_path / "whole", repeat(False), repeat(False))
    assert {record.status for record in whole} == {"complete", "pruned"}
    points = [point for name in left(tmp_path / "whole")[1] for point in told(tmp_path / "whole", name)]
    assert all(point.state.is_finished() for point in points), "none stays running"
    assert any("pruned_at" in point.user_attrs for point in points), "what a point was stopped at is told"
    for seed in range(2 if sampler == "gp" else 5):
        dice, folder = random.Random(seed), tmp_path / f"killed{seed}"
        closes = cycle((False, True))
        killed = run(spec, folder, iter(lambda dice=dice: dice.random() < 0.15, None), closes)
        assert [asdict(record) for record in killed] == [asdict(record) for record in whole]
        assert left(folder) == left(tmp_path / "whole")
