"""The host loop: one frozen base, one trial after another, until there are no more.

Runs on every worker of a host alike. Rank 0 takes trials from an inbox and sends rows back; what the inbox is (the
sweep's dispatcher, a list in a test) this room does not know.
"""

from __future__ import annotations

import gc
import hashlib
import platform
import resource
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from deft_ray.models.base import Base
from deft_ray.spec.catalog import find_task
from deft_ray.spec.schema import DataSection, TrialSpec
from deft_ray.tasks.encoding import EncodedTask, encode_images, encode_task
from deft_ray.tasks.images import class_names
from deft_ray.tasks.rows import hold_out, load_beside, load_rows
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from deft_ray.train.storage import TrialStorage

#: Rows with training losses per trial, about.
TRAIN_ROWS = 20

_PACKAGES = ("bitsandbytes", "deepspeed", "peft", "ray", "torch", "transformers")


class Inbox(Protocol):
    """Where trials come from and rows go to."""

    attempt: int
    """Of the running trial; counts how often it was started."""

    def next_trial(self) -> TrialSpec | str:
        """Wait a while for a trial: ``wait`` if there is none yet, ``closed`` ends the host. Asked on rank 0 only."""

    def follow(self, trial: str, attempt: int) -> None:
        """Tell a rank that did not ask which trial runs."""

    def stop_requested(self) -> bool:
        """Tell at once whether the running trial is to stop. Asked on rank 0 only."""

    def send(self, row: dict[str, Any]) -> None:
        """Send a row of the running trial; called on rank 0, and by a rank that fails alone."""


@dataclass
class _Clock:
    """Seconds by purpose, carried over a resume."""

    startup_s: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0


class Host:
    """Serves trials on one base.

    Args:
        base: Loaded base.
        ranks: The host's workers.
        inbox: See :class:`Inbox`.
        checkpoints: Folder or URI of all trials' checkpoints.
        name: Name of the host in records.
    """

    def __init__(self, base: Base, ranks: Ranks, inbox: Inbox, checkpoints: str, name: str) -> None:
        self.base, self.ranks, self.inbox, self.checkpoints, self.name = base, ranks, inbox, checkpoints, name
        self._tasks: dict[str, EncodedTask] = {}

    def serve(self) -> None:
        """Take trials until the inbox has no more."""
        gc.collect()
        gc.freeze()  # the libraries' objects stay: not walking over them saves 0.3 s after every trial
        while True:
            trial = self.inbox.next_trial() if self.ranks.leads else ""
            trial, attempt = self.ranks.share((trial, self.inbox.attempt))
            if trial == "closed":
                return
            if isinstance(trial, TrialSpec):
                self.inbox.follow(trial.trial, attempt)
                self.run(trial)

    def run(self, trial: TrialSpec) -> None:
        """Run one trial to its last row, whatever becomes of it.

        Raises:
            Exception: The trial's own, where it failed on some workers only: the group has to be started anew.
        """
        started = time.time()
        try:
            self._run(trial, started)
        except Exception as error:
            cause = traceback.format_exc()
            alone = not self.ranks.all_failed()
            if self.ranks.leads or alone:
                status = "diverged" if isinstance(error, FloatingPointError) else "failed"
                self.inbox.send(_end_row(status, started, cause=cause))
            if alone:
                raise
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, trial: TrialSpec, started: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        storage = TrialStorage(self.checkpoints, trial.trial, fingerprint(trial))
        with ExitStack() as fetched:
            fresh = self.ranks.share(self.ranks.leads and storage.latest() is None)
            start = fetched.enter_context(storage.adapter_of(trial.start_from)) if trial.start_from and fresh else None
            slot = Slot(trial, self.base, self._task(trial), self.ranks, start)
        try:
            _Run(self, trial, slot, storage, started).to_end()
        finally:
            slot.close()

    def _task(self, trial: TrialSpec) -> EncodedTask:
        calibration = trial.dial.calibration_examples if trial.dial.taus else 0
        key = f"{trial.task} {calibration} {trial.data.model_dump_json()}"
        if key not in self._tasks:
            self._tasks[key] = load_task(trial.task, trial.data, self.base, calibration)
        return self._tasks[key]


