"""Store a benchmark's figures as JSON with the machine, the commit and the versions they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "bitsandbytes", "deepspeed", "moocore", "optuna", "peft", "ray", "scipy", "syne-tune", "torch", "transformers",
)  # fmt: skip


def summary(values: list[float]) -> dict[str, float | int]:
    """Return median, quartiles, extremes and count."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[2],
        "least": min(values),
        "most": max(values),
        "count": len(values),
    }


def store(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` and print it."""
    content = {
        "benchmark": name,
        "command": " ".join(["python", *("FOLDER" if word.startswith("/") else word for word in sys.argv)]),
        **origin(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps(content, indent=2) + "\n"
    file.write_text(text)
    print(text)
    return file


def origin() -> dict[str, Any]:
    """When, of what commit and on what machine something is measured."""
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), "gpu": _gpu()}
    return {"at": time.strftime("%Y-%m-%d", time.gmtime()), "commit": head(), "machine": machine}


def machine_line(measured: dict[str, Any]) -> str:
    """Say on what machine and when something was measured; see :func:`origin`."""
    machine = measured["machine"]
    gpu = machine["gpu"] or "no GPU"
    return (
        f"{machine['cores']} CPU cores ({machine['cpu']}), {machine['memory_gib']} GiB, {gpu}; "
        f"measured {measured['at']}."
    )


def head() -> str:
    """The commit that is measured; with a plus where the product differs from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "deft_ray") else "")


def _git(*arguments: str) -> str:
    """What git says; nothing outside a clone."""
    root = Path(__file__).parent.parent
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
