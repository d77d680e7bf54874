"""A sweep that a budget ends, whichever it is: said on the screen and in the report, and continued with more of it."""

from __future__ import annotations

from pathlib import Path

from tests.integration.sweeps import records, sweep
from tests.tiny import write_glue, write_tiny_bert

SPEC = """
name: budgets
model: {{name: {model}, family: bert}}
data: {{dir: {data}, tasks: [sst2], max_source_tokens: 48}}
deft: {{alpha: {{loguniform: [0.1, 30]}}}}
train: {{steps: 4, batch_size: 8}}
search: {{trials: 5, max_concurrent: 1}}
"""


def test_a_sweep_ends_by_the_clock_and_by_a_front_that_stands_still(tmp_path: Path) -> None:
    spec, output = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(
        SPEC.format(model=write_tiny_bert(tmp_path / "model"), data=write_glue(tmp_path / "data", ("sst2",)))
    )
    for settings, ran, left, why in (
        (["budget.wall_hours=1e-6"], 1, 5, "budget.wall_hours = 1e-06 is spent"),
        (
            ["budget.stall_trials=2", "budget.stall_growth=0.9"],
            3,
            3,
            "no hypervolume has grown by 0.9 in the last 2 trials",
        ),
    ):
        resumed = ["--resume"] if output.exists() else []
        done = sweep(spec, output, *resumed, *(word for leaf in settings for word in ("--set", leaf)))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"ended early: {why}; {left} trials not run" in done.stdout
        assert f"- Ended because: {why}\n" in (output / "report.md").read_text()
        assert [record["status"] for record in records(output)] == ["complete"] * ran
