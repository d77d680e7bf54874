"""Several trials at once on one host, through the real command: the records of one after the other, killed or not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from tests.integration.sweeps import PATIENCE_S, ROOT, command, environment, records, start, sweep, wait_until
from tests.slots import learnt_apart
from tests.tiny import write_glue, write_tiny_t5

SPEC = """
name: slots
model: {{name: {model}, family: t5}}
data: {{dir: {data}, tasks: [sst2, rte], max_source_tokens: 48}}
deft: {{alpha: {{loguniform: [0.1, 3]}}, epsilon: {{loguniform: [1e-3, 1]}}}}
train: {{steps: 60, batch_size: 8, learning_rate: 1e-3, evaluations: 2, checkpoint_every_s: 0.5}}
search:
  trials: 4
  try_first:
    - {{deft.alpha: 0.3, deft.epsilon: 1e-2}}
    - {{deft.alpha: 1, deft.epsilon: 1e-2}}
    - {{deft.alpha: 2, deft.epsilon: 1e-1}}
    - {{deft.alpha: 3, deft.epsilon: 1}}
"""
SLOTS = "resources.slots_per_host=3"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slots")
    model = write_tiny_t5(folder / "model", dropout=0.0)
    data = write_glue(folder / "data", ("sst2", "rte"))
    file = folder / "spec.yaml"
    file.write_text(SPEC.format(model=model, data=data))
    return file


@pytest.fixture(scope="module")
def undisturbed(spec: Path) -> dict[str, dict[str, Any]]:
    """Records of one host with one slot."""
    done = sweep(spec, spec.parent / "alone")
    assert done.returncode == 0, done.stdout + done.stderr
    return by_trial(spec.parent / "alone")


def by_trial(output: Path) -> dict[str, dict[str, Any]]:
    found = records(output)
    assert len({record["trial"] for record in found}) == len(found)
    return {record["trial"]: record for record in found}


def check_records(got: dict[str, dict[str, Any]], want: dict[str, dict[str, Any]]) -> None:
    assert got.keys() == want.keys()
    for trial, record in want.items():
        assert (got[trial]["status"], got[trial]["steps"]) == ("complete", 60)
        check_same(got[trial], record)


#: Fields of a record that tell when, where and beside whom it was trained.
CIRCUMSTANCES = {"trial", "setting", "adapter", "host", "started_at", "ended_at", "wall_s", "times", "packing"}
CIRCUMSTANCES |= {"peak_memory_gib", "host_memory_gib"}
#: How far the others may lie apart, where they are numbers: a neuron or a count near a threshold falls to either side.
APART = {"density_feature_map": 1e-2, "density_at_tau": 1e-3, "density_layers": 1e-3}


def check_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Record, curve and adapter of a trial: float32 rounds otherwise in a pass of several slots.

    By 1e-7 here, and 1e-5 of what has been learnt, as AdamW makes whole steps of any rounding.
    """
    assert got.keys() == want.keys()
    for name in want.keys() - CIRCUMSTANCES:
        if isinstance(want[name], float | dict) and name not in ("config", "versions", "score"):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=APART.get(name, 1e-9)), name
        else:
            assert got[name] == want[name], name
    mine, other = ({(row["kind"], row["step"]): row for row in curve(record)} for record in (got, want))
    assert len(other) == 20 + 2, "a row for each twentieth, and two evaluations"
    assert mine.keys() >= other.keys()
    for place, row in other.items():
        names = ("loss", "task_loss", "density_loss") if row["kind"] == "train" else ("density", "score")
        assert [mine[place][name] for name in names] == pytest.approx([row[name] for name in names], rel=1e-4), place
    weights = [load_file(Path(record["adapter"]) / "adapter_model.safetensors") for record in (got, want)]
    assert learnt_apart(*weights) < 1e-3


