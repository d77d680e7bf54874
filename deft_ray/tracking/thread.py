"""Keep the sweep going whatever MLflow does: one thread writes to the mirror, retries, and remembers what failed."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft_ray.results.records import Record
from deft_ray.tracking.mirror import Mirror, Row

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """One call of a :class:`Mirror` method; a later one makes a failed one of the same key pointless."""

    method: str
    key: str
    arguments: dict[str, Any]
    why_open: str = "not written in time"


class MirrorThread:
    """The same calls as :class:`Mirror`, none of which waits or raises.

    A job that fails is tried ``attempts`` times with growing pauses and then put by; :meth:`close` tries it once
    more. Nothing is lost for good: ``records.jsonl`` is the truth, and a replay rebuilds everything from it.

    Args:
        connect: Makes the mirror; called in the thread, again after a failure.
        attempts: How often a job is tried before it is put by.
        backoff_s: First pause between two attempts; doubled each time.
        longest_pause_s: Upper limit of a pause.
    """

    def __init__(
        self,
        connect: Callable[[], Mirror],
        attempts: int = 4,
        backoff_s: float = 1.0,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._connect = connect
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._longest_pause_s = longest_pause_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._mirror: Mirror | None = None
        self._failed_before = False
        self._open: list[_Job] = []
        self._put_by: dict[str, _Job] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def record(
        self,
        record: Record,
        score_drop: float | None = None,
        density_change: float | None = None,
        rows: Sequence[Row] = (),
    ) -> None:
        """Queue :meth:`Mirror.record`."""
        arguments = {"record": record, "score_drop": score_drop, "density_change": density_change, "rows": list(rows)}
        self._queue(_Job("record", f"trial {record.trial}", arguments))

    def front(
        self,
        task: str,
        trials_on_front: Collection[str],
        hypervolume: float,
        step: int,
        files: Sequence[Path] = (),
        at: float | None = None,
    ) -> None:
        """Queue :meth:`Mirror.front`."""
        arguments = {
            "task": task,
            "trials_on_front": list(trials_on_front),
            "hypervolume": hypervolume,
            "step": step,
            "files": list(files),
            "at": time.time() if at is None else at,
        }
        self._queue(_Job("front", f"front of {task}", arguments))

    def finish(self, status: str = "complete", at: float | None = None) -> None:
        """Queue :meth:`Mirror.finish`."""
        arguments = {"status": status, "at": time.time() if at is None else at}
        self._queue(_Job("finish", "end of the sweep", arguments))

    def close(self, timeout_s: float = 60.0) -> list[str]:
        """Write what is left and stop; returns within about ``timeout_s``, whether MLflow answers or not.

        Returns:
            One line for each thing that MLflow does not have; empty if it has all.
        """
        if not self._closing.is_set():
            self._closing.set()
            self._jobs.put(None)
        self._thread.join(timeout_s)
        self._abandoned.set()
        with self._lock:
            return [f"{job.key}: {job.why_open}" for job in self._open]

    def _queue(self, job: _Job) -> None:
        with self._lock:
            self._open.append(job)
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job, self._attempts)
        for job in list(self._put_by.values()):
            self._do(job, 1)
        self._mirror = None

    def _do(self, job: _Job, attempts: int) -> None:
        pause_s = self._backoff_s
        for attempt in range(attempts):
            if attempt:
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, self._longest_pause_s)
            if self._abandoned.is_set() or self._try(job):
                return

    def _try(self, job: _Job) -> bool:
        try:
            if self._mirror is None:
                self._mirror = self._connect()
            elif self._failed_before:
                self._mirror.reload()
            getattr(self._mirror, job.method)(**job.arguments)
        except Exception as error:  # the border: MLflow, its database and its network may fail in any way
            _log.warning("MLflow: %s not written: %s", job.key, _first_line(error))
            self._failed_before = True
            job.why_open = f"{type(error).__name__}: {_first_line(error)}"
            self._replace(job, job)
            return False
        self._failed_before = False
        self._replace(job, None)
        return True

    def _replace(self, job: _Job, put_by: _Job | None) -> None:
        """Forget the job that was put by under the same key, and put this one by or call it done."""
        earlier = self._put_by.pop(job.key, None)
        with self._lock:
            self._open = [other for other in self._open if other is not earlier and other is not job]
            if put_by is not None:
                self._open.append(put_by)
                self._put_by[job.key] = put_by


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
