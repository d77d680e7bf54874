"""The benchmark of slots that share passes, at its smallest: it runs without Ray, and a part leaves the other alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ALONE = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(["ray", "mlflow", "optuna"]))
sys.path.insert(0, {benchmarks!r})
import store
store.RESULTS = Path({folder!r})
sys.argv = ["benchmarks/packing.py", "--rounds", "2", "--source", "8", *{arguments!r}]
import packing
packing.main()
"""


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    code = ALONE.format(benchmarks=str(BENCHMARKS), folder=str(folder), arguments=arguments)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    (file,) = folder.iterdir()
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    "shape", [("--shape", "nano"), ("--shape", "tiny", "--quantization", "none", "--checkpointing")]
)
def test_it_stores_passes_memory_routing_and_evaluation(tmp_path: Path, shape: tuple[str, ...]) -> None:
    found = measure(tmp_path, *shape, "--slots", "1,3")
    steps = found["slots"]["steps"]
    assert [step["slots"] for step in steps] == [1, 3]
    for step in steps:
        assert step["one_by_one_over_together"]["count"] == 2
        assert all(0.1 < peak < 8 for peak in step["peak_gib"].values())
        assert step["tokens_per_s"]["together"] == pytest.approx(
            step["slots"] * 4 * 12 / step["s"]["together"]["median"]
        )
    one, three = (step["peak_gib"] for step in steps)
    assert found["slots"]["memory"]["ratio"] == pytest.approx(three["together"] / 3 / min(one.values()))
    assert found["routing"]["four_quarters_over_one_whole"]["count"] == 4
    assert found["routing"]["cpu_seconds"]["median"] > 0
    assert found["routing"]["measured"]["settings"]["rounds"] == 2
    evaluated = found["evaluation"]
    assert evaluated.keys() == {"measured", "nano-sentiment", *(["nano-question"] if "nano" in shape else [])}
    classes = evaluated["nano-sentiment"]
    assert classes["whole_batches"]["pieces"] == 1
    for way in ("pieces", "whole_batches"):
        assert classes[way]["piece_over_step"]["count"] // 2 == classes[way]["pieces"] >= 1
        assert classes[way]["evaluation_s"]["least"] > 0


def test_a_part_that_is_measured_again_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "packing_tiny_nf4_float32_cpu.json"
    file.write_text(json.dumps({"slots": {"old": 1}, "routing": {"old": 2}}))
    found = measure(tmp_path, "--shape", "tiny", "--parts", "routing")
    assert found["slots"] == {"old": 1}
    assert found["routing"].keys() == {"measured", "slots", "s", "four_quarters_over_one_whole", "cpu_seconds"}