def curve(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a trial that has left an adapter, in their order, those that were lost with a worker among them."""
    output = Path(record["adapter"]).parents[2]
    return [json.loads(line) for line in (output / "curves" / f"{record['trial']}.jsonl").read_text().splitlines()]


def at_once(found: dict[str, dict[str, Any]]) -> int:
    """Most trials that were under way at the same time."""
    events = [(record["started_at"], 1) for record in found.values()]
    events += [(record["ended_at"], -1) for record in found.values()]
    running = [sum(change for time, change in events if time <= moment) for moment, _ in events]
    return max(running)


def test_trials_at_once_leave_the_records_of_trials_one_by_one(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    done = sweep(spec, tmp_path / "run", "--set", SLOTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 trials at once" in done.stdout
    found = by_trial(tmp_path / "run")
    check_records(found, undisturbed)
    assert (at_once(undisturbed), at_once(found)) == (1, 3)
    third = min(found[trial]["started_at"] for trial in ("t0002", "t0003"))
    assert third < min(found[trial]["ended_at"] for trial in ("t0000", "t0001")), "a free slot waited for a baseline"


def test_a_host_finds_out_how_many_trials_it_takes(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The plan's expectation, what was measured, and what it saved stand in the report; the records are the same."""
    done = sweep(spec, tmp_path / "run", "--set", "resources.slots_per_host=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 trials at once (at most, by memory; each host finds out)" in done.stdout
    assert "\nslots   up to " in done.stdout
    found = by_trial(tmp_path / "run")
    check_records(found, undisturbed)
    assert 2 <= at_once(found) <= 8
    assert at_once(undisturbed) == 1
    assert found["t0002"]["packing"]["passes"] == 60
    assert max(record["packing"]["slots"] for record in found.values()) >= 2
    memory = found["t0002"]["host_memory_gib"]
    assert 0.3 < memory["base"] < 3
    assert 0 < memory["slot"] < 1
    report = (tmp_path / "run" / "report.md").read_text()
    for line in (
        "- Packing: up to ",
        "- Memory of a host: ",
        "- Planned: 8 trials at once (at most, by memory; each host finds out) on 1 hosts; about ",
    ):
        assert line in report


@pytest.mark.parametrize("workers", [1, 2])
def test_a_host_that_is_killed_with_several_trials_aboard_costs_none(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path, workers: int
) -> None:
    """They go on from their checkpoints; the tokens that the killed worker has kept on disk are gone in the end.

    Of two workers one is killed; both leave what one leaves that trains one trial at a time.
    """
    run = tmp_path / "run"
    process = start(spec, run, "--set", SLOTS, "--set", f"resources.workers_per_host={workers}")
    try:
        wait_until(lambda: sum(left["packed"]["shared"] > 0 for left in saved_rows(run).values()) >= 3, process)
        seen, before, tokens = {record["trial"] for record in records(run)}, saved_rows(run), kept_tokens(run)
        killed_at = time.time()
        training = workers_of(process.pid)
        assert len(training) == workers
        os.kill(training[-1], signal.SIGKILL)
        text, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, text
    assert len(seen) < len(undisturbed)
    found = by_trial(run)
    check_records(found, undisturbed)
    again = [trial for trial in before if found[trial]["started_at"] > killed_at]
    assert again
    for trial in again:
        steps = Counter(row["step"] for row in curve(found[trial]) if row["kind"] == "train")
        done = range(3, before[trial]["step"] + 1, 3)
        assert {steps[step] for step in done} == {1}, "none of these is trained anew"
    assert tokens
    assert not kept_tokens(run)


def saved(output: Path) -> dict[str, dict[str, Any]]:
    """What is written of trials beside what was saved of them last: the step, and how many passes they shared."""
    found = dict[str, dict[str, Any]]()
    for file in output.glob("checkpoints/*/latest.json"):
        with suppress(FileNotFoundError):  # the trial ends at this moment
            found[file.parent.name] = json.loads(file.read_text())
    return found


def saved_rows(output: Path) -> dict[str, dict[str, Any]]:
    """The same of trials that had sent a row of their training by then."""
    return {trial: left for trial, left in saved(output).items() if left["step"] >= 3}


def kept_tokens(output: Path) -> list[Path]:
    """Files of tokenised tasks that a sweep's hosts map."""
    sweep_id = json.loads((output / "plan.json").read_text())["sweep_id"]
    return list(Path(tempfile.gettempdir()).glob(f"deft_ray-{sweep_id}-*/*.arrow"))


def test_trials_that_are_stopped_or_diverge_leave_the_others_the_same(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Three at once, judged at rungs; one of each task has a learning rate that leaves no number."""
    tree = yaml.safe_load(spec.read_text())
    tree["train"]["learning_rate"], tree["baseline"] = {"choice": [1e-3, 1e30]}, {"train.learning_rate": 1e-3}
    points = [{**point, "train.learning_rate": 1e-3} for point in reversed(tree["search"]["try_first"])]
    points.insert(1, {**points[0], "train.learning_rate": 1e30})
    tree["search"] |= {"trials": 5, "scheduler": "mo_asha", "reduction_factor": 2.0, "try_first": points}
    changed = tmp_path / "spec.yaml"
    changed.write_text(yaml.safe_dump(tree))
    done = sweep(changed, tmp_path / "run", "--set", SLOTS)
    assert done.returncode == 0, done.stdout + done.stderr

    found = by_trial(tmp_path / "run")
    alone = {json.dumps(record["config"]) + record["task"]: record for record in undisturbed.values()}
    complete = [record for record in found.values() if record["status"] == "complete"]
    for record in complete:
        check_same(record, alone[json.dumps(record["config"]) + record["task"]])
    statuses = Counter(record["status"] for record in found.values())
    assert len(found) == 2 * (1 + 5)
    assert statuses["diverged"] == 2
    assert statuses["pruned"] >= 1
    assert len(complete) == len(found) - statuses["diverged"] - statuses["pruned"] >= 4, "two of them baselines"
    assert at_once(found) == 3


#: Half of the sampled trials, each with the rung at which it ends.
DICE = random.Random(0)
ENDS = {trial: DICE.randrange(5) for trial in sorted(DICE.sample([f"t{number:04}" for number in range(2, 10)], 4))}
#: Steps of the rungs.
RUNGS = (4, 7, 14, 29, 58)
#: The command, with chance for a scheduler.
STOPPED_BY_CHANCE = """
import runpy
from deft_ray.sweep import rungs
from tests.integration.test_slots import ENDS
rungs.is_among_the_best = lambda _others, mine, _factor: mine.rung != ENDS.get(mine.trial)
runpy.run_module("deft_ray.sweep", run_name="__main__")
"""


def test_half_of_the_trials_stopped_by_chance_leave_the_others_the_same(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    tree = yaml.safe_load(spec.read_text())
    tree["search"] |= {"scheduler": "mo_asha", "first_rung": 0.06, "reduction_factor": 2.0}
    changed, run = tmp_path / "spec.yaml", tmp_path / "run"
    changed.write_text(yaml.safe_dump(tree))
    python, _, _, *arguments = command(changed, run, "--set", SLOTS)
    done = subprocess.run(
        [python, "-c", STOPPED_BY_CHANCE, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, alone = by_trial(run), {(r["task"], json.dumps(r["config"])): r for r in undisturbed.values()}
    assert len(found) == len(alone) == 2 * (1 + 4)
    for trial, record in found.items():
        if trial in ENDS:
            assert (record["status"], record["steps"]) == ("pruned", RUNGS[ENDS[trial]])
        else:
            assert record["status"] == "complete"
            check_same(record, alone[record["task"], json.dumps(record["config"])])
    assert at_once(found) == 3


def workers_of(driver: int) -> list[int]:
    """The processes that train."""
    children = psutil.Process(driver).children(recursive=True)
    return [child.pid for child in children if any("RayTrainWorker" in word for word in child.cmdline())]
