"""The one place that imports MLflow: quietly, without telemetry, and impatient with a server that does not answer."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # retrying is the writer thread's business
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set before the import, and only where the user has not set them."""


def default_tracking(output: Path) -> tuple[str, str]:
    """Tracking URI and artifact root of an output folder: an SQLite file and a folder beside it.

    MLflow's plain file store is no choice: its current version refuses it.
    """
    output = Path(output).resolve()
    return f"sqlite:///{output / 'mlflow.db'}", (output / "mlartifacts").as_uri()


def connect(tracking_uri: str) -> Any:
    """An ``MlflowClient`` for the URI, touching none of MLflow's process-wide settings; an SQLite file is created."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside MLflow and below it
        from mlflow.tracking import MlflowClient

        for noisy in ("alembic", "mlflow"):  # after the import, which sets a level of its own
            logging.getLogger(noisy).setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=tracking_uri)
