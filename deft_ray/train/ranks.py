"""The workers of one host as a slot sees them: who am I, and the few collectives that a slot needs.

Control values travel over their own gloo group, so that they need no GPU and never meet a gradient collective.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

#: How long one worker waits for the others to agree that a trial failed on all of them.
AGREE_TIMEOUT = timedelta(seconds=20)


class Ranks:
    """This process among the workers of its host.

    Args:
        rank: This worker's number.
        world: Workers of the host.
        device: Where this worker computes.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device
        self._control = dist.new_group(backend="gloo") if world > 1 else None
        self._agree = dist.new_group(backend="gloo", timeout=AGREE_TIMEOUT) if world > 1 else None

    @property
    def leads(self) -> bool:
        """True on rank 0, which speaks for the host."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Give every rank rank 0's value (any picklable object)."""
        if self._control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def maximum(self, *numbers: int) -> list[int]:
        """Elementwise maximum over ranks."""
        if self._control is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return [int(number) for number in tensor]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, on the CPU."""
        tensor = tensor.detach().cpu().clone()
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.maximum(0)

    def all_failed(self) -> bool:
        """Called by a rank whose trial raised: True if every rank's did, so that the host can go on."""
        if self._agree is None:
            return True
        try:
            dist.monitored_barrier(group=self._agree, timeout=AGREE_TIMEOUT)
        except RuntimeError:
            return False
        return True


def is_about_company(error: Exception) -> bool:
    """Tell whether an error is about a worker that does not answer: torch has a type for some, gloo and NCCL texts."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo/", "NCCL"))


def start_single() -> Ranks:
    """Start a process group of one, for a slot without Ray: a test, a profile, a benchmark."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
