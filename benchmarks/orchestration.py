"""Orchestration: wall time of the quickstart sweep over the time its trials spent in training and evaluation steps.

    python benchmarks/orchestration.py [SPEC]

Work is the sum of training and evaluation seconds of all trials, divided by the number of hosts that worked at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from store import store, summary

ROUNDS = 1


def run(spec: str, output: Path) -> dict[str, float]:
    """Run the sweep once; return its wall time and its work in seconds."""
    began = time.time()
    subprocess.run([sys.executable, "-m", "deft_ray.sweep", spec, "--output", str(output)], check=True)
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
        "trials": len(records),
    }


def main() -> None:
    """Run the sweep and store the ratio."""
    spec = sys.argv[1] if len(sys.argv) > 1 else "search_spaces/quickstart.yaml"
    runs = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(spec, Path(folder) / "run"))
    ratios = summary([one["wall_s"] / one["work_s"] for one in runs])
    store("orchestration", {"spec": spec, "runs": runs, "wall_over_work": ratios, "aim": "at most 1.15"})


if __name__ == "__main__":
    main()
