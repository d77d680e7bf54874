"""Tokenised tasks in memory-mapped Arrow files, one for all workers of a sweep on a node.

Whoever needs a task first tokenises it and writes the file, the others wait and map it: the tokens are in memory once,
and are read where a batch needs them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from deft_ray.spec.catalog import Task
from deft_ray.tasks.encoding import EncodedTask, Example

_log = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("target_ids", pa.list_(pa.int32())),
        ("type_ids", pa.list_(pa.int32())),
        ("label", pa.float64()),
        ("answers", pa.list_(pa.string())),
        ("row", pa.int32()),
        ("windows", pa.int32()),
    ]
)
#: Rows that are turned into columns at once when a file is written.
_CHUNK = 4096


class KeptTasks:
    """The tokenised tasks of a sweep on this node.

    Args:
        folder: Of this sweep alone, on a disk of this node; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str, task: Task, encode: Callable[[], EncodedTask]) -> EncodedTask:
        """Return a task, mapped from its file; tokenise it and write the file if nobody has.

        Args:
            key: Says what was tokenised, and how.
            task: The task.
            encode: Tokenises it. What it raises is raised, and nothing is kept.

        Returns:
            The task. As ``encode`` has made it where it is of images, or where the folder cannot be written.
        """
        if self.folder is None:
            return encode()
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _only_one(file.with_suffix(".lock")):
                if not file.is_file():
                    encoded = encode()
                    if any(example.picture is not None for example in encoded.train[:1]):
                        return encoded
                    return self._kept(file, encoded)
        except OSError as error:
            _log.warning("%s: tokens are not shared: %s", self.folder, error)
            return encode()
        return _read(file, task)

    @staticmethod
    def _kept(file: Path, encoded: EncodedTask) -> EncodedTask:
        try:
            _write(file, encoded)
            return _read(file, encoded.task)
        except OSError as error:
            _log.warning("%s: tokens are not shared: %s", file, error)
            return encoded


class KeptExamples(Sequence[Example]):
    """Examples of a split that are made from a mapped file when they are asked for.

    Args:
        batch: The file's rows.
        start: First row of the split.
        stop: The row behind its last.
    """

    def __init__(self, batch: pa.RecordBatch, start: int, stop: int) -> None:
        self._start, self._count, self._answers = start, stop - start, batch.column("answers")
        self._lists = {name: _Lists(batch.column(name)) for name in ("input_ids", "target_ids", "type_ids")}
        self._numbers = {name: batch.column(name).to_numpy() for name in ("label", "row", "windows")}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(f"no example {place} of {self._count}")
        at = self._start + place % self._count
        return Example(
            input_ids=self._lists["input_ids"].at(at),
            target_ids=self._lists["target_ids"].at(at),
            label=float(self._numbers["label"][at]),
            answers=tuple(self._answers[at].as_py()),
            type_ids=tuple(self._lists["type_ids"].at(at)),
            row=int(self._numbers["row"][at]),
            windows=int(self._numbers["windows"][at]),
        )

    @property
    def labels(self) -> list[float]:
        """Label of each example."""
        return self._numbers["label"][self._start : self._start + self._count].tolist()

    def lengths(self, name: str) -> list[int]:
        """Tokens of each example's ``input_ids`` or ``target_ids``, without reading them."""
        return self._lists[name].lengths[self._start : self._start + self._count].tolist()


class _Lists:
    """A column of lists of numbers."""

    def __init__(self, column: Any) -> None:
        self._offsets, self._values = column.offsets.to_numpy(), column.values.to_numpy()

    def at(self, row: int) -> list[int]:
        return self._values[self._offsets[row] : self._offsets[row + 1]].tolist()

    @property
    def lengths(self) -> Any:
        return np.diff(self._offsets)


def source_lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens that the model reads of each example."""
    if isinstance(examples, KeptExamples):
        return examples.lengths("input_ids")
    return [example.source_tokens for example in examples]


def target_lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example's answer."""
    if isinstance(examples, KeptExamples):
        return examples.lengths("target_ids")
    return [len(example.target_ids) for example in examples]


def labels_of(examples: Sequence[Example]) -> list[float]:
    """Label of each example."""
    return examples.labels if isinstance(examples, KeptExamples) else [example.label for example in examples]


def _write(file: Path, encoded: EncodedTask) -> None:
    """Write all splits, one behind the other; the file is there whole or not at all."""
    splits = {"train": encoded.train, "validation": encoded.validation, "calibration": encoded.calibration}
    splits |= {f"beside {suffix}": examples for suffix, examples in encoded.beside.items()}
    told = {
        "splits": [[name, len(examples)] for name, examples in splits.items()],
        "candidates": encoded.candidates,
        "values": encoded.values,
    }
    schema = _SCHEMA.with_metadata({"told": json.dumps(told)})
    batch = pa.concat_batches([_columns(part, schema) for part in _parts(chain.from_iterable(splits.values()))])
    aside = file.with_suffix(f".{os.getpid()}")
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _parts(examples: Iterable[Example]) -> Iterator[list[Example]]:
    part: list[Example] = []
    for example in examples:
        part.append(example)
        if len(part) == _CHUNK:
            yield part
            part = []
    yield part


def _columns(examples: list[Example], schema: pa.Schema) -> pa.RecordBatch:
    columns = {name: [getattr(example, name) for example in examples] for name in schema.names}
    return pa.record_batch([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def _read(file: Path, task: Task) -> EncodedTask:
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    batch, told = reader.get_batch(0), json.loads(reader.schema.metadata[b"told"])
    splits, start = dict[str, KeptExamples](), 0
    for name, count in told["splits"]:
        splits[name] = KeptExamples(batch, start, start + count)
        start += count
    return EncodedTask(
        task=task,
        train=splits.pop("train"),
        validation=splits.pop("validation"),
        calibration=splits.pop("calibration"),
        candidates=told["candidates"],
        values=told["values"],
        beside={name.removeprefix("beside "): examples for name, examples in splits.items()},
    )


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    """Let one process of this node in at a time; one that dies inside makes room."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
