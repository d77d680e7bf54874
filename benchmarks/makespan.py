"""How long a sweep of 32 small trials takes: with so many slots a host, and as one ``TorchTrainer.fit()`` per trial.

    python benchmarks/makespan.py [--shape nano|base] [--trials 32] [--slots 1,2,4,8] [--fits 32]

NF4, one task, one worker, all of it in one run on two cores: of the embedded model, whose worker computes on one of
them and leaves the other to Ray (it takes as long on both), or of one of a shape of Flan-T5 with random weights and
batches of 4 x 64 tokens, on both. A sweep is the whole command, from the start of Ray to the report; fits are one after
the other in one Ray, each with its own process, base and evaluation, and without records, fronts or plots. Where fewer
fits are run than trials, their makespan is the mean of one times the trials. With one slot a sweep is a warm host that
runs one trial at a time. Tokens are those that trials train on; memory is the most that a process that trains has
taken, with all trials that it trained at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, build_t5
from store import store
from transformers import AutoTokenizer

from deft_ray.models.base import load_base
from deft_ray.nano import MODEL_DIR
from deft_ray.results.records import RecordLog
from deft_ray.results.report import packing
from deft_ray.spec.catalog import NANO
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec
from deft_ray.spec.yaml_tree import parse
from deft_ray.tasks.kept import source_lengths, target_lengths
from deft_ray.train.loading import load_task
from deft_ray.train.memory import DeviceMemory

SPEC = """
name: makespan
model: {name: MODEL, family: t5, quantization: nf4}
data: {tasks: [nano-sentiment], train_examples: 400, validation_examples: 64}
deft: {alpha: {loguniform: [0.1, 1]}, epsilon: {loguniform: [1e-5, 1e-3]}}
train: {steps: 20, batch_size: 4, eval_batch_size: 64, learning_rate: 1e-3}
search: {sampler: random, trials: 31}
resources: {hosts: 1, cpus_per_worker: 1}
"""
#: Of a shape with random weights: sources of 64 tokens, and fewer examples to score, as each takes long.
OF_SHAPE = (
    ("train_examples: 400, validation_examples: 64", "train_examples: 64, validation_examples: 8, PADDED"),
    ("PADDED", "padding: max_length, max_source_tokens: 64, max_target_tokens: 4"),
    ("cpus_per_worker: 1", "cpus_per_worker: 2"),
)


def spec_text(shape: str, folder: Path) -> str:
    """Return the spec of a shape; its random weights are written into ``folder``."""
    if shape == NANO:
        return SPEC.replace("MODEL", NANO)
    torch.manual_seed(0)
    model = build_t5(shape, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / "model")
    text = SPEC.replace("MODEL", str(folder / "model"))
    for old, new in OF_SHAPE:
        text = text.replace(old, new)
    return text


def parsed(text: str) -> SweepSpec:
    """Check a spec."""
    spec, faults = check_tree(parse(text)[0])
    assert spec is not None, faults
    return spec


def tokens_of_a_trial(spec: SweepSpec) -> float:
    """Tokens that a trial trains on, about: of the mean example, its answer too, as long as it is padded to."""
    base = load_base(spec.model.name, "t5", quantization="none", dtype="float32")
    train = load_task(spec.data.tasks[0], spec.data, base).train
    sources, targets = source_lengths(train), target_lengths(train)
    if spec.data.padding == "max_length":
        sources, targets = ([most] * len(train) for most in (spec.data.max_source_tokens, spec.data.max_target_tokens))
    assert spec.train.steps is not None
    return spec.train.steps * spec.train.batch_size * sum((*sources, *targets)) / len(train)


def sweep(text: str, trials: int, slots: int) -> dict[str, Any]:
    """Run the sweep by its command; returns its makespan in seconds, what its trials took of it, memory and packing."""
    with tempfile.TemporaryDirectory() as folder:
        spec, output = Path(folder) / "spec.yaml", Path(folder) / "run"
        spec.write_text(text)
        leaves = {"search.trials": trials - 1, "resources.slots_per_host": slots}
        words = [word for name, value in leaves.items() for word in ("--set", f"{name}={value}")]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "deft_ray.sweep", str(spec), "--output", str(output), *words], check=True)
        seconds = time.perf_counter() - began
        records = RecordLog(output / "records.jsonl").read()
    assert [record.status for record in records] == ["complete"] * trials
    first, last = min(r.started_at or 0.0 for r in records), max(r.ended_at or 0.0 for r in records)
    peak = max(record.peak_memory_gib or 0.0 for record in records)
    return {
        "slots": slots,
        "makespan_s": seconds,
        "first_trial_to_last_s": last - first,
        "peak_gib": peak,
        "packing": packing(records),
    }


def one_fit_per_trial(text: str, trials: int, fits: int) -> dict[str, Any]:
    """Train so many trials with one Ray Train run each; returns the makespan of all, seconds of each, and memory."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus = parsed(text).resources.cpus_per_worker
    seconds, peaks = [], []
    began = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            peak = Path(folder) / "peak"
            for number in range(fits):
                TorchTrainer(
                    partial(train_one, text, peak),
                    train_loop_config={"number": number},
                    torch_config=TorchConfig(backend="gloo"),
                    scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": cpus}),
                    run_config=RunConfig(name=f"fit-{number}", storage_path=folder),
                ).fit()
                seconds.append(time.perf_counter() - began)
                peaks.append(float(peak.read_text()))
                began = time.perf_counter()
    finally:
        ray.shutdown()
    return {"makespan_s": sum(seconds) / fits * trials, "each_s": seconds, "peak_gib": max(peaks)}


