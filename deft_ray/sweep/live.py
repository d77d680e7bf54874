"""What a person sees while a sweep runs: one line per ended trial, on standard output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from deft_ray.results.points import Point
from deft_ray.results.records import Record
from deft_ray.results.report import first_line


class LiveLines:
    """Prints ended trials with an estimate of the time left.

    Args:
        done: Trials that had ended before this start.
        slots: Trials that train at once.
        stream: Where to.
    """

    def __init__(self, done: int, slots: int, stream: TextIO) -> None:
        self._done, self.slots, self._stream = done, max(1, slots), stream
        self._walls: list[float] = []

    def ended(self, record: Record, point: Point, sampled: Mapping[str, Any], remaining: int) -> None:
        """Print a trial's line.

        Args:
            record: Its record.
            point: The same against its baseline.
            sampled: Its sampled values.
            remaining: Trials still to run.
        """
        self._done += 1
        self._walls.append(record.wall_s)
        total = self._done + remaining
        head = f"[{self._done:>{len(str(total))}}/{total}] {record.trial}  {record.task:<15} seed {record.seed}"
        left = sum(self._walls) / len(self._walls) * remaining / self.slots
        tail = f"{record.wall_s:6.1f} s  {format_left(left)} left" if remaining else f"{record.wall_s:6.1f} s"
        if record.status == "complete" and record.score is not None and record.density is not None:
            middle = f"{record.score_metric} {record.score:.3f} ({_drop(point)})"
            middle += f"  density {record.density:.3f} ({_change(point)})"
        else:
            middle = f"{record.status}: {first_line(record.cause)}"
        self.say(f"{head}  {middle}  {tail}  {'baseline' if record.baseline else format_sample(sampled)}".rstrip())

    def say(self, text: str) -> None:
        """Print a line at once."""
        print(text, file=self._stream, flush=True)


def _drop(point: Point) -> str:
    return "   -  " if point.baseline or point.score_drop is None else f"{-point.score_drop:+.3f}"


def _change(point: Point) -> str:
    return "   -   " if point.baseline or point.density_change is None else f"{-100 * point.density_change:+6.1f}%"


def format_sample(sampled: Mapping[str, Any]) -> str:
    """Write sampled values shortly: ``alpha=1 epsilon=1e-07``."""
    return " ".join(
        f"{dotted.split('.')[-1]}={value:.3g}" if isinstance(value, float) else f"{dotted.split('.')[-1]}={value}"
        for dotted, value in sampled.items()
    )


def format_left(seconds: float) -> str:
    """Write a duration roughly: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
