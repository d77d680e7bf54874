"""Cut a layer's activations into pieces that a CPU's cache holds."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: float32 elements: a megabyte. Half of it costs a tenth to a third more, in calls; four of it seven times as much.
_ELEMENTS = 2**18


def chunks(act_NF: Tensor) -> Iterator[slice]:
    """Yield slices of rows. Elementwise passes over a whole layer cost more in memory traffic than in arithmetic.

    On a GPU, where a pass costs a kernel, it is one slice.

    Args:
        act_NF: (rows, d_ff).
    """
    rows = max(1, act_NF.shape[0] if act_NF.is_cuda else _ELEMENTS // max(1, act_NF.shape[1]))
    for start in range(0, act_NF.shape[0], rows):
        yield slice(start, min(start + rows, act_NF.shape[0]))