def train_one(text: str, peak: Path, config: dict[str, Any]) -> None:
    """One trial by itself: load, quantise, train, evaluate."""
    from deft_ray.spec.resolve import resolve_trial
    from deft_ray.train.ranks import Ranks
    from deft_ray.train.slot import Slot

    spec = parsed(text)
    alpha = 0.1 * 10.0 ** (config["number"] / 32)
    trial = resolve_trial(spec, "t0000", spec.data.tasks[0], 0, {"deft.alpha": alpha, "deft.epsilon": 1e-4})
    os.environ["LOCAL_RANK"] = "0"
    base = load_base(spec.model.name, "t5", quantization="nf4")
    slot = Slot(trial, base, load_task(trial.task, trial.data, base), Ranks(0, 1, torch.device("cpu")))
    for _ in range(slot.steps):
        slot.step()
    slot.evaluate(last=True)
    peak.write_text(str(DeviceMemory(torch.device("cpu")).peak / 2**30))


def main() -> None:
    """Run all of them, and store what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[NANO, *SHAPES], default=NANO)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--slots", default="1,2,4,8")
    parser.add_argument("--fits", type=int, help="how many of the trials to run as a fit each; all if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = spec_text(given.shape, Path(folder))
        tokens = tokens_of_a_trial(parsed(text))
        sweeps = [sweep(text, given.trials, int(slots)) for slots in given.slots.split(",")]
        fits = one_fit_per_trial(text, given.trials, given.fits or given.trials)
        shown = text.replace(folder, "").strip().splitlines()
    for each in (*sweeps, fits):
        each["tokens_per_s"] = given.trials * tokens / each["makespan_s"]
    one = sweeps[0]["makespan_s"]
    store(
        "makespan" if given.shape == NANO else f"makespan_{given.shape}",
        {
            "spec": shown,
            "trials": given.trials,
            "sweeps": [{**each, "one_slot_over_this": one / each["makespan_s"]} for each in sweeps],
            "fits": fits,
            "sweep_over_fits": {str(each["slots"]): each["makespan_s"] / fits["makespan_s"] for each in sweeps},
            "aims": {
                "sweep_over_fits": "at most 1/8, of the embedded model",
                "one_slot_over_this": "at least 1.4 of Flan-T5-base's shape, four slots",
            },
        },
    )


if __name__ == "__main__":
    main()
