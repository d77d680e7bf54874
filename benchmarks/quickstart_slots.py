"""What slots save the quickstart: the shipped sweep with one slot a host and as it is, in turn.

    python benchmarks/quickstart_slots.py [--rounds 3] [KEY=VALUE ...]

Each round runs both, every other one the other way round; ratios are taken within a round. Training is what trials were
busy with steps, by the clock of their hosts, of a shared one each trial's part. What a report says that passes have
saved is set beside what all trials of the sweep with one slot trained longer, which knows nothing of how a report finds
its figure.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from orchestration import SPEC, run
from store import store, summary

WAYS = {"one": ["resources.slots_per_host=1"], "shipped": []}


def main() -> None:
    """Run all of them, and store what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(asked.rounds):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(run([*asked.overrides, *WAYS[way]], Path(folder) / "run"))
    pairs = list(zip(found["one"], found["shipped"], strict=True))
    figures: dict[str, Any] = {
        f"{name}_one_over_shipped": summary([one[name] / shipped[name] for one, shipped in pairs])
        for name in ("wall_s", "trials_s", "train_s")
    }
    store(
        "quickstart_slots",
        {
            "spec": SPEC,
            "overrides": asked.overrides,
            "rounds": found,
            **figures,
            "told_saved_s": summary([shipped["told_saved_s"] for _, shipped in pairs]),
            "trained_shorter_s": summary([one["train_s"] - shipped["train_s"] for one, shipped in pairs]),
        },
    )


if __name__ == "__main__":
    main()
