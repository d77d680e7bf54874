"""The dispatcher: one Ray actor between Tune's trials and the hosts, a waiting room around a Board."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray

from deft_ray.sweep.board import Board, Row

#: Longest time a call waits before it comes back empty-handed.
WAIT_S = 20.0


class Dispatcher:
    """Async face of a :class:`~deft_ray.sweep.board.Board`; every wait is bounded, callers ask again."""

    def __init__(self) -> None:
        self._board = Board()
        self._changed = asyncio.Condition()
        self._hosts_ended: dict[str, str | None] = {}
        self._predictions: dict[str, dict[str, list[float]]] = {}
        self._slots: dict[str, int] = {}
        self._limits: dict[str, int] = {}

    async def submit(self, trial: str, spec: str, behind: Sequence[str] = ()) -> None:
        """Queue a trial; see :meth:`Board.submit`."""
        await self._change(lambda: self._board.submit(trial, spec, behind))

    async def claim(self, host: str, life: int, wait: bool) -> tuple[str, int, bool] | str:
        """Find a trial for a host, or wait for one: as of :meth:`Board.claim`, or ``wait``, or ``closed``."""

        def find() -> Any:
            return "closed" if self._board.closed else self._board.claim(host, life)

        if not wait:
            return find() or "wait"
        self._board.asks(host, life, still=True)
        try:
            return await self._wait_for(find) or "wait"
        finally:
            self._board.asks(host, life, still=False)

    async def give_back(self, trial: str, attempt: int) -> None:
        """Take a trial back that a host has claimed and not begun."""
        await self._change(lambda: self._board.give_back(trial, attempt))

    async def add_row(self, trial: str, attempt: int, row: Row) -> bool:
        """Take a host's row; False tells the host that nobody wants it any more."""
        predictions = row.pop("predictions", None)
        taken: bool = await self._change(lambda: self._board.add_row(trial, attempt, row, time.time()))
        if taken and predictions:
            self._predictions[trial] = predictions
        return taken

    async def predictions(self, trial: str) -> dict[str, list[float]]:
        """Return what came with a trial's last row, but not to Tune, which keeps all rows and writes them down."""
        return self._predictions.get(trial, {})

    async def rows(self, trial: str, after: int) -> list[Row]:
        """Wait for rows of a trial as :meth:`Board.rows` has them; empty if there were none for a while."""
        found: list[Row] | None = await self._wait_for(lambda: self._board.rows(trial, after))
        return found or []

    async def forget(self, trial: str) -> None:
        """Drop an ended trial's rows."""
        self._board.forget(trial)
        self._predictions.pop(trial, None)

    async def cancel(self, trial: str) -> None:
        """Stop a trial."""
        await self._change(lambda: self._board.cancel(trial))

    async def wait_cancelled(self, trial: str, attempt: int) -> bool:
        """Wait until an attempt is to stop; False if it was not for a while."""
        return bool(await self._wait_for(lambda: self._board.is_cancelled(trial, attempt)))

    async def release(self, host: str, cause: str, lacked_memory: bool = False) -> int:
        """A host is gone, or has come back without its trials; returns its life from now on.

        Where it is gone as its machine lacked memory, it takes half as many trials at once in its lives to come.
        """
        had = len(self._board.running(host))
        if lacked_memory and had > 1:
            await self.has_slots(host, min(self._slots.get(host, had), had // 2), had // 2)
        life: int = await self._change(lambda: self._board.release(host, cause, time.time()))
        return life

    async def host_ended(self, host: str, cause: str | None) -> None:
        """A host will not come back; ``cause`` is why, or None if it was told to end, or has said why before."""
        self._hosts_ended[host] = cause or self._hosts_ended.get(host)
        await self.release(host, cause or "the host ended")

    async def hosts_ended(self) -> dict[str, str | None]:
        """Hosts that will not come back, and why."""
        return self._hosts_ended

    async def has_slots(self, host: str, slots: int, limit: int | None) -> None:
        """A host takes so many trials at once from now on, as memory held no pass of more than ``limit``."""
        self._slots[host] = slots
        if limit is not None:
            self._limits[host] = min(limit, self._limits.get(host, limit))

    async def limit(self, host: str) -> int | None:
        """Return how many slots of a pass a host's memory holds, where it has not held one more, in any life."""
        return self._limits.get(host)

    async def slots(self) -> dict[str, int]:
        """Trials that hosts take at once, of those that have told."""
        return self._slots

    async def close(self) -> None:
        """Tell every host to end, at its next step if it is busy."""
        await self._change(self._board.close)

    async def give_up(self, cause: str) -> None:
        """End every trial that waits: there is no host for it."""
        await self._change(lambda: self._board.give_up(cause))

    async def _change(self, change: Any) -> Any:
        async with self._changed:
            result = change()
            self._changed.notify_all()
            return result

    async def _wait_for(self, find: Any) -> Any:
        """Return the first truthy value of ``find``, or None after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        async with self._changed:
            while not (found := find()):
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=left)
                except TimeoutError:
                    return None
            return found


def start_dispatcher(near_driver: dict[str, float]) -> Any:
    """Start the dispatcher beside the driver.

    Args:
        near_driver: Resources that only the driver's node has, a crumb of each.
    """
    return ray.remote(Dispatcher).options(num_cpus=0, max_concurrency=1000, resources=near_driver).remote()
