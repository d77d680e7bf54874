"""Orchestration: wall time of the quickstart sweep over the time its trials spent in training and evaluation steps.

    python benchmarks/orchestration.py [KEY=VALUE ...]

Work is the sum of training and evaluation seconds of all trials, divided by the number of hosts that worked at once.
Overrides, such as ``search.trials=14``, make it another sweep; its figures go to ``orchestration_with_overrides.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from store import store

SPEC = "search_spaces/quickstart.yaml"


def run(overrides: list[str], output: Path) -> dict[str, float]:
    """Run the sweep once; return its wall time and its work in seconds, and what it tells that slots have saved."""
    began = time.time()
    settings = [word for override in overrides for word in ("--set", override)]
    subprocess.run([sys.executable, "-m", "deft_ray.sweep", SPEC, "--output", str(output), *settings], check=True)
    wall = time.time() - began
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    hosts = len({record["host"] for record in records})
    work = sum(record["times"]["train_s"] + record["times"]["eval_s"] for record in records) / hosts
    first = min(record["started_at"] for record in records) - began
    last = began + wall - max(record["ended_at"] for record in records)
    return {
        "wall_s": wall,
        "work_s": work,
        "before_first_trial_s": first,
        "after_last_trial_s": last,
        "trials_s": wall - first - last,
        "train_s": sum(record["times"]["train_s"] for record in records),
        "told_saved_s": sum(record["packing"]["alone_s"] - record["packing"]["part_s"] for record in records),
        "trials": len(records),
    }


def main() -> None:
    """Run the sweep and store the ratio."""
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        figures = run(overrides, Path(folder) / "run")
    ratio = figures["wall_s"] / figures["work_s"]
    name = "orchestration_with_overrides" if overrides else "orchestration"
    store(name, {"spec": SPEC, "overrides": overrides, **figures, "wall_over_work": ratio, "aim": "at most 1.15"})


if __name__ == "__main__":
    main()
