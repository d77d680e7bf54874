"""The record of an ended trial and the file that holds them: the truth from which everything else is rebuilt.

One line of ``records.jsonl`` is one JSON object. A line is written by a single append and is final. A process killed in
the middle of that append leaves a torn last line: it is not a record, reading skips it and the next append removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from deft_ray.errors import RecordsError
from deft_ray.metrics import tau_key

Scalar = str | int | float | bool | None

#: In the name of a trial of front seeds: ``t0007-s2`` is the third seed of ``t0007``.
FRONT_SEED = "-s"

STATUSES = ("complete", "failed", "diverged", "pruned", "stopped")

REQUIRED = (
    "trial", "task", "seed", "baseline", "status", "score", "score_metric", "density", "density_encoder",
    "density_decoder", "density_paper", "density_at_tau", "density_layers", "config", "steps", "wall_s", "dtype",
    "activation", "versions",
)  # fmt: skip
"""Keys that every line must have, because other programs read them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one ended trial left.

    Args:
        trial: Name within the sweep, ``t0007``.
        task: Task it was trained and measured on.
        seed: Seed of data order, initialisation and dropout.
        baseline: Whether the density loss was off (alpha = 0).
        status: ``complete``, ``failed`` (an error), ``diverged`` (a non-finite loss), ``pruned`` (by the scheduler)
            or ``stopped`` (by the user).
        score: The task's own metric on the validation split, in [0, 1]; None if never measured.
        score_metric: Name of that metric.
        extra_scores: Further metrics of the task, such as SQuAD's exact match.
        density: Non-zero share of MLP activations, real tokens, exact zeros, all layers; in [0, 1].
        density_encoder: The same over the encoder alone.
        density_decoder: The same over the decoder alone, under teacher forcing; None where the model has none.
        density_decoder_generated: The same while the decoder writes its answers; None where nothing is generated.
        density_paper: The same with the padding of its batches counted; as the authors' code has it where
            ``data.padding`` is ``max_length``, else hardly another figure, as batches hold rows of like length.
        density_feature_map: Share of neurons that any real token of the split makes non-zero, the paper's "feature
            map"; None where no evaluation was the trial's last.
        density_at_tau: Share of activations with magnitude above tau, by tau.
        density_layers: Density of each layer, by layer name.
        dial: By threshold τ, 0 among them: score and density on the validation split with activations of magnitude of
            at most τ set to zero, and the same two on the calibration split, where the trial is complete; empty without
            the dial.
        setting: Name of the trial that has the same settings with the sweep's first seed; its own if empty.
        started_from: Name of the trial whose adapter it trained on, on a path; empty where it began with a fresh one.
        lambda_layers: ADA-DEFT's layer scale of each block, by layer name; empty without.
        approximation: Approximation of the density loss that was used: l0, tanh, sigmoid, l1 or l2.
        beta: β of tanh or sigmoid that was used; None for the others.
        config: The sampled and fixed settings, flat, dotted names.
        steps: Optimizer steps done.
        wall_s: From taking the trial to its last row.
        dtype: Compute dtype; exact zeros depend on it.
        activation: Activation function of the MLPs; exact zeros depend on it.
        versions: Version of each package that can move a number.
        cause: Traceback or reason of what was not ``complete``.
        warning: What the user should know of a trial that ran all the same.
        times: Where the time went: ``startup_s``, ``train_s``, ``eval_s``, ...
        trainable_share: Trainable parameters over all parameters.
        peak_memory_gib: Peak memory of the fullest worker since its base was last without a trial.
        packing: ``slots``, trials that its host took at once by then; ``passes`` of the trial's micro-batches, of
            them ``shared`` with other trials; of these ``part_s``, its part of their seconds, beside ``alone_s``, what
            they would have taken alone by what the host has learnt of passes, and ``tokens`` of its rows, beside the
            ``padding`` that they got as others were longer.
        host_memory_gib: What its host measured at the first step on a base that was free before: taken by the
            ``base`` before, by a trial at its longest (``slot``), and ``free`` beside the base; empty before that.
        adapter: URI or path of the saved adapter.
        started_at: Unix seconds.
        ended_at: Unix seconds.
        host: Name of the host that trained it.
    """

    trial: str
    task: str
    seed: int
    baseline: bool
    status: str
    score_metric: str
    dtype: str
    activation: str
    config: dict[str, Scalar] = field(default_factory=dict, hash=False)
    score: float | None = None
    extra_scores: dict[str, float] = field(default_factory=dict, hash=False)
    density: float | None = None
    density_encoder: float | None = None
    density_decoder: float | None = None
    density_decoder_generated: float | None = None
    density_paper: float | None = None
    density_feature_map: float | None = None
    density_at_tau: dict[str, float] = field(default_factory=dict, hash=False)
    density_layers: dict[str, float] = field(default_factory=dict, hash=False)
    dial: dict[str, dict[str, float]] = field(default_factory=dict, hash=False)
    setting: str = ""
    started_from: str = ""
    lambda_layers: dict[str, float] = field(default_factory=dict, hash=False)
    approximation: str = ""
    beta: float | None = None
    steps: int = 0
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict, hash=False)
    cause: str | None = None
    warning: str | None = None
    times: dict[str, float] = field(default_factory=dict, hash=False)
    trainable_share: float | None = None
    peak_memory_gib: float | None = None
    packing: dict[str, float] = field(default_factory=dict, hash=False)
    host_memory_gib: dict[str, float] = field(default_factory=dict, hash=False)
    adapter: str | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    host: str = ""

    @property
    def is_front_seed(self) -> bool:
        """Whether it is a further seed of a setting of the front, or of a baseline for one."""
        return FRONT_SEED in self.trial

    @property
    def measured(self) -> bool:
        """Whether it is complete and has a score and a density."""
        numbers = (self.score, self.density)
        return self.status == "complete" and all(value is not None and math.isfinite(value) for value in numbers)

    def at(self, tau: float) -> tuple[float | None, float | None]:
        """Score and density at a threshold; 0 is the trial as it was trained."""
        if tau == 0.0:
            return self.score, self.density
        found = self.dial.get(tau_key(tau), {})
        return found.get("score"), found.get("density")

    def to_json(self) -> str:
        """One line of JSON without its newline; NaN and infinities become null."""
        values = {name: _writable(getattr(self, name)) for name in _KINDS}
        return json.dumps(values, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read what :meth:`to_json` wrote, by this version of the program or by another.

        Args:
            line: One JSON object. Keys that this version does not know are left out.

        Raises:
            RecordsError: If it is not a JSON object, lacks a key of ``REQUIRED`` or holds a value of the wrong kind;
                all faults of the line in one message.
        """
        values = _parse(line)
        faults = [f"missing key '{name}'" for name in REQUIRED if name not in values]
        faults += [fault for name in _KINDS if name in values for fault in _faults(name, values[name])]
        if faults:
            raise RecordsError("; ".join(faults))
        return cls(**{name: _readable(name, values[name]) for name in _KINDS if name in values})


