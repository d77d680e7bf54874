"""The one place that imports MLflow: quietly, without telemetry, and impatient with a server that does not answer."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

_SQLITE = "sqlite:///"

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
    return f"{_SQLITE}{output / 'mlflow.db'}", (output / "mlartifacts").as_uri()


def connect(tracking_uri: str) -> Any:
    """An ``MlflowClient`` for the URI, touching none of MLflow's process-wide settings; an SQLite file is created."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside MLflow and below it
        from mlflow.tracking import MlflowClient

        for noisy in ("alembic", "mlflow"):  # after the import, which sets a level of its own
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if tracking_uri.startswith(_SQLITE) and "?" not in tracking_uri:
            _create_database(Path(tracking_uri.removeprefix(_SQLITE)), MlflowClient)
        return MlflowClient(tracking_uri=tracking_uri)


def _create_database(file: Path, client: Any) -> None:
    """Let MLflow create an SQLite file that is not there yet: whole, or not at all.

    Its dozens of tables take a second, and a process that is killed meanwhile would leave a file that MLflow can
    neither use nor mend.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        aside = Path(folder) / file.name
        client(tracking_uri=f"{_SQLITE}{aside}").search_experiments(max_results=1)
        try:
            os.link(aside, file)
        except FileExistsError:
            pass  # another process was first
        except OSError:  # a file system without links
            os.replace(aside, file)
