"""A trial that fails is a record and the sweep goes on; a baseline that fails ends its task."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.sweeps import records, sweep
from tests.tiny import write_glue, write_tiny_bert

SPEC = """
name: failures
model: {{name: {model}, family: bert}}
data: {{dir: {data}, tasks: [sst2, rte], max_source_tokens: 48}}
adapter: {{target_modules: {targets}}}
train: {{steps: 4, batch_size: 8, max_grad_norm: 0, learning_rate: {rates}}}
search: {{trials: 2, try_first: {first}}}
baseline: {baseline}
resources: {{workers_per_host: {workers}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_tiny_bert(folder / "model")
    write_glue(folder / "data", ("sst2", "rte"))
    return folder


def write_spec(folder: Path, file: Path, **fields: object) -> Path:
    defaults = {"targets": "all-linear", "rates": "1e-3", "first": "[]", "baseline": "{}", "workers": 1}
    file.write_text(SPEC.format(model=folder / "model", data=folder / "data", **{**defaults, **fields}))
    return file


def test_a_diverging_trial_is_a_record_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(
        folder,
        tmp_path / "spec.yaml",
        rates="{choice: [1e-3, 1e30]}",
        first="[{train.learning_rate: 1e30}, {train.learning_rate: 1e-3}]",
        baseline="{train.learning_rate: 1e-3}",
        workers=2,
    )
    done = sweep(spec, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record["trial"]: record for record in records(tmp_path / "run")}
    assert {name: record["status"] for name, record in found.items()} == {
        "t0000": "complete",
        "t0001": "complete",
        "t0002": "diverged",
        "t0003": "diverged",
        "t0004": "complete",
        "t0005": "complete",
    }
    assert "the loss is not finite at step" in found["t0002"]["cause"]
    assert "diverged" in done.stdout
    assert "Ray" not in done.stdout


def test_a_failing_baseline_ends_its_task(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(folder, tmp_path / "spec.yaml", targets="[no_such_module]")
    done = sweep(spec, tmp_path / "run", "--set", "constraint.max_score_drop=0.1")
    assert done.returncode == 4, done.stdout + done.stderr
    found = records(tmp_path / "run")
    assert [(record["task"], record["baseline"], record["status"]) for record in found] == [
        ("sst2", True, "failed"),
        ("rte", True, "failed"),
    ]
    assert all("no_such_module" in record["cause"] for record in found)
    assert "the baseline of sst2 failed: no more trials of this task" in done.stdout
    assert "no usable baseline for sst2, rte" in done.stderr


def test_a_reference_point_inside_the_front_ends_the_sweep_after_its_baseline(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(folder, tmp_path / "spec.yaml")
    only_sst2 = ("--set", "data.tasks=[sst2]")
    done = sweep(spec, tmp_path / "run", *only_sst2, "--set", "reference.score=0.999")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "reference.score: lies inside the front: the baseline of sst2 scores" in done.stderr
    assert "--resume" in done.stderr
    assert [record["baseline"] for record in records(tmp_path / "run")] == [True]
    again = sweep(spec, tmp_path / "run", *only_sst2, "--resume", "--set", "reference.density=0.9999")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [record["status"] for record in records(tmp_path / "run")] == ["complete"] * 3
    assert "(reference: score 0, density 0.9999)" in (tmp_path / "run" / "report.md").read_text()


def test_a_model_that_cannot_be_loaded_ends_the_sweep(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(folder, tmp_path / "spec.yaml")
    text = spec.read_text().replace(str(folder / "model"), str(tmp_path / "broken"))
    spec.write_text(text)
    write_tiny_bert(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not a model")
    done = sweep(spec, tmp_path / "run")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no host could be kept" in done.stderr
    assert "--resume" in done.stderr
    assert records(tmp_path / "run") == []