def lost_tasks(records: Iterable[Record]) -> set[str]:
    """Tasks that have lost a baseline, front seeds' aside: what they have is compared with nothing."""
    return {r.task for r in records if r.baseline and not r.is_front_seed and not r.measured}


class RecordLog:
    """A ``records.jsonl`` file with one writer.

    Args:
        path: The file; it and its folder come into being with the first append.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[str] = set()
        self._known_size = -1

    def read(self) -> list[Record]:
        """All records in the order in which their trials ended; none where there is no file.

        Raises:
            RecordsError: ``path:line: what``, for a line that is no record (a torn last line excepted) or a second
                record of one trial.
        """
        records, _ = self._read()
        return records

    def append(self, record: Record) -> None:
        """Add a record so that it survives a crash of the process or of the machine.

        Raises:
            RecordsError: If the trial already has a record, the record holds a value of the wrong kind, the file
                cannot be read, or the disk is full.
        """
        text = record.to_json()
        Record.from_json(text)  # what could not be read again must not be written
        line = (text + "\n").encode("utf-8")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        whole = self._whole_size()
        if record.trial in self._known:
            raise RecordsError(f"{self.path}: trial {record.trial} already has a record; a record is final")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.ftruncate(descriptor, whole)
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, whole)
                raise RecordsError(f"{self.path}: no room for the record of trial {record.trial} ({len(line)} bytes)")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(self.path.parent)
        self._known.add(record.trial)
        self._known_size = whole + len(line)

    def _whole_size(self) -> int:
        """Bytes up to the end of the last whole line; learns the trials of a file not yet seen in this state."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._known_size:
            records, size = self._read()
            self._known = {record.trial for record in records}
        return size

    def _read(self) -> tuple[list[Record], int]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise RecordsError(f"{self.path}: cannot be read: {error.strerror}") from error
        whole = content[: _whole_length(content)]
        records: list[Record] = []
        lines: dict[str, int] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            record = self._record(number, line)
            if record.trial in lines:
                first = lines[record.trial]
                raise RecordsError(f"{self.path}:{number}: trial {record.trial} already has a record on line {first}")
            lines[record.trial] = number
            records.append(record)
        return records, len(whole)

    def _record(self, number: int, line: bytes) -> Record:
        try:
            return Record.from_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordsError(f"{self.path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except RecordsError as error:
            raise RecordsError(f"{self.path}:{number}: {error}") from error


_KINDS = {item.name: str(item.type) for item in fields(Record)}
_NUMBER = (int, float)


def _parse(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecordsError(f"must be a JSON object (got {type(values).__name__})")
    return values


def _is_kind(value: Any, kind: str) -> bool:
    """Whether a JSON value can stand for a field annotated with ``kind``; null is a number that was not finite."""
    if kind.endswith(" | None"):
        return value is None or _is_kind(value, kind.removesuffix(" | None"))
    if kind == "dict[str, Scalar]":
        return isinstance(value, dict)
    if kind == "dict[str, dict[str, float]]":
        return isinstance(value, dict) and all(_is_kind(item, "dict[str, float]") for item in value.values())
    if kind.startswith("dict"):
        wanted = str if kind == "dict[str, str]" else _NUMBER
        return isinstance(value, dict) and all(item is None or isinstance(item, wanted) for item in value.values())
    if kind == "float":
        return value is None or (isinstance(value, _NUMBER) and not isinstance(value, bool))
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"str": str, "bool": bool}[kind])


def _faults(name: str, value: Any) -> list[str]:
    if not _is_kind(value, _KINDS[name]):
        return [f"'{name}' must be {_KINDS[name]} (got {json.dumps(value)[:80]})"]
    if name == "status" and value not in STATUSES:
        return [f"'status' must be one of {', '.join(STATUSES)} (got {json.dumps(value)[:80]})"]
    return []


def _readable(name: str, value: Any) -> Any:
    kind = _KINDS[name]
    if kind == "dict[str, dict[str, float]]":
        return {key: _readable_numbers(item) for key, item in value.items()}
    if kind in ("dict[str, float]", "dict[str, str]"):
        return _readable_numbers(value)
    if kind == "float":
        return math.nan if value is None else float(value)
    return float(value) if kind == "float | None" and value is not None else value


def _readable_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in values.items() if item is not None}


def _writable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _whole_length(content: bytes) -> int:
    """Length of ``content`` without its torn last line: one with no newline, or with one and no JSON in it."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        json.loads(content[start:end])
    except (ValueError, RecursionError):
        return start
    return end


def _sync_folder(folder: Path) -> None:
    """Make a new file's name as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
