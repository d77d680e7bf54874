"""How long a sweep of 32 small trials takes: with so many slots a host, and as one ``TorchTrainer.fit()`` per trial.

    python benchmarks/makespan.py [--trials 32] [--slots 1,2,4,8]

The nano model, NF4, one task, one worker on two cores, all of it in one run. A sweep is the whole command, from the
start of Ray to the report; fits are one after the other in one Ray, each with its own process, base and evaluation, and
without records, fronts or plots. With one slot a sweep is a warm host that runs one trial at a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from store import store

from deft_ray.results.records import RecordLog

SPEC = """
name: makespan
model: {quantization: nf4}
data: {tasks: [nano-sentiment], train_examples: 400, validation_examples: 64}
deft: {alpha: {loguniform: [0.1, 1]}, epsilon: {loguniform: [1e-5, 1e-3]}}
train: {steps: 20, batch_size: 4, eval_batch_size: 64, learning_rate: 1e-3}
search: {sampler: random, trials: 31}
resources: {hosts: 1, cpus_per_worker: 2}
"""


def sweep(trials: int, slots: int) -> dict[str, Any]:
    """Run the sweep by its command; returns its makespan in seconds, and what its trials took of it."""
    with tempfile.TemporaryDirectory() as folder:
        spec, output = Path(folder) / "spec.yaml", Path(folder) / "run"
        spec.write_text(SPEC)
        leaves = {"search.trials": trials - 1, "resources.slots_per_host": slots}
        words = [word for name, value in leaves.items() for word in ("--set", f"{name}={value}")]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "deft_ray.sweep", str(spec), "--output", str(output), *words], check=True)
        seconds = time.perf_counter() - began
        records = RecordLog(output / "records.jsonl").read()
    assert [record.status for record in records] == ["complete"] * trials
    first, last = min(r.started_at or 0.0 for r in records), max(r.ended_at or 0.0 for r in records)
    return {"slots": slots, "makespan_s": seconds, "first_trial_to_last_s": last - first}


def one_fit_per_trial(trials: int) -> list[float]:
    """Train as many trials with one Ray Train run each; returns the seconds of each."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    seconds = []
    began = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(trials):
                TorchTrainer(
                    train_one,
                    train_loop_config={"number": number},
                    torch_config=TorchConfig(backend="gloo"),
                    scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 2}),
                    run_config=RunConfig(name=f"fit-{number}", storage_path=folder),
                ).fit()
                seconds.append(time.perf_counter() - began)
                began = time.perf_counter()
    finally:
        ray.shutdown()
    return seconds


def train_one(config: dict[str, Any]) -> None:
    """One trial by itself: load, quantise, train, evaluate."""
    import torch

    from deft_ray.models.base import load_base
    from deft_ray.spec.loading import check_tree
    from deft_ray.spec.resolve import resolve_trial
    from deft_ray.spec.yaml_tree import parse
    from deft_ray.train.host import load_task
    from deft_ray.train.ranks import Ranks
    from deft_ray.train.slot import Slot

    spec, faults = check_tree(parse(SPEC)[0])
    assert spec is not None, faults
    alpha = 0.1 * 10.0 ** (config["number"] / 32)
    trial = resolve_trial(spec, "t0000", "nano-sentiment", 0, {"deft.alpha": alpha, "deft.epsilon": 1e-4})
    os.environ["LOCAL_RANK"] = "0"
    base = load_base("nano", "t5", quantization="nf4")
    slot = Slot(trial, base, load_task(trial.task, trial.data, base), Ranks(0, 1, torch.device("cpu")))
    for _ in range(slot.steps):
        slot.step()
    slot.evaluate(last=True)


def main() -> None:
    """Run all of them, and store what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--slots", default="1,2,4,8")
    given = parser.parse_args()
    sweeps = [sweep(given.trials, int(slots)) for slots in given.slots.split(",")]
    fits = one_fit_per_trial(given.trials)
    one = sweeps[0]["makespan_s"]
    store(
        "makespan",
        {
            "spec": SPEC.strip().splitlines(),
            "trials": given.trials,
            "sweeps": [{**each, "one_slot_over_this": one / each["makespan_s"]} for each in sweeps],
            "fits": {"makespan_s": sum(fits), "each_s": fits},
            "sweep_over_fits": {str(each["slots"]): each["makespan_s"] / sum(fits) for each in sweeps},
            "aims": {"sweep_over_fits": "at most 1/8"},
        },
    )


if __name__ == "__main__":
    main()
