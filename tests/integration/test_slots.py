"""Several trials at once on one host, through the real command: the records of one after the other, killed or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.sweeps import records, start, sweep, wait_until
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
    """Float32 rounds otherwise in a pass of several slots."""
    assert got.keys() == want.keys()
    for trial, record in want.items():
        mine = got[trial]
        assert (mine["status"], mine["steps"], mine["config"]) == ("complete", 60, record["config"])
        assert mine["density"] == pytest.approx(record["density"], rel=5e-3)
        assert mine["score"] == pytest.approx(record["score"], abs=0.051), "one of twenty examples"
        assert (Path(mine["adapter"]) / "adapter_model.safetensors").is_file()


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


def test_a_host_finds_out_how_many_trials_it_takes(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The plan's expectation, what was measured, and what it saved stand in the report; the records are the same."""
    done = sweep(spec, tmp_path / "run", "--set", "resources.slots_per_host=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 trials at once (at most, by memory; each host finds out)" in done.stdout
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


def test_a_host_that_is_killed_with_several_trials_aboard_costs_none(
    spec: Path, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    process = start(spec, tmp_path / "run", "--set", SLOTS)
    try:
        wait_until(lambda: len(list((tmp_path / "run").glob("checkpoints/*/latest.json"))) >= 3, process)
        seen = {record["trial"] for record in records(tmp_path / "run")}
        os.kill(worker_of(process.pid), signal.SIGKILL)
        text, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, text
    assert len(seen) < len(undisturbed)
    check_records(by_trial(tmp_path / "run"), undisturbed)


def worker_of(driver: int) -> int:
    """The process that trains."""
    children = psutil.Process(driver).children(recursive=True)
    (worker,) = [child.pid for child in children if any("RayTrainWorker" in word for word in child.cmdline())]
    return worker