def load_task(name: str, data: DataSection, base: Base, calibration: int = 0) -> EncodedTask:
    """Load and tokenise a task's splits, or make pictures of them.

    Args:
        name: Of the task.
        data: Where its rows are, and how long they may be.
        base: Whose tokens.
        calibration: Rows to hold out from training.

    Raises:
        SetupError: If the rows cannot be had or used.
    """
    task = find_task(name, data)
    train = load_rows(task, "train", data.dir, data.train_examples)
    train, held_out = hold_out(task, train, calibration) if calibration else (train, [])
    validation = load_rows(task, "validation", data.dir, data.validation_examples)
    if base.family.images:
        known = task if task.labels else replace(task, labels=class_names(Path(str(data.dir))))
        return encode_images(known, train, validation, base.image_processor, base.image_tokens, held_out)
    return encode_task(
        task,
        train,
        validation,
        base.tokenizer,
        text_to_text=base.family.text_to_text,
        max_source_tokens=data.max_source_tokens,
        max_target_tokens=data.max_target_tokens,
        window_overlap_tokens=data.window_overlap_tokens,
        beside=load_beside(task, data.dir, data.validation_examples),
        calibration=held_out,
    )


class _Run:
    """One trial on its way from the first step to the last row."""

    def __init__(self, host: Host, trial: TrialSpec, slot: Slot, storage: TrialStorage, started: float) -> None:
        self.host, self.trial, self.slot, self.storage, self.started = host, trial, slot, storage, started
        self.ranks, self.inbox = host.ranks, host.inbox
        self.clock = _Clock()
        self.evaluated: dict[str, Any] = {}
        self.predictions: dict[str, list[float]] = {}
        self.rungs = rung_steps(self.slot.steps, trial.rungs)
        self.judged: list[dict[str, Any]] = []
        """The rows of the rungs so far."""

    def to_end(self) -> None:
        self._resume()
        evaluations = evaluation_steps(self.slot.steps, self.trial.train.evaluations) | self.rungs.keys()
        report_every = max(1, self.slot.steps // TRAIN_ROWS)
        saved = time.monotonic()
        self.clock.startup_s += time.time() - self.started
        while self.slot.done < self.slot.steps:
            stop = self._step(measure=(self.slot.done + 1) % report_every == 0)
            if stop:
                self._end("stopped")
                return
            if self.slot.done in evaluations:
                self._evaluate()
            if self.ranks.share(time.monotonic() - saved >= self.trial.train.checkpoint_every_s):
                self._save()
                saved = time.monotonic()
        self._end("complete")

    def _resume(self) -> None:
        latest = self.ranks.share(self.storage.latest() if self.ranks.leads else None)
        if latest is not None:
            self.storage.load(latest["step"], self.slot.load)
            self.clock = _Clock(**latest["clock"])
            self.evaluated, self.judged = latest["evaluated"], latest.get("rung_rows", [])
            self.predictions = latest.get("predictions", {})
            for row in self.judged if self.ranks.leads else ():
                self.inbox.send(row)  # whoever judges it may have been killed before he could, or before he acted

    def _step(self, measure: bool) -> bool:
        """Train one step; True if the trial is to stop. Raises FloatingPointError on every rank if one diverged."""
        began = time.monotonic()
        result = self.slot.step(measure)
        finite = torch.isfinite(torch.tensor(result.task_loss)).item()
        stop = self.ranks.leads and self.inbox.stop_requested()
        diverged, stop = map(bool, self.ranks.maximum(int(not finite), int(stop)))
        self.clock.train_s += time.monotonic() - began
        if diverged:
            raise FloatingPointError(f"the loss is not finite at step {self.slot.done}")
        if measure:
            assert result.density_loss is not None
            assert result.penalty is not None
            sums = self.ranks.total(torch.tensor([result.task_loss, result.density_loss, result.penalty]))
            task_loss, density_loss, penalty = (float(value) for value in sums)
            self._send(
                "train",
                loss=task_loss + penalty,
                task_loss=task_loss,
                density_loss=density_loss,
                learning_rate=result.learning_rate,
            )
        return stop

    def _evaluate(self) -> None:
        began = time.monotonic()
        found = self.slot.evaluate(self._taus(), last=self.slot.done == self.slot.steps)
        self.evaluated, self.predictions = found.row(), found.predictions
        self.clock.eval_s += time.monotonic() - began
        rung = self.rungs.get(self.slot.done)
        if rung is None:
            self._send("eval", **self.evaluated)
        else:  # it may be the trial's last row, so it has all that a record asks for
            self.judged.append(self._send("eval", **self.evaluated, **self._facts(), rung=rung))

    def _taus(self) -> list[float]:
        """Thresholds of this evaluation: all in the last one, in others those that the scheduler judges by."""
        if self.slot.done == self.slot.steps:
            return self.trial.dial.taus
        judged_at = 0.0 if self.trial.baseline else self.trial.judged_at
        return [judged_at] if judged_at else []

    def _save(self) -> None:
        began = time.monotonic()
        meta = {
            "clock": vars(self.clock),
            "evaluated": self.evaluated,
            "rung_rows": self.judged,
            "predictions": self.predictions,
        }
        self.storage.save(self.slot.done, self.slot.save, meta, self.ranks)
        self.clock.save_s += time.monotonic() - began

    def _end(self, status: str) -> None:
        peak = max(self.ranks.gather(peak_memory_gib()))
        adapter, lambdas = None, dict[str, float]()
        with self.slot.whole():
            if self.ranks.leads:
                lambdas = self.slot.lambdas()
            if self.ranks.leads and status == "complete":
                adapter = self.storage.publish_adapter(self.slot.save_adapter)
        if self.ranks.leads:
            self.inbox.send(
                _end_row(
                    status,
                    self.started,
                    **self.evaluated,
                    **self._facts(),
                    adapter=adapter,
                    predictions=self.predictions,
                    lambda_layers=lambdas,
                    peak_memory_gib=peak,
                )
            )
        self.ranks.barrier()

    def _facts(self) -> dict[str, Any]:
        """Fields of a record that are known at any step."""
        return {
            "steps": self.slot.done,
            "dtype": self.host.base.dtype,
            "activation": self.slot.activation,
            "approximation": self.slot.kind,
            "warning": self.slot.warning,
            "trainable_share": self.slot.trainable_share,
            "times": dict(vars(self.clock)),
            "host": self.host.name,
            "versions": versions(),
            "started_at": self.started,
        }

    def _send(self, kind: str, **fields: Any) -> dict[str, Any]:
        row = {"kind": kind, "step": self.slot.done, "time": time.time(), **fields}
        if self.ranks.leads:
            self.inbox.send(row)
        return row


def _end_row(status: str, started: float, **fields: Any) -> dict[str, Any]:
    now = time.time()
    times = {"started_at": started, "ended_at": now, "wall_s": now - started}
    return {"kind": "end", "time": now, "status": status, "versions": versions(), **times, **fields}


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which a trial is evaluated: evenly spread, the last one always."""
    count = min(evaluations, steps)
    return {round(steps * (index + 1) / count) for index in range(count)}


def rung_steps(steps: int, shares: Sequence[float]) -> dict[int, int]:
    """Return the rung at each step after which the scheduler judges a trial of so many; never at the last step.

    >>> rung_steps(90, (1 / 9, 1 / 3)), rung_steps(2, (1 / 9, 1 / 3))
    ({10: 0, 30: 1}, {1: 1})
    """
    found = {max(1, round(share * steps)): rung for rung, share in enumerate(shares)}
    return {step: rung for step, rung in found.items() if step < steps}


def fingerprint(trial: TrialSpec) -> str:
    """Identify a trial's configuration, so that a checkpoint of another is never loaded."""
    return hashlib.sha256(trial.model_dump_json().encode()).hexdigest()[:16]


def peak_memory_gib() -> float:
    """Peak memory: of the GPU in this trial, or of this process since it started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@lru_cache
def versions() -> dict[str, str]:
    """Versions of what computes, as they stand in records."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
