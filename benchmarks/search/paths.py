"""A front along a path of rising α beside one with every α trained from scratch: hypervolume and steps.

    python benchmarks/search/paths.py [--output runs/paths]

Runs benchmarks/search/paths.yaml twice through the command, once as a grid and once as a path, on the nano model, and
writes ``results/search_path.json``; benchmarks/search/page.py puts it on its page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from store import store
from sweeps import ROOT, run_sweep

from deft_ray.results.front import front, hypervolume, points
from deft_ray.results.points import Point, merge
from deft_ray.results.records import RecordLog

SPEC = "benchmarks/search/paths.yaml"
#: What a score may lose on the baseline; the reference point of the hypervolume lies there, at the baseline's density.
NEAR = 0.05
WAYS = {"from scratch": {"search.sampler": "grid"}, "along a path": {"search.path": "alpha"}}


def main() -> None:
    """Run both and store what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "paths")
    given = parser.parse_args()
    found = [row for name, setting in WAYS.items() for row in run(name, setting, given.output)]
    store("search_path", {"spec": SPEC, "near": NEAR, "runs": found})


def run(name: str, setting: dict[str, object], output: Path) -> list[dict[str, Any]]:
    """Run one way, or the rest of it; returns a row for each task."""
    folder = output / name.replace(" ", "-")
    run_sweep(SPEC, folder, setting)
    records = RecordLog(folder / "records.jsonl").read()
    found = points(records)
    return [
        {"way": name, "task": task, **describe([point for point in found if point.task == task])}
        for task in dict.fromkeys(record.task for record in records)
    ]


def describe(found: list[Point]) -> dict[str, Any]:
    """Say what a task's points are worth and what they took."""
    baseline = next(point for point in merge(found) if point.reference)
    assert baseline.score is not None
    assert baseline.density is not None
    return {
        "steps": sum(point.steps for point in found),
        "steps_beside_baselines": sum(point.steps for point in found if not point.baseline),
        "hypervolume": hypervolume(found),
        "hypervolume_near": hypervolume(found, (baseline.score - NEAR, baseline.density)),
        "baseline": [baseline.score, baseline.density],
        "points": [
            {"alpha": point.config["deft.alpha"], "score": point.score, "density": point.density, "seeds": point.seeds}
            for point in merge(found)
        ],
        "front": [point.config["deft.alpha"] for point in front(found)],
    }


if __name__ == "__main__":
    main()
