"""Several workers of a host against one: NCCL where there are as many GPUs, gloo elsewhere.

    python benchmarks/workers.py [--workers 2]

Trains the nano model on one worker and on several, at every ZeRO stage, unquantised and in NF4, and compares what comes
of it: losses, adapters, counts. On several workers it starts what a host starts, without Ray. Writes
``results/workers.json``; exits with 1 where workers disagree among themselves, or with one by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from store import store
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import load_base
from deft_ray.spec.schema import AdapterSection, DataSection, DeftSection, ModelSection, TrainSection, TrialSpec
from deft_ray.train.loading import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot

TASK, STEPS = "nano-sentiment", 12
STAGES = (0, 1, 2, 3)
QUANTIZATIONS = ("none", "nf4")
#: How long a worker waits for another one.
PATIENCE = timedelta(minutes=2)
#: Largest difference of a step's loss that is rounding: AdamW makes steps of gradients near zero.
APART = 1e-3


def main() -> int:
    """Train everything on one worker and on several; compare and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    backend = "nccl" if torch.cuda.device_count() >= workers else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, workers):
            spawn(work, args=(world, backend, folder), nprocs=world)
        left = {world: read(Path(folder), world) for world in (1, workers)}
    cases = [compare(*case, left[1][0][case], [rank[case] for rank in left[workers]]) for case in all_cases()]
    store("workers", {"task": TASK, "steps": STEPS, "workers": workers, "backend": backend, "cases": cases})
    return 0 if all(case["same_on_all_workers"] and case["loss_apart"] < APART for case in cases) else 1


def all_cases() -> list[tuple[str, int]]:
    """Quantisation and ZeRO stage of each case."""
    return list(product(QUANTIZATIONS, STAGES))


def work(rank: int, world: int, backend: str, folder: str) -> None:
    """One worker: every case, one after the other."""
    ranks = join(rank, world, backend, folder)
    found = {}
    for quantization in QUANTIZATIONS:
        base = load_base("nano", "t5", quantization=quantization, wo="float32", device=ranks.device)
        data = load_task(TASK, trial(quantization, 0).data, base)
        for stage in STAGES:
            found[quantization, stage] = train(Slot(trial(quantization, stage), base, data, ranks))
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def join(rank: int, world: int, backend: str, folder: str) -> Ranks:
    """Join the other workers of a host, which meet in a folder."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    meet = f"file://{folder}/meet-{world}"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=world, timeout=PATIENCE)
    return Ranks(rank, world, device)


def trial(quantization: str, stage: int) -> TrialSpec:
    """One case."""
    return TrialSpec(
        trial="t0000",
        task=TASK,
        seed=0,
        baseline=False,
        model=ModelSection(family="t5", quantization=quantization),  # type: ignore[arg-type]
        data=DataSection(tasks=[TASK], train_examples=300, validation_examples=64),
        adapter=AdapterSection(),
        deft=DeftSection(alpha=3.0, epsilon=1e-3),
        train=TrainSection(steps=STEPS, batch_size=12, learning_rate=2e-3, zero_stage=stage),
    )


def train(slot: Slot) -> dict[str, Any]:
    """Train to the end and evaluate."""
    losses, seconds = [], []
    for _ in range(slot.steps):
        began = time.perf_counter()
        losses.append(float(slot.ranks.total(torch.tensor(slot.step().task_loss, dtype=torch.float64))))
        seconds.append(time.perf_counter() - began)
    found = slot.evaluate()
    with slot.whole():
        adapter = {name: p.detach().cpu().clone() for name, p in slot.model.named_parameters() if p.requires_grad}
    slot.close()
    return {"losses": losses, "step_s": statistics.median(seconds), "adapter": adapter, "row": found.row()}


def read(folder: Path, world: int) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """What each of so many workers left."""
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def compare(quantization: str, stage: int, alone: dict[str, Any], several: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare one case."""
    first = several[0]
    return {
        "quantization": quantization,
        "zero_stage": stage,
        "same_on_all_workers": all(
            other["row"] == first["row"]
            and all(torch.equal(other["adapter"][name], weights) for name, weights in first["adapter"].items())
            for other in several[1:]
        ),
        "loss_apart": max(abs(a - b) / abs(b) for a, b in zip(first["losses"], alone["losses"], strict=True)),
        "density": [alone["row"]["density"], first["row"]["density"]],
        "score": [alone["row"]["score"], first["row"]["score"]],
        "step_s": [alone["step_s"], first["step_s"]],
    }


if __name__ == "__main__":
    sys.exit(main())
