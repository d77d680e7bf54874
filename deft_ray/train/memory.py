"""Memory of the device that a worker computes on: what it takes, what is left, and how many slots that holds.

On a GPU these are the figures of torch's allocator, on a CPU those of the process; a CPU's peak is counted by Linux.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from deft_ray.spec.machine import free_memory, read_kib
from deft_ray.spec.plan import slots_that_fit

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Holds:
    """What a worker's memory holds, measured at the first step on a base that was free before.

    Args:
        base: Bytes that were taken before the trial.
        slot: Bytes that one trial takes in the longest pass that it can have.
        free: Bytes that were left before the trial.
    """

    base: int
    slot: int
    free: int

    @property
    def slots(self) -> int:
        """Trials that the free memory holds at once; at least one.

        >>> Holds(10, 4, 20).slots, Holds(10, 50, 20).slots
        (4, 1)
        """
        return slots_that_fit(self.free, self.slot)


class DeviceMemory:
    """Memory of a worker's device, in bytes.

    Args:
        device: The GPU, or the CPU.
        share: Which part of what is free on the machine this worker may take, as others are there; of a GPU it has all.
    """

    def __init__(self, device: torch.device, share: float = 1.0) -> None:
        self.device, self.on_gpu, self.share = device, device.type == "cuda", share

    def begin_peak(self) -> None:
        """Count the peak from now on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:  # not on Linux, or not allowed: the peak is that of the process from its start
            return

    @property
    def used(self) -> int:
        """What this worker takes now."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else read_kib(_PROCESS / "status", "VmRSS")

    @property
    def peak(self) -> int:
        """The most that it has taken since :meth:`begin_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else read_kib(_PROCESS / "status", "VmHWM")

    @property
    def free(self) -> int:
        """What it could take beside."""
        if self.on_gpu:
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused
        return int(self.share * free_memory())


class FirstStep:
    """Measures what a trial takes, from before its slot is opened until its first step is done.

    Args:
        memory: The device's.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        memory.begin_peak()
        self._base, self._free = memory.used, memory.free

    def holds(self, longest: float, slots: int = 1) -> Holds:
        """Return what memory holds.

        Args:
            longest: Tokens of the longest pass that a trial can have, over those of the longest pass that there was.
            slots: Trials that were opened and had their first step, each in a pass of its own.
        """
        kept = max(0, self._memory.used - self._base)
        passing = max(0, self._memory.peak - self._base - kept)
        return Holds(self._base, round(kept / slots + passing * max(1.0, longest)), self._free)
