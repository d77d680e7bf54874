"""What a trial's model said of each validation example, as a small Parquet file: what paired tests are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from deft_ray.errors import RecordsError
from deft_ray.results.files import write_aside

#: Folder of the files in a run directory.
FOLDER = "predictions"
#: Column of the true classes or values; questions have none.
LABEL = "label"

#: By column: ``label``, and the threshold τ (``0`` for exact zeros) at which the rest was said. Classes, values, or of
#: questions the F1 of each answer; one per validation example, in the order of the split.
Predictions = Mapping[str, Sequence[float]]


def write_predictions(run_dir: Path, trial: str, predictions: Predictions) -> Path:
    """Keep a trial's predictions, all of them or none.

    Args:
        run_dir: The run directory.
        trial: Name of the trial.
        predictions: Columns of one length.

    Returns:
        The file.
    """
    table = pa.table({name: np.asarray(column, dtype=np.float64) for name, column in predictions.items()})
    return write_aside(file_of(run_dir, trial), lambda aside: parquet.write_table(table, aside, compression="zstd"))


def read_predictions(run_dir: Path, trial: str) -> dict[str, np.ndarray]:
    """Return a trial's predictions by column, (n,) float64 each; none if they were not kept.

    Raises:
        RecordsError: If the file cannot be read.
    """
    file = file_of(run_dir, trial)
    if not file.is_file():
        return {}
    try:
        table = parquet.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RecordsError(f"{file}: cannot be read: {error}") from error
    return {name: table.column(name).to_numpy() for name in table.column_names}


def file_of(run_dir: Path, trial: str) -> Path:
    """The file of a trial's predictions."""
    return Path(run_dir) / FOLDER / f"{trial}.parquet"
