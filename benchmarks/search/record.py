"""Record a table of real trainings for the benchmark of the search.

    python benchmarks/search/record.py [--output FOLDER]

Runs nano_trials.yaml through the command and writes nano_trials.parquet: one row per trial and evaluation, with the
trial's settings, its steps, score and density. Stopped in the middle it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
SPEC, TABLE = HERE / "nano_trials.yaml", HERE / "nano_trials.parquet"
SETTINGS = (
    "deft.approximation", "deft.alpha", "deft.epsilon", "deft.beta", "deft.adaptive", "deft.lambda_init",
    "train.learning_rate",
)  # fmt: skip


def main() -> None:
    """Run the sweep, or the rest of it; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "runs" / "nano_trials")
    output = parser.parse_args().output
    resume = ["--resume"] if output.exists() else []
    command = [sys.executable, "-m", "deft_ray.sweep", str(SPEC), "--output", str(output), *resume]
    subprocess.run(command, check=True, cwd=HERE.parents[1])
    records = map(json.loads, (output / "records.jsonl").read_text().splitlines())
    rows = [row for record in records for row in curve(record, output)]
    pq.write_table(pa.Table.from_pylist(rows), TABLE, compression="zstd")
    trials = len({row["trial"] for row in rows})
    print(f"wrote {TABLE.name}: {trials} trials, {len(rows)} rows, {TABLE.stat().st_size:,} bytes")


def curve(record: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Rows of one trial; one that diverged has those that it reached."""
    fixed = {
        "trial": record["trial"],
        "baseline": record["baseline"],
        "status": record["status"],
        **{name: record["config"][name] for name in SETTINGS},
    }
    lines = (output / "curves" / f"{record['trial']}.jsonl").read_text().splitlines()
    evaluations = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    return [{**fixed, **{key: row[key] for key in ("step", "score", "density")}} for row in evaluations]


if __name__ == "__main__":
    main()
