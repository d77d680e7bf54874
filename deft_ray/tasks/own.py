"""Rows of a task in the user's own files: parquet, JSON lines or CSV, with columns named in the spec.

Every row is read as it stands and turned into the form of the known tasks; what cannot be turned keeps its value, so
that the check of the rows shows it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deft_ray.errors import SetupError
from deft_ray.spec.catalog import Task
from deft_ray.tasks.checks import Row, names_are_numbers, row_faults

_SPLITS = ("train", "validation")


def check_own_files(tasks: Iterable[Task]) -> None:
    """Read every row of both files of the own tasks among these.

    Raises:
        SetupError: With what is wrong in all of them.
    """
    faults = []
    for task in tasks:
        for split in _SPLITS if task.source == "own" else ():
            try:
                read_own_rows(task, split)
            except SetupError as error:
                faults.append(str(error))
    if faults:
        raise SetupError("\n".join(faults))


def read_own_rows(task: Task, split: str) -> list[Row]:
    """Read one file.

    Args:
        task: An own task.
        split: ``train`` or ``validation``.

    Returns:
        Rows with the task's columns and ``label``, or ``answers`` as SQuAD has them.

    Raises:
        SetupError: If the file cannot be read, lacks a column, holds no row, or rows that cannot be used.
    """
    file = Path(task.files[_SPLITS.index(split)])
    place = f"{file}: data.own.{task.name}.{split}"
    try:
        raw = _READERS[file.suffix](file, task.file_columns)
    except FileNotFoundError:
        raise SetupError(f"{place}: no such file") from None
    except (OSError, ValueError, csv.Error) as error:
        raise SetupError(f"{place}: {str(error).splitlines()[0]}") from None
    rows = [_to_row(task, values) for values in raw]
    faults = row_faults(task, rows)
    if faults:
        raise SetupError("\n".join(f"{place}: {fault}" for fault in faults))
    return rows


def _to_row(task: Task, values: list[Any]) -> Row:
    *texts, answer = values
    row = dict(zip(task.columns, texts, strict=True))
    return row | ({"answers": _to_answers(answer)} if task.kind == "question" else {"label": _to_label(task, answer)})


def _to_answers(value: Any) -> Any:
    """One answer, a list of them, or SQuAD's own form with the places."""
    if isinstance(value, dict):
        return value
    return {"text": [value] if isinstance(value, str) else value}


def _to_label(task: Task, value: Any) -> Any:
    """Class number or value; a label by name comes first, and numbers count only where no name is a number."""
    if task.kind == "regression":
        return _to_number(value)
    name = json.dumps(value) if isinstance(value, bool) else str(_whole(value))
    if name in task.labels:
        return task.labels.index(name)
    return name if names_are_numbers(task) else _whole(_to_number(value))


def _to_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_csv(file: Path, columns: tuple[str, ...]) -> list[list[Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = [line for line in csv.reader(stream, strict=True) if line]
    if not lines:
        raise ValueError("no rows")
    header, *body = lines
    places = [header.index(column) for column in _require(columns, header)]
    for number, line in enumerate(body, start=1):
        if len(line) != len(header):
            hint = "a text that holds a comma stands in quotes"
            raise ValueError(f"row {number}: has {len(line)} fields, the header {len(header)}; {hint}")
    return [[line[place] for place in places] for line in body]


def _read_jsonl(file: Path, columns: tuple[str, ...]) -> list[list[Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        rows = [_parse(line, number) for number, line in enumerate(stream, start=1) if line.strip()]
    known = dict.fromkeys(key for row in rows for key in row)
    _require(columns, known if rows else columns)
    return [[row.get(column) for column in columns] for row in rows]


def _parse(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: is no JSON object")
    return row


def _read_parquet(file: Path, columns: tuple[str, ...]) -> list[list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _require(columns, pq.read_schema(file).names)
        table = pq.read_table(file, columns=list(dict.fromkeys(columns)))
    except pa.ArrowException as error:
        raise ValueError(f"is no parquet file ({str(error).splitlines()[0]})") from None
    return [list(row) for row in zip(*(table[column].to_pylist() for column in columns), strict=True)]


def _require(columns: tuple[str, ...], there: Iterable[str]) -> tuple[str, ...]:
    have = list(there)
    lacking = [column for column in columns if column not in have]
    if lacking:
        raise ValueError(f"lacks the column {', '.join(lacking)}; has {', '.join(have)}")
    twice = [column for column in columns if have.count(column) > 1]
    if twice:
        raise ValueError(f"the column {', '.join(twice)} stands twice")
    return columns


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
