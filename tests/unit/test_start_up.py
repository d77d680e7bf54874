"""Help, plans and spec faults come without the heavy packages, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deft_ray.spec.schema import DeftSection

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "mlflow", "matplotlib", "pandas")

#: Runs the command as ``python -m`` does, then tells on a line of stderr what it has imported.
WRAPPER = """
import runpy, sys
try:
    runpy.run_module("deft_ray.sweep", run_name="__main__", alter_sys=True)
finally:
    print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""

SPEC = """\
name: try
data:
  tasks: [nano-sentiment]
train:
  steps: 10
deft:
  alpha: {uniform: [0, 2]}
"""


def run(folder: Path, *arguments: str) -> tuple[int, str, list[str], set[str]]:
    """Run the command in a folder; returns exit code, stdout, lines of stderr, and imported packages."""
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stderr.splitlines()
    packages = next(line for line in lines if line.startswith("IMPORTED "))
    lines.remove(packages)
    return done.returncode, done.stdout, lines, set(packages.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "bad.yaml").write_text(SPEC.replace("steps: 10", "steps: ten"))
    return tmp_path


def test_help(folder: Path) -> None:
    code, stdout, stderr, packages = run(folder, "--help")
    assert (code, stderr, packages.intersection(HEAVY)) == (0, [], set())
    assert stdout.startswith("usage: python -m deft_ray.sweep ")
    for option in (
        "--set",
        "--plan",
        "--resume",
        "--output",
        "--address",
        "SPEC",
        "exit codes: 0 done, 2 spec, 3 set-up",
    ):
        assert option in stdout
    assert "pydantic" not in packages


def test_a_plan(folder: Path) -> None:
    code, stdout, stderr, packages = run(folder, "--plan", "spec.yaml", "--set", "search.trials=3", "--output", "there")
    assert (code, stderr, packages.intersection(HEAVY)) == (0, [], set())
    assert "4 = 1 baselines + 3 sampled, 10 steps each" in stdout
    assert "run directory  there\n" in stdout
    assert sorted(path.name for path in folder.iterdir()) == ["bad.yaml", "spec.yaml"]


@pytest.mark.parametrize("flag", [(), ("--plan",), ("--resume",), ("--address", "auto")])
def test_a_spec_fault(folder: Path, flag: tuple[str, ...]) -> None:
    code, stdout, stderr, packages = run(folder, "bad.yaml", "--set", "deft.alhpa=1", *flag)
    assert (code, stdout, packages.intersection(HEAVY)) == (2, "", set())
    assert stderr == [
        'bad.yaml:5: train.steps: must be a whole number (got "ten")',
        "--set deft.alhpa=1: deft.alhpa: unknown key; did you mean 'alpha'? "
        f"allowed: {', '.join(DeftSection.model_fields)}",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["bad.yaml", "spec.yaml"]


def test_debug_shows_where_a_fault_was_found(folder: Path) -> None:
    code, stdout, stderr, _ = run(folder, "bad.yaml", "--debug")
    assert (code, stdout, stderr[0]) == (1, "", "Traceback (most recent call last):")
    assert stderr[-1] == 'deft_ray.errors.SpecError: bad.yaml:5: train.steps: must be a whole number (got "ten")'


def test_a_missing_spec(folder: Path) -> None:
    code, stdout, stderr, packages = run(folder, "no.yaml")
    assert (code, stdout, packages.intersection(HEAVY)) == (2, "", set())
    assert stderr == ["no.yaml: no such file; a spec is a YAML file such as search_spaces/quickstart.yaml"]


def test_a_wrong_option_is_a_usage_error(folder: Path) -> None:
    code, stdout, stderr, packages = run(folder, "spec.yaml", "--dry-run")
    assert (code, stdout, packages.intersection(HEAVY)) == (2, "", set())
    assert stderr[-1] == "python -m deft_ray.sweep: error: unrecognized arguments: --dry-run"
