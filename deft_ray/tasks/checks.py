"""What makes a row usable: texts to read, and a label or an answer to learn.

A fault names the row, from 1, and what stands there; of many alike only the first few are told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from deft_ray.spec.catalog import Task

Row = dict[str, Any]

#: Of STS-B; the lowest is 0.
HIGHEST_SIMILARITY = 5

_MOST_TOLD = 3


def row_faults(task: Task, rows: Sequence[Row]) -> list[str]:
    """Say what is wrong with the rows of a split.

    Args:
        task: The task.
        rows: All of them; each has the task's columns and its label or answers.

    Returns:
        One line for each of the first few rows that cannot be used, and one for the rest; empty where all is well.
    """
    if not rows:
        return ["no rows"]
    found = [f"row {number}: {fault}" for number, row in enumerate(rows, start=1) for fault in _faults(task, row)]
    more = len(found) - _MOST_TOLD
    return [*found[:_MOST_TOLD], *([f"{more} more rows that cannot be used"] if more > 0 else [])]


def _faults(task: Task, row: Row) -> Iterator[str]:
    """The first fault of a row, if it has one; whether an image is one, its opening tells."""
    if task.kind == "image":
        if task.labels:  # a folder's classes are its own
            yield from _label_faults(task, row["label"])
        return
    no_texts = [column for column in task.columns if not isinstance(row[column], str)]
    empty = [column for column in task.columns if column not in no_texts and not row[column].strip()]
    if no_texts:
        yield f"the {no_texts[0]} must be a text (got {_show(row[no_texts[0]])})"
    elif empty and (task.kind == "question" or len(empty) == len(task.columns)):
        yield f"the {' and the '.join(empty)} must not be empty"
    elif task.kind == "question":
        yield from _answer_faults(row["answers"])
    else:
        yield from _label_faults(task, row["label"])


def _answer_faults(answers: Any) -> Iterator[str]:
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts:
        yield f"no answer (got {_show(texts)}); needs a text or a list of texts"
        return
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            yield f"an answer must be a text that is not empty (got {_show(text)})"
            return


def _label_faults(task: Task, label: Any) -> Iterator[str]:
    own = task.source == "own"
    if label == -1 and not own:
        yield "no label (label -1); needs a labelled split"
    elif task.kind == "regression":
        number = isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)
        if not number or not (own or 0 <= label <= HIGHEST_SIMILARITY):
            allowed = "any finite number" if own else f"0 to {HIGHEST_SIMILARITY}"
            yield f"unknown label (got {_show(label)}); allowed: {allowed}"
    elif type(label) is not int or not 0 <= label < len(task.labels):
        numbers = "" if names_are_numbers(task) else f", or 0 to {len(task.labels) - 1}"
        yield f"unknown label (got {_show(label)}); allowed: {', '.join(task.labels)}{numbers}"


def names_are_numbers(task: Task) -> bool:
    """Tell whether a class is named by a number, so that a number in a file of one's own can only be a name."""
    return any(re.fullmatch(r"[-+]?\d+", label) for label in task.labels)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
