"""Rows of a task: from the nano generator, a folder of parquet files or images, the user's own files, or the hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from deft_ray.errors import SetupError
from deft_ray.spec.catalog import Task
from deft_ray.spec.schema import SweepSpec
from deft_ray.tasks.checks import Row, row_faults
from deft_ray.tasks.images import folder_faults, folder_rows
from deft_ray.tasks.own import read_own_rows

_HUB = {"glue": "nyu-mll/glue", "squad": "rajpurkar/squad", "cifar10": "uoft-cs/cifar10"}
_NANO_ROWS = {"train": 2000, "validation": 500}


def parquet_file(task: Task, split: str, folder: Path) -> Path:
    """Return where a task's split lies in a data folder: ``glue/sst2/train.parquet``, ``cifar10/test.parquet``."""
    place = folder / task.source / task.name if task.source == "glue" else folder / task.source
    return place / f"{split}.parquet"


def check_data_folder(tasks: Iterable[Task], folder: Path) -> None:
    """Check that every task that lies in a data folder has both splits, with their columns and some rows.

    Raises:
        SetupError: Naming every file or column that is missing.
    """
    faults = []
    for task in tasks:
        if task.source in ("nano", "own"):
            continue
        if task.source == "images":
            faults += folder_faults(folder)
            continue
        needed = _needed(task)
        for split in ("train", task.validation, *(split for _, split in task.beside)):
            file = parquet_file(task, split, folder)
            if not file.is_file():
                if split in ("train", task.validation):
                    faults.append(f"{file}: data.dir: no such file; the task '{task.name}' needs this split")
                continue
            fault = _file_fault(file, needed)
            if fault is not None:
                faults.append(f"{file}: data.dir: {fault}; needs {', '.join(needed)}")
    if faults:
        raise SetupError("\n".join(faults))


def check_calibration(spec: SweepSpec, tasks: Sequence[Task]) -> None:
    """Check that each task has more training rows than the dial holds out, where they can be counted before the start.

    Raises:
        SetupError: With every task that has too few.
    """
    count = spec.dial.calibration_examples if spec.dial.taus else 0
    faults = []
    for task in tasks if count else ():
        try:
            rows = _count_training_rows(task, spec.data.dir)
        except (SetupError, OSError, ValueError):
            continue  # whoever checks the files says what is wrong with them
        if rows is not None and count >= rows:
            faults.append(f"{task.name}: {_too_few(count, rows)}")
    if faults:
        raise SetupError("\n".join(faults))


def _count_training_rows(task: Task, folder: str | None) -> int | None:
    """Rows of the training split; None where only the hub knows."""
    import pyarrow.parquet as pq

    if task.source == "nano":
        return _NANO_ROWS["train"]
    if task.source == "own":
        return len(read_own_rows(task, "train"))
    if folder is None:
        return None
    if task.source == "images":
        return len(folder_rows(Path(folder), "train"))
    rows: int = pq.read_metadata(parquet_file(task, "train", Path(folder))).num_rows
    return rows


def _too_few(count: int, rows: int) -> str:
    return f"dial.calibration_examples must be below the {rows} training rows (got {count})"


def _needed(task: Task) -> list[str]:
    return [*task.columns, "answers" if task.kind == "question" else "label"]


def _file_fault(file: Path, needed: list[str]) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        return f"is no parquet file ({str(error).splitlines()[0]})"
    fault = _column_fault(meta.schema.to_arrow_schema().names, needed)
    return fault or ("no rows" if meta.num_rows == 0 else None)


def _column_fault(names: Iterable[str], needed: list[str]) -> str | None:
    have = set(names)
    lacking = [column for column in needed if column not in have]
    return f"lacks the column {', '.join(lacking)}" if lacking else None


def load_rows(task: Task, split: str, folder: str | None, limit: int | None) -> list[Row]:
    """Load one split.

    Args:
        task: The task.
        split: ``train``, ``validation`` (the task's own validation split), or one of ``task.beside``.
        folder: Data folder, or None for the hub; nano and own tasks need neither.
        limit: At most so many rows, the same ones every time; None for all (nano: 2,000 and 500).

    Raises:
        SetupError: If the split is not to be had, is empty, lacks a column, or holds rows that cannot be used.
    """
    if task.source == "nano":
        from deft_ray.nano.tasks import generate

        return generate(task.name, split, limit or _NANO_ROWS[split])
    if task.source == "own":
        rows = read_own_rows(task, split)
    elif task.source == "images" and folder is None:
        raise SetupError(f"{task.name}: needs data.dir, a folder that holds images/<split>/<class>/<file>")
    else:
        name = task.validation if split == "validation" else split
        rows = _from_hub(task, name) if folder is None else _from_folder(task, name, Path(folder))
        _check(task, split, rows)
    if limit is not None and limit < len(rows):
        rows = random.Random(f"{task.name} {split}").sample(rows, limit)
    return rows


def hold_out(task: Task, rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Cut a calibration split out of the training rows, the same one every time.

    Args:
        task: The task.
        rows: Training rows.
        count: Rows of the calibration split.

    Returns:
        The rows that are left, and the calibration split, both in their order.

    Raises:
        SetupError: If nothing would be left to train on.
    """
    if count >= len(rows):
        raise SetupError(f"{task.name}: {_too_few(count, len(rows))}")
    chosen = set(random.Random(f"{task.name} calibration").sample(range(len(rows)), count))
    left = [row for index, row in enumerate(rows) if index not in chosen]
    return left, [rows[index] for index in sorted(chosen)]


def load_beside(task: Task, folder: str | None, limit: int | None) -> dict[str, list[Row]]:
    """Load the splits that are scored beside the score, by suffix; one that a folder does not have is left out."""
    return {
        suffix: load_rows(task, split, folder, limit)
        for suffix, split in task.beside
        if folder is None or parquet_file(task, split, Path(folder)).is_file()
    }


def _check(task: Task, split: str, rows: list[Row]) -> None:
    needed = _needed(task)
    lacking = _column_fault(rows[0], needed) if rows else None
    faults = [f"{lacking}; needs {', '.join(needed)}"] if lacking else row_faults(task, rows)
    if faults:
        raise SetupError("\n".join(f"{task.name}: {split}: {fault}" for fault in faults))


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
