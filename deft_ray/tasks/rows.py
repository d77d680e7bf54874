"""Rows of a task: from the nano generator, a folder of parquet files or images, or the hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from deft_ray.errors import SetupError
from deft_ray.spec.catalog import TASKS, Task
from deft_ray.tasks.images import folder_faults, folder_rows

Row = dict[str, Any]

_HUB = {"glue": "nyu-mll/glue", "squad": "rajpurkar/squad", "cifar10": "uoft-cs/cifar10"}
_NANO_ROWS = {"train": 2000, "validation": 500}


def parquet_file(task: Task, split: str, folder: Path) -> Path:
    """Return where a task's split lies in a data folder: ``glue/sst2/train.parquet``, ``cifar10/test.parquet``."""
    place = folder / task.source / task.name if task.source == "glue" else folder / task.source
    return place / f"{split}.parquet"


def check_data_folder(tasks: list[str], folder: Path) -> None:
    """Check that every task has both splits with their columns.

    Raises:
        SetupError: Naming every file or column that is missing.
    """
    faults = []
    for task in (TASKS[name] for name in tasks):
        if task.source == "nano":
            continue
        if task.source == "images":
            faults += folder_faults(folder)
            continue
        for split in ("train", task.validation):
            file = parquet_file(task, split, folder)
            if not file.is_file():
                faults.append(f"{file}: data.dir: no such file; the task '{task.name}' needs this split")
                continue
            needed = [*task.columns, "answers" if task.kind == "question" else "label"]
            fault = _column_fault(file, needed)
            if fault is not None:
                faults.append(f"{file}: data.dir: {fault}; needs {', '.join(needed)}")
    if faults:
        raise SetupError("\n".join(faults))


def _column_fault(file: Path, needed: list[str]) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        return f"is no parquet file ({str(error).splitlines()[0]})"
    lacking = [column for column in needed if column not in names]
    return f"lacks the column {', '.join(lacking)}" if lacking else None


def load_rows(task_name: str, split: str, folder: str | None, limit: int | None) -> list[Row]:
    """Load one split.

    Args:
        task_name: Key of :data:`~deft_ray.spec.catalog.TASKS`.
        split: ``train`` or ``validation`` (the task's own validation split).
        folder: Data folder, or None for the hub; nano tasks need neither.
        limit: At most so many rows, the same ones every time; None for all (nano: 2,000 and 500).

    Raises:
        SetupError: If the split is not to be had, or holds rows without a label.
    """
    task = TASKS[task_name]
    if task.source == "nano":
        from deft_ray.nano.tasks import generate

        return generate(task_name, split, limit or _NANO_ROWS[split])
    name = task.validation if split == "validation" else split
    if task.source == "images" and folder is None:
        raise SetupError(f"{task_name}: needs data.dir, a folder that holds images/<split>/<class>/<file>")
    rows = _from_hub(task, name) if folder is None else _from_folder(task, name, Path(folder))
    if limit is not None and limit < len(rows):
        rows = random.Random(f"{task_name} {split}").sample(rows, limit)
    if any(_lacks_answer(task, row) for row in rows):
        what = "an answer" if task.kind == "question" else "a label (label -1)"
        raise SetupError(f"{task_name}: {split}: rows without {what}; needs a labelled split")
    if not rows:
        raise SetupError(f"{task_name}: {split}: no rows")
    return rows


def _lacks_answer(task: Task, row: Row) -> bool:
    if task.kind == "question":
        return not row["answers"]["text"]
    if task.source == "images":
        return False
    highest = 5 if task.kind == "regression" else len(task.labels) - 1
    return not 0 <= row["label"] <= highest


def _from_folder(task: Task, split: str, folder: Path) -> list[Row]:
    import pyarrow.parquet as pq

    if task.source == "images":
        return folder_rows(folder, split)
    file = parquet_file(task, split, folder)
    if not file.is_file():
        raise SetupError(f"{file}: no such file; the task '{task.name}' needs this split")
    rows: list[Row] = pq.read_table(file).to_pylist()
    return rows


def _from_hub(task: Task, split: str) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    name = task.name if task.source == "glue" else None
    try:
        rows = datasets.load_dataset(_HUB[task.source], name, split=split)
        if task.kind == "image":
            rows = rows.cast_column(task.columns[0], datasets.Image(decode=False))
        return list(rows)
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{task.name}: the data set {_HUB[task.source]} cannot be had from the hub ({error}); "
            "give a folder of parquet files with data.dir"
        ) from error
