"""Run the real command in a process of its own, and read what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900.0


def command(spec: Path, output: Path, *arguments: str) -> list[str]:
    """Return the command line of a sweep."""
    return [sys.executable, "-m", "deft_ray.sweep", str(spec), "--output", str(output), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """Return an environment without a network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}


def sweep(spec: Path, output: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep to its end."""
    return subprocess.run(
        command(spec, output, *arguments),
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def start(spec: Path, output: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a sweep that hears Ctrl-C, even where these tests run in the background of a shell and do not."""
    return subprocess.Popen(
        command(spec, output, *arguments),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to the driver alone; return its exit code and output."""
    process.send_signal(number)
    text, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, text


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until something is true while a sweep runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def records(output: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run directory's records."""
    file = output / "records.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def mlflow_runs(output: Path, experiment: str = "deft_ray") -> tuple[list[Any], list[Any]]:
    """Return a run directory's parent and nested MLflow runs, read with MLflow's own client."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in nested], nested
