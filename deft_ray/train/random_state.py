"""A trial's random state: torch's, on the CPU and on this worker's GPU, apart from that of the trials beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Draws:
    """What a trial's dropout draws from; begins where torch's global state stands.

    Attributes:
        state: Of torch's generators, as :meth:`made_global` left it.
    """

    def __init__(self) -> None:
        self.state = _state()

    @contextmanager
    def made_global(self) -> Iterator[None]:
        """Draw from here inside; what was drawn counts only if nothing is raised, so that it can be tried again."""
        before = _state()
        _restore(self.state)
        try:
            yield
            self.state = _state()
        finally:
            _restore(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed everything inside; torch's global state is afterwards what it was."""
    before = _state()
    try:
        seed_everything(seed)
        yield
    finally:
        _restore(before)


def _state() -> dict[str, Tensor | None]:
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _restore(state: dict[str, Tensor | None]) -> None:
    assert state["torch"] is not None
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
