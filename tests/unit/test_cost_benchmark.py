"""The benchmark of the density loss: it runs with the few packages that it names, and nothing is kept for the loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = {"peft_again", "deft", "fused_deft", "naive", "naive_float32", "ada_deft"}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: What the product imports and the benchmark does without.
NOT_NEEDED = [
    *("ray", "deepspeed", "mlflow", "optuna", "moocore", "datasets", "pyarrow", "pandas"),
    *("pydantic", "torchmetrics", "scipy", "matplotlib", "plotly", "PIL"),
]

ALONE = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({blocked!r}))
sys.path.insert(0, {benchmarks!r})
import store
store.RESULTS = Path({folder!r})
sys.argv = ["benchmarks/density_loss.py", "--shape", "tiny", "--rounds", "1"]
import density_loss
density_loss.main()
"""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_needs_what_it_says_alone(tmp_path: Path, quantization: str) -> None:
    code = ALONE.format(blocked=NOT_NEEDED, benchmarks=str(BENCHMARKS), folder=str(tmp_path))
    code = code.replace('"1"]', f'"1", "--quantization", "{quantization}"]')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / f"density_loss_tiny_{quantization}_float32_cpu.json").read_text())
    saved = result["saved_for_backward"]
    for kind in ("none", "non-reentrant", "reentrant"):
        beyond = saved[kind]["bytes_per_activation_beyond_peft"]
        assert beyond["deft"] == 0.0, kind
        assert beyond["fused_deft"] == beyond["fused_peft"], kind
        assert beyond["ada_deft"] == beyond["ada_peft"], kind
        assert result["steps"][kind]["over_alpha_0"].keys() == WAYS
    again = saved["inside reentrant blocks"]["bytes_per_activation_beyond_peft"]
    for found in (saved["none"]["bytes_per_activation_beyond_peft"], again):
        assert found["fused_deft"] == found["fused_peft"] == -16.0
        assert found["deft"] == 0.0
        assert found["ada_deft"] == found["ada_peft"]
    ways = {name: way for name, way in result["evaluation"].items() if name != "measured"}
    assert ways.keys() == {"forward", "likelihood", "generation"}
    for way in ways.values():
        assert way["s"].keys() == {"plain", "plain_again", "counting", "counting_with_map"}
        assert all(way[f"{kind}_over_plain"]["count"] == 1 for kind in ("plain_again", "counting", "counting_with_map"))
    for kind in ("none", "non-reentrant", "reentrant"):
        assert result["added_to_steps"][kind].keys() == {"deft", "fused_deft", "ada_deft"}
        assert all(way["least"] > 1 for way in result["added_to_steps"][kind].values())
    for kind in ways:
        assert result["added_to_evaluation"][kind].keys() == {"counting", "counting_with_map"}


def test_a_part_that_is_measured_again_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "density_loss_tiny_none_float32_cpu.json"
    file.write_text(json.dumps({"steps": {"none": 1}, "evaluation": {"old": 2}}))
    code = ALONE.format(blocked=NOT_NEEDED, benchmarks=str(BENCHMARKS), folder=str(tmp_path)).replace(
        '"1"]', '"1", "--parts", "evaluation"]'
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    result = json.loads(file.read_text())
    assert result["steps"] == {"none": 1}
    assert "saved_for_backward" not in result
    assert result["evaluation"].keys() == {"measured", "forward", "likelihood", "generation"}
    assert result["evaluation"]["measured"]["shape"]["rounds"] == 1
