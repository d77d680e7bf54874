"""The dispatcher's book: which trial waits, which host has it, which rows it left. Pure; knows no Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

#: A trial whose host died so often is taken for the cause.
MAX_ATTEMPTS = 3


@dataclass
class Entry:
    """One trial.

    Args:
        trial: Its TrialSpec as JSON text.
        behind: Trials that have to train before it begins, so that nothing follows what cannot.
        state: ``waiting``, ``running`` or ``ended``.
        host: Who has it.
        attempt: Counts from 1; rows of an older attempt are dropped.
        cancelled: Whether its host is to stop it.
        rows: All rows so far, in order.
        trains: Whether a row has come from before its end.
        status: How it ended.
    """

    trial: str
    behind: tuple[str, ...] = ()
    state: str = "waiting"
    host: str | None = None
    attempt: int = 0
    cancelled: bool = False
    rows: list[Row] = field(default_factory=list)
    trains: bool = False
    status: str | None = None

    def end(self, row: Row) -> None:
        """Take the last row."""
        self.state, self.host, self.status = "ended", None, row["status"]
        self.rows.append(row)


class Board:
    """Trials between Tune, which submits them and reads their rows, and hosts, which claim them and write rows."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.closed = False
        self._waiting: deque[str] = deque()
        self._given_up: str | None = None
        self._lives: dict[str, int] = {}
        self._asking: set[tuple[str, int]] = set()

    def submit(self, trial: str, spec: str, behind: Sequence[str] = ()) -> None:
        """Queue a trial; one that is known already is left as it is, so a restarted caller can ask again.

        Args:
            trial: Its name.
            spec: Its TrialSpec as JSON text.
            behind: Trials that have to train before this one is given out. If one of them ends otherwise than complete
                while this one waits, this one ends as ``abandoned``.
        """
        if trial not in self.entries:
            self.entries[trial] = Entry(spec, tuple(behind))
            self._waiting.append(trial)
            self._abandon_waiting()

    def claim(self, host: str, life: int) -> tuple[str, int, bool] | None:
        """Give a host the next trial.

        Args:
            host: The host.
            life: Of :meth:`release`, so that a question of workers that are gone takes nothing.

        Returns:
            TrialSpec as JSON, attempt, and whether it must have the host to itself: at its last attempt, so that it is
            known who it is that costs hosts. None if no trial waits.
        """
        trial = next(filter(self._may_begin, self._waiting), None)
        if trial is None or life != self._lives.get(host, 0) or self._is_another_freer(host):
            return None
        entry = self.entries[trial]
        apart = entry.attempt + 1 >= MAX_ATTEMPTS
        if apart and self.running(host):
            return None  # nor does the host get another: it is to become free
        self._waiting.remove(trial)
        entry.state, entry.host, entry.attempt = "running", host, entry.attempt + 1
        return entry.trial, entry.attempt, apart

    def _may_begin(self, trial: str) -> bool:
        before = [self.entries.get(name) for name in self.entries[trial].behind]
        return all(each is not None and (each.trains or each.status == "complete") for each in before)

    def asks(self, host: str, life: int, *, still: bool) -> None:
        """Note that a host waits for a trial, or no longer: no other one with more trials is served before it."""
        (self._asking.add if still else self._asking.discard)((host, life))

    def _is_another_freer(self, host: str) -> bool:
        asking = {other for other, life in self._asking if life == self._lives.get(other, 0)}
        has = Counter(entry.host for entry in self.entries.values() if entry.state == "running")
        return any(has[other] < has[host] for other in asking)

    def running(self, host: str) -> list[str]:
        """Trials that a host has."""
        return [trial for trial, entry in self.entries.items() if entry.host == host and entry.state == "running"]

    def give_back(self, trial: str, attempt: int) -> None:
        """A host has no room for a trial that it has claimed: it waits again, at the front, as if it had not."""
        entry = self.entries.get(trial)
        if entry is None or entry.state != "running" or entry.attempt != attempt:
            return
        entry.state, entry.host, entry.attempt = "waiting", None, attempt - 1
        self._waiting.appendleft(trial)
        if entry.cancelled:
            self._drop(trial, entry)
        self._abandon_waiting()

    def add_row(self, trial: str, attempt: int, row: Row, now: float) -> bool:
        """Take a row; False if it comes from a lost attempt, or after the end.

        The last row of a trial that failed on some workers only is ``alone``: they leave the others, so the host's
        other trials begin again before these fail for it.
        """
        entry = self.entries.get(trial)
        if entry is None or entry.state != "running" or entry.attempt != attempt:
            return False
        alone, host = row.pop("alone", False), entry.host
        if row["kind"] == "end":
            entry.end(row)
            self._abandon_waiting()
        else:
            entry.rows.append(row)
            entry.trains = True
        if alone and host is not None:
            self.release(host, f"trial {trial} failed on one of its workers", now)
        return True

    def cancel(self, trial: str) -> None:
        """Stop a trial: a waiting one is dropped, a running one at its next step, and one to come does not begin."""
        if trial not in self.entries:
            self.submit(trial, "")
        entry = self.entries[trial]
        if entry.state == "ended":
            return
        entry.cancelled = True
        if entry.state == "waiting":
            self._drop(trial, entry)

    def _drop(self, trial: str, entry: Entry) -> None:
        """End a trial that waits, without a row: nobody asks for it any more."""
        self._waiting.remove(trial)
        entry.state, entry.status = "ended", "stopped"
        self._abandon_waiting()

    def is_cancelled(self, trial: str, attempt: int) -> bool:
        """Tell whether an attempt is to stop."""
        entry = self.entries.get(trial)
        return entry is None or entry.cancelled or entry.attempt != attempt

    def release(self, host: str, cause: str, now: float) -> int:
        """A host is gone: its trials wait again, at the front, or have failed if they lost too many hosts.

        Args:
            host: The host.
            cause: Why, in words.
            now: Unix seconds.

        Returns:
            The host's life from now on, for :meth:`claim`.
        """
        for trial in reversed(self.running(host)):
            entry = self.entries[trial]
            entry.host = None
            if entry.attempt >= MAX_ATTEMPTS or entry.cancelled:
                reason = f"its host was lost {entry.attempt} times, last: {cause}"
                entry.end({"kind": "end", "status": "failed", "cause": reason, "time": now})
            else:
                entry.state = "waiting"
                self._waiting.appendleft(trial)
        self._abandon_waiting()
        self._lives[host] = self._lives.get(host, 0) + 1
        return self._lives[host]

    def close(self) -> None:
        """Give out no more trials, and stop those that run."""
        self.closed = True
        for entry in self.entries.values():
            entry.cancelled = True

    def give_up(self, cause: str) -> None:
        """Nobody is left to run what waits, now or later: it ends as ``abandoned``."""
        self._given_up = cause
        self._abandon_waiting()

    def _abandon_waiting(self) -> None:
        """End what waits for nothing."""
        causes = {trial: self._why_hopeless(self.entries[trial]) for trial in self._waiting}
        for trial, cause in causes.items():
            if cause is not None:
                self._waiting.remove(trial)
                self.entries[trial].end({"kind": "end", "status": "abandoned", "cause": cause})

    def _why_hopeless(self, entry: Entry) -> str | None:
        before = {name: self.entries[name].status for name in entry.behind if name in self.entries}
        lost = [f"{name} ended as {status}" for name, status in before.items() if status not in (None, "complete")]
        return f"it waited for what has failed: {', '.join(lost)}" if lost else self._given_up

    def rows(self, trial: str, after: int) -> list[Row]:
        """Return a trial's rows from number ``after`` on, up to the last that is more than training losses."""
        found = self.entries[trial].rows[after:]
        while found and found[-1]["kind"] == "train":
            found.pop()
        return found

    def forget(self, trial: str) -> None:
        """Drop an ended trial's rows but the last, so that a caller who is started anew learns that it has ended."""
        entry = self.entries.get(trial)
        if entry is not None and entry.state == "ended":
            del entry.rows[:-1]
