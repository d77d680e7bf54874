"""The course of one trial, from its first step to its last row.

A course is a generator that pauses at each pass of the model it wants, so that the host can put the passes of several
trials together.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from deft_ray.spec.resolve import rung_places
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.slot import Packed, Slot, StepResult
from deft_ray.train.storage import TrialStorage

if TYPE_CHECKING:
    from deft_ray.train.host import Host, Taken

#: Rows with training losses per trial, about.
TRAIN_ROWS = 20

_PACKAGES = ("bitsandbytes", "deepspeed", "peft", "ray", "torch", "transformers")


@dataclass
class _Clock:
    """Seconds by purpose, carried over a resume."""

    startup_s: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0

    @property
    def all_s(self) -> float:
        """Seconds in all."""
        return self.startup_s + self.train_s + self.eval_s + self.save_s


@dataclass(frozen=True)
class Stepped:
    """How a step went, on all ranks.

    Args:
        result: What it left on this rank.
        diverged: Whether a loss was not finite.
        stop: Whether the trial is to stop.
        save: Whether it is time for a checkpoint.
        late: Whether the trial has had all its time.
    """

    result: StepResult
    diverged: bool
    stop: bool
    save: bool
    late: bool


#: What a trial does, pausing for each pass: True is for a step, which is answered, False for a piece of an evaluation.
Course = Generator[bool, Stepped | None, None]


class Run:
    """One trial on its way from the first step to the last row."""

    def __init__(self, host: Host, taken: Taken, slot: Slot, storage: TrialStorage, started: float) -> None:
        self.host, self.taken, self.slot, self.storage, self.started = host, taken, slot, storage, started
        self.trial, self.ranks, self.inbox = taken.trial, host.ranks, host.inbox
        self.clock = _Clock()
        self.trains = False
        """Whether it waits for a step."""
        self.evaluated: dict[str, Any] = {}
        self.predictions: dict[str, list[float]] = {}
        self.rungs = rung_steps(self.slot.steps, self.trial.rungs)
        self.judged: list[dict[str, Any]] = []
        """The rows of the rungs so far."""
        self._saved = time.monotonic()
        self._report_every = max(1, self.slot.steps // TRAIN_ROWS)
        self._course = self._to_end()

    @property
    def measures(self) -> bool:
        """Whether the step that comes is reported."""
        return (self.slot.done + 1) % self._report_every == 0

    def flags(self, result: StepResult) -> tuple[bool, bool, bool, bool]:
        """What this rank says after a step: the fields of :class:`Stepped` in their order."""
        stop = self.ranks.leads and self.inbox.stop_requested(self.trial.trial)
        due = self.ranks.leads and time.monotonic() - self._saved >= self.trial.train.checkpoint_every_s
        limit = self.trial.train.max_time_s
        late = self.ranks.leads and limit is not None and self.clock.all_s > limit
        return not math.isfinite(result.task_loss), stop, due, late

    def go_on(self, stepped: Stepped | None = None) -> bool:
        """Go on to the next pass; True at the end.

        Args:
            stepped: How the step went, if it was waited for.
        """
        try:
            self.trains = next(self._course) if stepped is None else self._course.send(stepped)
        except StopIteration:
            return True
        return False

    def _to_end(self) -> Course:
        self._resume()
        evaluations = evaluation_steps(self.slot.steps, self.trial.train.evaluations) | self.rungs.keys()
        self.clock.startup_s += time.time() - self.started
        while self.slot.done < self.slot.steps:
            measured = self.measures
            stepped = yield True
            assert stepped is not None
            self._report(stepped, measured)
            if stepped.late and self.slot.done < self.slot.steps:
                raise TimeoutError(
                    f"train.max_time_s: {self.trial.train.max_time_s:g} s are over after step {self.slot.done} "
                    f"of {self.slot.steps}"
                )
            if stepped.stop:
                self._end("stopped")
                return
            if self.slot.done in evaluations:
                yield from self._evaluate()
            if stepped.save:
                self._save()
        self._end("complete")

    def _resume(self) -> None:
        latest = self.ranks.share(self.storage.latest() if self.ranks.leads else None)
        if latest is not None:
            self.storage.load(latest["step"], self.slot.load)
            self.clock = _Clock(**latest["clock"])
            self.evaluated, self.judged = latest["evaluated"], latest.get("rung_rows", [])
            self.slot.packed = Packed(**latest.get("packed", {}))
            self.predictions = latest.get("predictions", {})
            for row in self.judged if self.ranks.leads else ():
                self.inbox.send(self.trial.trial, row)  # whoever judges it may have been killed before he could

    def _report(self, stepped: Stepped, measured: bool) -> None:
        """Send a row of the step if one is due. Raises FloatingPointError on every rank if one diverged."""
        if stepped.diverged:
            raise FloatingPointError(f"the loss is not finite at step {self.slot.done}")
        if not measured:
            return
        result = stepped.result
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

    def _evaluate(self) -> Course:
        last = self.slot.done == self.slot.steps
        pieces = self.slot.evaluation(self._taus(), last, room=self.host.evaluation_room)
        yield False  # all that are evaluated in a turn are known before the first piece
        while True:
            began = time.monotonic()
            try:
                next(pieces)
            except StopIteration as end:
                found: Evaluation = end.value
                break
            finally:
                self.clock.eval_s += time.monotonic() - began
            yield False
        self.evaluated, self.predictions = found.row(), found.predictions
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
            "packed": vars(self.slot.packed),
            "evaluated": self.evaluated,
            "rung_rows": self.judged,
            "predictions": self.predictions,
        }
        self.storage.save(self.slot.done, self.slot.save, meta, self.ranks)
        self._saved = time.monotonic()
        self.clock.save_s += self._saved - began

    def _end(self, status: str) -> None:
        peak = max(self.ranks.gather(self.host.memory.peak / 2**30))
        adapter, lambdas = None, dict[str, float]()
        with self.slot.whole():
            if self.ranks.leads:
                lambdas = self.slot.lambdas()
            if self.ranks.leads and status == "complete":
                adapter = self.storage.publish_adapter(self.slot.save_adapter)
        if self.ranks.leads:
            self.inbox.send(
                self.trial.trial,
                end_row(
                    status,
                    self.started,
                    **self.evaluated,
                    **self._facts(),
                    adapter=adapter,
                    predictions=self.predictions,
                    lambda_layers=lambdas,
                    peak_memory_gib=peak,
                ),
            )
        self.ranks.barrier()

    def _facts(self) -> dict[str, Any]:
        """Fields of a record that are known at any step."""
        return {
            "steps": self.slot.done,
            "dtype": self.host.base.dtype,
            "activation": self.slot.activation,
            "approximation": self.slot.kind,
            "beta": self.slot.beta,
            "warning": self._warning(),
            "trainable_share": self.slot.trainable_share,
            "times": dict(vars(self.clock)),
            "packing": {"slots": self.host.slots, **vars(self.slot.packed)},
            "host_memory_gib": self.host.memory_gib,
            "host": self.host.name,
            "versions": versions(),
            "started_at": self.started,
        }

    def _warning(self) -> str | None:
        limit = self.host.limit
        full = f"memory does not hold more slots: {limit} at once from then on" if limit is not None else None
        lost = len(self.trial.rungs) - len(self.rungs)
        rungs = f"{lost} of {len(self.trial.rungs)} rungs fall on another one or on the last step" if lost else None
        return "; ".join(text for text in (self.slot.warning, full, rungs) if text) or None

    def _send(self, kind: str, **fields: Any) -> dict[str, Any]:
        row = {"kind": kind, "step": self.slot.done, "time": time.time(), **fields}
        if self.ranks.leads:
            self.inbox.send(self.trial.trial, row)
        return row


def end_row(status: str, started: float, **fields: Any) -> dict[str, Any]:
    """Return a trial's last row: how it ended, and when."""
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
    found = {step: rung for rung, step in enumerate(rung_places(shares, steps))}
    return {step: rung for step, rung in found.items() if step < steps}


@lru_cache
def versions() -> dict[str, str]:
    """Versions of what computes, as they stand in records."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
