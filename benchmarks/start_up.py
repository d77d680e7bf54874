"""Start-up per trial: trials as slots on a live host, beside one ``TorchTrainer.fit()`` per trial, same work, one run.

    python benchmarks/start_up.py

The nano model, NF4, two workers, ZeRO-2. Start-up is the time from the end of one trial to the first training step of
the next. The usual pattern pays process start, imports, model load and quantisation in it; a slot only attaches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from store import store, summary

HOST_TRIALS = 8
FIT_TRIALS = 3
STEPS = 10

SPEC = f"""
name: start-up
model: {{quantization: nf4}}
data: {{tasks: [nano-sentiment], train_examples: 400, validation_examples: 64}}
deft: {{alpha: {{loguniform: [0.1, 1]}}, epsilon: 1e-4}}
train: {{steps: {STEPS}, learning_rate: 1e-3, zero_stage: 2}}
search: {{trials: {HOST_TRIALS - 1}}}
resources: {{workers_per_host: 2}}
"""


def on_a_host(folder: Path) -> list[float]:
    """Run a sweep by its command; return the start-ups of all trials after the first, in seconds."""
    spec, output = folder / "spec.yaml", folder / "run"
    spec.write_text(SPEC)
    subprocess.run([sys.executable, "-m", "deft_ray.sweep", str(spec), "--output", str(output)], check=True)
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    first_steps = [record["started_at"] + record["times"]["startup_s"] for record in records]
    ends = [record["ended_at"] for record in records]
    return [step - end for step, end in zip(first_steps[1:], ends[:-1], strict=True)]


def one_fit_per_trial(folder: Path) -> list[float]:
    """Train the same trials with one Ray Train run each; return all start-ups but the first, in seconds."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    times: list[float] = []
    try:
        end = time.time()
        for number in range(FIT_TRIALS + 1):
            stamp = folder / f"first-step-{number}"
            TorchTrainer(
                train_one,
                train_loop_config={"stamp": str(stamp)},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(name=f"fit-{number}", storage_path=str(folder / "ray")),
            ).fit()
            times.append(float(stamp.read_text()) - end)
            end = time.time()
    finally:
        ray.shutdown()
    return times[1:]


def train_one(config: dict[str, Any]) -> None:
    """One trial by itself: load, quantise, train, evaluate."""
    import ray.train
    import torch

    from deft_ray.models.base import load_base
    from deft_ray.spec.loading import check_tree
    from deft_ray.spec.resolve import resolve_trial
    from deft_ray.spec.yaml_tree import parse
    from deft_ray.train.loading import load_task
    from deft_ray.train.ranks import Ranks
    from deft_ray.train.slot import Slot

    spec, faults = check_tree(parse(SPEC)[0])
    assert spec is not None, faults
    trial = resolve_trial(spec, "t0000", "nano-sentiment", 0, {"deft.alpha": 0.3})
    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    base = load_base("nano", "t5", quantization="nf4")
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), torch.device("cpu"))
    slot = Slot(trial, base, load_task(trial.task, trial.data, base), ranks)
    if ranks.leads:
        Path(config["stamp"]).write_text(str(time.time()))
    for _ in range(slot.steps):
        slot.step()
    slot.evaluate()


def main() -> None:
    """Run both ways, one after the other and again, and store the figures."""
    host: list[float] = []
    fit: list[float] = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            host += on_a_host(Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            fit += one_fit_per_trial(Path(folder))
    figures = {"host_startup_s": summary(host), "fit_per_trial_startup_s": summary(fit)}
    ratio = figures["fit_per_trial_startup_s"]["median"] / figures["host_startup_s"]["median"]
    store(
        "start_up",
        {
            "workers": 2,
            "model": "nano, NF4, ZeRO-2",
            **figures,
            "ratio_of_medians": ratio,
            "aim": "10 or more; host under 3 s",
        },
    )


if __name__ == "__main__":
    main()
