"""The host loop: one frozen base, and trials in its slots until there are no more.

Runs on every worker of a host alike. Rank 0 takes trials from an inbox and sends rows back; what the inbox is (the
sweep's dispatcher, a list in a test) this room does not know.

The loop goes in turns. In each, a free slot takes the next trial, then all slots that train pass a micro-batch through
the base together, then each slot that is evaluated passes a piece of that. What a trial does next is told by its
course, :mod:`deft_ray.train.course`. The first trial of a task begins once that is loaded, and those that train do not
wait for it.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from deft_ray.models.base import Base
from deft_ray.models.routing import CannotShareError
from deft_ray.spec.plan import MOST_SLOTS
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.cost import Room, tokens_of
from deft_ray.train.course import Run, Stepped, end_row
from deft_ray.train.loading import LoadedTasks
from deft_ray.train.memory import DeviceMemory, FirstStep, Holds
from deft_ray.train.pack import Pack, has_lost_gpu, is_out_of_memory
from deft_ray.train.ranks import Ranks, is_about_company
from deft_ray.train.slot import Slot, StepResult, step_together
from deft_ray.train.storage import TrialStorage

_log = logging.getLogger(__name__)

#: How long a host without anything else to do waits before it looks again whether a task is loaded.
_LOOK_AGAIN_S = 0.05


@dataclass(frozen=True)
class Taken:
    """A trial that a host is to run.

    Args:
        trial: The trial.
        attempt: How often it was started, this time included.
        apart: Whether it must have the base to itself, as it may have cost the host its workers, or lacked memory.
    """

    trial: TrialSpec
    attempt: int = 1
    apart: bool = False


@dataclass(frozen=True)
class _Coming:
    """A trial that has a slot, whose task may have to be loaded before it begins; since when, in Unix seconds."""

    taken: Taken
    started: float


class Inbox(Protocol):
    """Where trials come from and rows go to."""

    def next_trial(self, wait: bool) -> Taken | str:
        """Take a trial; asked on rank 0 only.

        Args:
            wait: Whether to wait a while for one.

        Returns:
            ``wait`` if there is none yet, ``closed`` if there will be none.
        """

    def no_room(self) -> None:
        """Take note, on rank 0, that no trial can be taken in this turn."""

    def follow(self, taken: Taken) -> None:
        """Note that a trial runs; told to every rank."""

    def stop_requested(self, trial: str) -> bool:
        """Tell at once whether a running trial is to stop. Asked on rank 0 only."""

    def send(self, trial: str, row: dict[str, Any]) -> None:
        """Send a row of a running trial; called on rank 0, and by a rank that fails alone."""

    def has_slots(self, slots: int, limit: int | None) -> None:
        """Take note of what the host has found; told on rank 0 whenever that changes, and by a rank that fails alone.

        Args:
            slots: Trials that it takes at once.
            limit: Slots of a pass that memory holds, once it has not held one more.
        """


class Host:
    """Serves trials on one base.

    Args:
        base: Loaded base.
        ranks: The host's workers.
        inbox: See :class:`Inbox`.
        checkpoints: Folder or URI of all trials' checkpoints.
        name: Name of the host in records.
        slots: Trials that train at once; None for as many as memory is found to hold, and as make a difference.
        memory_share: Which part of the machine's free memory each worker may take.
        tokens: Folder of tokenised tasks that all workers of this node share; None to tokenise them here.
        limit: Slots of a pass that memory held in the host's last life, where it did not hold one more; as rank 0 says.

    Attributes:
        slots: Trials that it takes at once; where it finds that out, one until a trial's first step has been measured.
        memory: Of this worker's device.
    """

    def __init__(
        self,
        base: Base,
        ranks: Ranks,
        inbox: Inbox,
        checkpoints: str,
        name: str,
        slots: int | None = 1,
        memory_share: float = 1.0,
        tokens: Path | None = None,
        limit: int | None = None,
    ) -> None:
        self.base, self.ranks, self.inbox, self.checkpoints, self.name = base, ranks, inbox, checkpoints, name
        self._asked, self._limit = slots, ranks.share(limit)
        self.slots = min(slots or 1, self._limit or slots or 1)
        self._told = self.slots, self._limit
        self.memory = DeviceMemory(base.model.device, memory_share)
        self._first: FirstStep | None = None
        self._holds: Holds | None = None
        self._pack: Pack | None = None
        self._runs: list[Run] = []
        self._held: list[Taken] = []
        """Wait until the base is free, as they cannot share it or lacked memory; no other is taken before them."""
        self._coming: list[_Coming] = []
        """Have a slot, and begin once their tasks are loaded."""
        self._closed = self._littered = False
        self._evaluated = 1
        """Trials that are evaluated in this turn."""
        self._tasks = LoadedTasks(base, tokens)

    @property
    def limit(self) -> int | None:
        """Slots that memory holds, once it has not held one more."""
        return self._pack.limit if self._pack is not None else self._limit

    @property
    def memory_gib(self) -> dict[str, float]:
        """What the base and a trial take, and what was free beside the base, as measured; empty before that."""
        return {} if self._holds is None else {name: value / 2**30 for name, value in vars(self._holds).items()}

    def evaluation_room(self) -> Room | None:
        """What a piece of a trial's evaluation may take, so that those that train wait no longer than for each other.

        All trials that are evaluated in a turn have it together. None where none waits, or nothing is known. All
        workers ask at once, and get the first's answer.
        """
        if self._pack is None or not any(run.trains for run in self._runs):
            return None
        room: Room | None = self.ranks.share(self._pack.cost.room())
        return room and replace(room, most=room.most / self._evaluated)

    def serve(self) -> None:
        """Take trials until the inbox has no more.

        Raises:
            Exception: A trial's own, where it failed on some workers only: the group has to be started anew.
        """
        gc.collect()
        gc.freeze()  # the libraries' objects stay: not walking over them saves 0.3 s after every trial
        try:
            while self._runs or self._held or self._coming or not self._closed:
                self._tidy()
                self._take_in()
                self._turn()
        finally:
            for run in self._runs:
                run.slot.close()

    def _take_in(self) -> None:
        """Give every free slot a trial, as long as there are any."""
        if self._is_idle:
            held, self._held = self._held, []
            for waits in held:
                self._start(waits)
        self._begin_loaded()
        if not self._has_room() and self.ranks.leads:
            self.inbox.no_room()
        while self._has_room():
            taken = self.inbox.next_trial(wait=self._is_idle) if self.ranks.leads else ""
            taken = self.ranks.share(taken)
            self._closed = taken == "closed"
            if not isinstance(taken, Taken):
                return
            self._start(taken)

    def _has_room(self) -> bool:
        return self._is_free and not self._held and not self._closed

    @property
    def _is_idle(self) -> bool:
        return not self._runs and not self._coming

    @property
    def _is_free(self) -> bool:
        return len(self._runs) + len(self._coming) < self.slots and not any(run.taken.apart for run in self._runs)

    def _start(self, taken: Taken) -> None:
        """Put a trial into a slot, or keep it until the base is free; one whose task trains nobody yet comes later."""
        if not self._is_free or (taken.apart and not self._is_idle):
            self._held.append(taken)
            return
        self.inbox.follow(taken)
        coming = _Coming(taken, time.time())
        if self._is_idle or self._is_loaded(taken.trial):
            self._begin(coming)
        else:
            self._coming.append(coming)

    def _begin_loaded(self) -> None:
        """Begin with trials whose tasks are loaded by now; where nobody trains meanwhile, there is time to wait."""
        if not self._coming:
            return
        if not self._runs:
            time.sleep(_LOOK_AGAIN_S)
        for coming in tuple(self._coming):  # one by one, as a task that could not be loaded is loaded anew for the next
            if len(self._runs) < self.slots and self._is_loaded(coming.taken.trial):
                self._coming.remove(coming)
                self._begin(coming)

    def _is_loaded(self, trial: TrialSpec) -> bool:
        """Tell whether a trial's task is loaded on all workers, or cannot be; begins to load it."""
        return self.ranks.maximum(int(not self._tasks.begin(trial))) == [0]

    def _begin(self, coming: _Coming) -> None:
        """Open a trial's slot, or keep the trial until the base is free."""
        taken = coming.taken
        try:
            run = self._open(taken, coming.started)
        except CannotShareError:
            self._held.append(taken)
        except Exception as error:  # a border: whatever it was, it is a row, or there is memory later
            self._fail(taken, coming.started, error)
        else:
            self._runs.append(run)
            self._go_on(run)

    def _open(self, taken: Taken, started: float) -> Run:
        trial = taken.trial
        if not self._runs:
            self._first = FirstStep(self.memory)
            fused = trial.model.activation == "fused"
            if self._pack is None or self._pack.fused != fused:
                self._limit, self._pack = self.limit, Pack(self.base, fused=fused)
                self._pack.limit = self._limit
        storage = TrialStorage(self.checkpoints, trial.trial, fingerprint(trial))
        with ExitStack() as fetched:
            fresh = self.ranks.share(self.ranks.leads and storage.latest() is None)
            start = fetched.enter_context(storage.adapter_of(trial.start_from)) if trial.start_from and fresh else None
            slot = Slot(trial, self.base, self._tasks.get(trial), self.ranks, start, self._pack)
        return Run(self, taken, slot, storage, started)

    def _turn(self) -> None:
        """Pass a micro-batch of all slots that train, together, then a piece of each evaluation, also if just begun."""
        training = [run for run in self._runs if run.trains]
        if training:
            self._train(training)
        evaluated = [run for run in self._runs if not run.trains]
        self._evaluated = len(evaluated)
        for run in evaluated:
            self._go_on(run)

    def _train(self, runs: list[Run]) -> None:
        began = time.monotonic()
        results = step_together([(run.slot, run.measures) for run in runs])
        share_s = (time.monotonic() - began) / len(runs)
        for run in runs:
            run.clock.train_s += share_s
        for run, result in zip(runs, results, strict=True):
            if isinstance(result, Exception):
                self._end(run, result)
        steps = [(run, result) for run, result in zip(runs, results, strict=True) if isinstance(result, StepResult)]
        if steps and self._first is not None:
            self._measure([run.slot for run, _ in steps], len(runs), self._first)
        self._agree_on_slots()
        if not steps:
            return
        flags = self.ranks.maximum(*(int(flag) for run, result in steps for flag in run.flags(result)))
        for number, (run, result) in enumerate(steps):
            self._go_on(run, Stepped(result, *map(bool, flags[4 * number : 4 * number + 4])))

    def _measure(self, slots: list[Slot], beside: int, first: FirstStep) -> None:
        """Take what the first step on a free base says of memory; the largest trial counts.

        Where trials come several at once, their very first passes go alone (:meth:`PassCost.groups`). Shared ones, as
        the second of a step in parts is, say nothing of one trial.
        """
        self._first = None
        if self._coming and not self.memory.on_gpu:
            return  # what loads a task takes memory too
        shared = len(slots) < beside or any(slot.packed.shared for slot in slots)
        if beside > 1 and (self._holds is not None or shared):
            return
        tokens = max(tokens_of([slot.longest]) for slot in slots)
        alone = self._pack.cost.tokens_alone if self._pack else 0
        holds = first.holds(tokens / max(alone, 1), beside)
        if self._holds is None or holds.slot > self._holds.slot:
            self._holds = holds

    def _agree_on_slots(self) -> None:
        """Take the lowest numbers of all ranks: of slots that memory holds in a pass, and of trials at once."""
        if self._asked == 1 or self._pack is None:
            return
        most = self._asked or MOST_SLOTS
        limit, slots = (-low for low in self.ranks.maximum(-(self._pack.limit or most), -self._wanted_slots()))
        self._pack.limit = limit if limit < most else None
        self.slots = min(slots, limit)
        found = self.slots, self._pack.limit
        if found != self._told and self.ranks.leads:
            self.inbox.has_slots(*found)
        self._told = found

    def _wanted_slots(self) -> int:
        """Slots that this rank is for."""
        if self._asked is not None or self._holds is None or self._pack is None:
            return self._asked or 1
        return self._pack.cost.slots_worth(self._holds.slots)

    def _go_on(self, run: Run, stepped: Stepped | None = None) -> None:
        """Let a trial go on to its next pass."""
        try:
            ended = run.go_on(stepped)
        except Exception as error:  # a border: whatever it was, it is a row
            self._end(run, error)
        else:
            if ended:
                self._end(run)

    def _end(self, run: Run, error: Exception | None = None) -> None:
        """Free a trial's slot."""
        self._littered = True
        self._runs.remove(run)
        try:
            if error is not None:
                self._fail(run.taken, run.started, error)
        finally:
            run.slot.close()

    def _tidy(self) -> None:
        """Give memory back that trials have left, once nobody looks at them any more."""
        if not self._littered:
            return
        self._littered = False
        gc.collect()
        if torch.cuda.is_available() and not self._runs:
            torch.cuda.empty_cache()

    def _fail(self, taken: Taken, started: float, error: Exception) -> None:
        """Send the last row of a trial that raised, which is off the base or will be.

        Without a row, it is held until it has the base to itself, if it failed on all workers and what one of them
        lacked was memory, while other trials were there to have it: from then on there are no more at once than those.
        It goes on from its last checkpoint. So it does where it failed on some workers only, in the host's next life.

        Args:
            taken: The trial.
            started: When it was, in Unix seconds.
            error: What it raised.

        Raises:
            Exception: The trial's own, where the workers cannot go on: it failed on some of them only, or their GPU
                computes no more. Without a row where it is about a worker that was lost, for which no trial can help,
                or about memory that others had.
        """
        self._littered = True
        trial, others = taken.trial.trial, len(self._runs)
        lacks_memory = bool(others) and is_out_of_memory(error)
        told = set(self.ranks.gather((trial, lacks_memory))) if self.ranks.all_failed() else set()
        if {failed for failed, _ in told} == {trial} and any(short for _, short in told) and self._pack is not None:
            _log.warning(
                "memory does not hold %s beside %d other trials: %d at most from now on", trial, others, others
            )
            self._pack.limit = min(self._pack.limit or others, others)
            self._agree_on_slots()
            self._held.append(replace(taken, apart=True))
            return
        alone = {failed for failed, _ in told} != {trial}
        if alone and is_about_company(error):
            raise error
        if alone and lacks_memory:
            _log.warning("memory of a worker does not hold %s beside %d other trials", trial, others)
            self.inbox.has_slots(min(self.slots, others), others)
            raise error
        alone = alone or has_lost_gpu(error)
        if self.ranks.leads or alone:
            status = "diverged" if isinstance(error, FloatingPointError) else "failed"
            cause = "".join(traceback.format_exception(error))
            self.inbox.send(trial, end_row(status, started, cause=cause) | ({"alone": True} if alone else {}))
        if alone:
            raise error


def fingerprint(trial: TrialSpec) -> str:
    """Identify a trial's configuration, so that a checkpoint of another is never loaded."""
    return hashlib.sha256(trial.model_dump_json().encode()).hexdigest()[:16]
