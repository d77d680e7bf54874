"""Run a sweep through the command, or the rest of one that was stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_sweep(spec: str, output: Path, settings: Mapping[str, object]) -> None:
    """Run a sweep to its end; one that lies there already is continued.

    Args:
        spec: The spec's path from the project's root.
        output: Run directory.
        settings: Leaves to set, by dotted name.
    """
    command = [sys.executable, "-m", "deft_ray.sweep", spec, "--output", str(output)]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    subprocess.run([*command, *(["--resume"] if output.exists() else [])], check=True, cwd=ROOT)
