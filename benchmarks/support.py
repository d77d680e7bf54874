"""What goes together: every approximation, adapter, ZeRO stage and quantisation, trained for real on the nano model.

    python benchmarks/support.py [--workers 2] [--seeds 2]

Each combination trains for a few steps with the density loss, on as many workers as are asked for, and is evaluated; it
is supported if that runs through and its density is, with every seed, below that of the same adapter and quantisation
without the loss. tanh is for ReLU, so it is tried with ReLU in the place of the model's GELU. Writes
``results/support.json``; the table in the README is made from it (``--readme``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed as dist
from store import RESULTS, store
from torch.multiprocessing.spawn import spawn
from workers import join

from deft_ray.density.approximations import KINDS
from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import AdapterSection, DataSection, DeftSection, ModelSection, TrainSection, TrialSpec
from deft_ray.train.loading import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support: made by benchmarks/support.py -->", "<!-- end of support -->"

ADAPTERS = ("lora", "bottleneck", "prefix", "prompt")
STAGES = (0, 1, 2, 3)
QUANTIZATIONS = ("none", "nf4")

#: The loss that each approximation is tried with; l1 and l2 are in units of the activation.
LOSSES: dict[str, dict[str, Any]] = {
    "l0": {"alpha": 3.0, "epsilon": 1e-3},
    "tanh": {"alpha": 3.0, "beta": 20.0},
    "sigmoid": {"alpha": 3.0, "beta": 20.0},
    "l1": {"alpha": 10.0},
    "l2": {"alpha": 10.0},
}
#: Learning rates at which an adapter moves within so few steps.
RATES = {"lora": 2e-3, "bottleneck": 5e-3, "prefix": 3e-2, "prompt": 0.3}
TASK, STEPS = "nano-sentiment", 24


def trial(adapter: str, stage: int, quantization: str, loss: dict[str, Any], seed: int) -> TrialSpec:
    """One combination, or its baseline where the loss is empty."""
    return TrialSpec(
        trial="t0000",
        task=TASK,
        seed=seed,
        baseline=not loss,
        model=ModelSection(family="t5", quantization=quantization),  # type: ignore[arg-type]
        data=DataSection(tasks=[TASK], train_examples=300, validation_examples=64),
        adapter=AdapterSection(kind=adapter, virtual_tokens=10),  # type: ignore[arg-type]
        deft=DeftSection(**(loss or {"alpha": 0.0})),
        train=TrainSection(steps=STEPS, batch_size=8, learning_rate=RATES[adapter], zero_stage=stage),
    )


def main() -> None:
    """Train every combination, store what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--readme", action="store_true", help="only write the table of the last run into the README")
    given = parser.parse_args()
    if not given.readme:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            spawn(work, args=(given.workers, given.seeds, folder), nprocs=given.workers)
            rows = json.loads((Path(folder) / "rows.json").read_text())
        head = {"task": TASK, "steps": STEPS, "workers": given.workers, "seeds": given.seeds}
        store("support", {**head, "wall_s": time.perf_counter() - began, "rows": rows})
    write_table()


def work(rank: int, workers: int, seeds: int, folder: str) -> None:
    """One worker: every combination, one after the other; the first one writes down what came of them."""
    ranks = join(rank, workers, "gloo", folder)
    rows: list[dict[str, Any]] = []
    for quantization, relu in product(QUANTIZATIONS, (False, True)):
        base = load_base("nano", "t5", quantization=quantization, relu=relu)
        for adapter in ADAPTERS:
            none = [trial(adapter, 0, quantization, {}, seed) for seed in range(seeds)]
            baseline = [density(spec, base, ranks) for spec in none]
            kinds = [kind for kind in KINDS if (kind == "tanh") == relu]
            for kind, stage in product(kinds, STAGES):
                loss = {"approximation": kind, **LOSSES[kind]}
                specs = [trial(adapter, stage, quantization, loss, seed) for seed in range(seeds)]
                row = {"approximation": kind, "adapter": adapter, "zero_stage": stage, "quantization": quantization}
                try:
                    got, fault = [density(spec, base, ranks) for spec in specs], None
                except Exception as error:  # a combination that fails is a row of the table
                    if not ranks.all_failed():
                        raise
                    got, fault = None, f"{type(error).__name__}: {error}"[:200]
                rows.append({**row, "density": got, "baseline": baseline, "fault": fault})
                if ranks.leads:
                    print(rows[-1], flush=True)
    if ranks.leads:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def density(spec: TrialSpec, base: Base, ranks: Ranks) -> float | None:
    """Train a combination; returns its density after that."""
    slot = Slot(spec, base, load_task(TASK, spec.data, base), ranks)
    try:
        for _ in range(slot.steps):
            slot.step()
        return slot.evaluate().counts.density()
    finally:
        slot.close()


def supported(row: dict[str, Any]) -> bool:
    """Whether a combination ran through and lowered the density, with every seed."""
    return row["density"] is not None and least_change(row) > 0.0


def least_change(row: dict[str, Any]) -> float:
    """By how much a combination lowers the density at least, as a share of the baseline's."""
    return min(1 - found / before for found, before in zip(row["density"], row["baseline"], strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: adapters by approximation; a cell names the ZeRO stages that lower density, and by how much at most."""
    lines = [
        "| adapter | base | " + " | ".join(_heading(kind) for kind in KINDS) + " |",
        "|---" * (2 + len(KINDS)) + "|",
    ]
    for adapter, quantization in product(ADAPTERS, QUANTIZATIONS):
        cells = [_cell([r for r in rows if _key(r) == (kind, adapter, quantization)]) for kind in KINDS]
        base = "NF4" if quantization == "nf4" else "float32"
        lines.append(f"| {adapter} | {base} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _heading(kind: str) -> str:
    return f"{kind}, ReLU" if kind == "tanh" else kind


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["approximation"], row["adapter"], row["quantization"]


def _cell(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if supported(row)]
    if not good:
        return "no"
    stages = [row["zero_stage"] for row in good]
    said = (
        f"{stages[0]} to {stages[-1]}" if len(stages) == stages[-1] - stages[0] + 1 > 1 else ", ".join(map(str, stages))
    )
    least = min(map(least_change, good))
    return f"{said} (-{100 * least:.1f} %)"


def write_table() -> None:
    """Put the table of the last run between its marks in the README."""
    rows = json.loads((RESULTS / "support.json").read_text())["rows"]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
