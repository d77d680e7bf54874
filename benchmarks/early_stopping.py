"""What early stopping saves and what the front loses for it: one sweep with it and the same one without.

    python benchmarks/early_stopping.py [--output runs/early_stopping]

Runs benchmarks/early_stopping.yaml through the command, with `mo_asha` and with no scheduler, sets the one beside the
other with ``deft-ray report --against``, and writes ``results/early_stopping.json``; benchmarks/search/page.py puts it
on its page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from store import store
from sweeps import ROOT, run_sweep

from deft_ray.results.against import Found, compare_sweeps
from deft_ray.results.records import Record, RecordLog

SPEC = "benchmarks/early_stopping.yaml"


def main() -> None:
    """Run both sweeps and store what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "early_stopping")
    given = parser.parse_args()
    folders = {scheduler: run(scheduler, given.output / scheduler) for scheduler in ("none", "mo_asha")}
    report = [
        sys.executable,
        "-m",
        "deft_ray.cli",
        "report",
        str(folders["mo_asha"]),
        "--against",
        str(folders["none"]),
    ]
    subprocess.run(report, check=True, cwd=ROOT)
    limit = yaml.safe_load((folders["none"] / "spec.yaml").read_text(encoding="utf-8"))["constraint"]["max_score_drop"]
    records = {name: RecordLog(folder / "records.jsonl").read() for name, folder in folders.items()}
    compared = compare_sweeps(records["mo_asha"], records["none"], limit)
    store(
        "early_stopping",
        {
            "spec": SPEC,
            "max_score_drop": limit,
            "pruned": sum(record.status == "pruned" for record in records["mo_asha"]),
            "tasks": [
                {
                    "task": task,
                    "with": told(found, records["mo_asha"], task),
                    "without": told(other, records["none"], task),
                }
                for task, (found, other) in compared.items()
            ],
        },
    )


def run(scheduler: str, folder: Path) -> Path:
    """Run one sweep, or the rest of it."""
    run_sweep(SPEC, folder, {"search.scheduler": scheduler})
    return folder


def told(found: Found, records: list[Record], task: str) -> dict[str, Any]:
    """What the JSON keeps; front seeds are never stopped, and one sweep may have more of them than the other."""
    low = found.lowest
    return {
        "trials": found.trials,
        "steps": found.steps,
        "front_seed_steps": sum(each.steps for each in records if each.task == task and each.is_front_seed),
        "hypervolume": found.hypervolume,
        "lowest_density": None if low is None else low.density,
        "its_score": None if low is None else low.score,
    }


if __name__ == "__main__":
    main()
