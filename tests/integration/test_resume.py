"""A sweep that is killed and continued equals one that was left alone: so the search is reproducible too."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from safetensors.torch import load_file

from tests.integration.sweeps import mlflow_runs, records, start, stop, sweep, wait_until
from tests.searches import told
from tests.tiny import write_glue, write_tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, when its database is read

SPEC = """
name: resume
model: {{name: {model}, family: t5}}
data: {{dir: {data}, tasks: [sst2, rte], max_source_tokens: 48}}
adapter: {{lora_dropout: 0.1}}
deft: {{alpha: {{loguniform: [0.1, 3]}}, epsilon: {{loguniform: [1e-6, 1e-2]}}}}
train: {{steps: 16, batch_size: 16, learning_rate: 3e-3, checkpoint_every_s: 0}}
search: {{trials: 3, max_concurrent: 1}}
"""

SAME = ("trial", "task", "seed", "baseline", "status", "score", "density", "density_layers", "config", "steps")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    model, data = write_tiny_t5(folder / "model"), write_glue(folder / "data", ("sst2", "rte"))
    file = folder / "spec.yaml"
    file.write_text(SPEC.format(model=model, data=data))
    return file


@pytest.fixture(scope="module")
def undisturbed(spec: Path) -> Path:
    output = spec.parent / "undisturbed"
    done = sweep(spec, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_stopped_again_and_again_and_resumed_equals_undisturbed(spec: Path, undisturbed: Path, tmp_path: Path) -> None:
    output, before = tmp_path / "run", list[dict[str, Any]]()
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)):
        process = start(spec, output, *(["--resume"] if before else []))
        known = len(before)
        wait_until(lambda known=known: len(records(output)) > known and _mid_trial(output), process)
        returned, text = stop(process, number)
        assert returned == code, text
        now = records(output)
        assert now[:known] == before
        assert known < len(now) < 8
        points = [point for study in output.glob("search/*.log") for point in told(study.parent, study.stem)]
        assert number == signal.SIGKILL or not any(point.state == TrialState.RUNNING for point in points)
        before = now
    assert [point.user_attrs["ending"] for point in points].count("stopped") == 1

    again = sweep(spec, output, "--resume")

    assert again.returncode == 0, again.stdout + again.stderr
    after = records(output)
    assert after[: len(before)] == before
    assert len({record["trial"] for record in after}) == len(after) == 8
    assert [_same(record) for record in after] == [_same(record) for record in records(undisturbed)]
    for record in after:
        name = f"checkpoints/{record['trial']}/adapter/adapter_model.safetensors"
        mine, theirs = load_file(output / name), load_file(undisturbed / name)
        assert mine.keys() == theirs.keys()
        assert all(bool((mine[key] == theirs[key]).all()) for key in mine)
    assert "- wall time since it was resumed: " in (output / "report.md").read_text()
    assert "- wall time: " in (undisturbed / "report.md").read_text()
    parents, nested = mlflow_runs(output)
    assert len(parents) == 1
    assert sorted(run.data.tags["deft_ray.trial"] for run in nested) == [record["trial"] for record in after]


def test_a_finished_sweep_resumed_runs_nothing(spec: Path, undisturbed: Path) -> None:
    before = (undisturbed / "records.jsonl").read_bytes()
    again = sweep(spec, undisturbed, "--resume")
    assert again.returncode == 0, again.stderr
    assert (undisturbed / "records.jsonl").read_bytes() == before
    with sqlite3.connect(undisturbed / "mlflow.db") as database:
        (runs,) = database.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone()
    assert runs == 9


def _mid_trial(output: Path) -> bool:
    """Tell whether a trial without a record has saved a checkpoint."""
    ended = {record["trial"] for record in records(output)}
    return any(
        file.parent.name not in ended and json.loads(file.read_text() or "{}").get("step", 0) > 3
        for file in (output / "checkpoints").glob("*/latest.json")
    )


def _same(record: dict[str, object]) -> dict[str, object]:
    return {key: record[key] for key in SAME}
