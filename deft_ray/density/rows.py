"""Whose rows of a batch are whose: several trials share a pass of the model, one behind the other.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One trial's rows of a pass.

    Args:
        start: First row.
        stop: Behind the last row.
        of: Rows of the whole pass.
    """

    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def are_all(self) -> bool:
        """Whether the pass has no other rows."""
        return (self.start, self.stop) == (0, self.of)

    def of_size(self, size: int) -> slice:
        """Return the rows in a tensor's first dimension, where each row of the pass has the same number of places.

        Args:
            size: Of the dimension: the rows of the pass or, where tokens lie in it too (OPT's MLP), a multiple.

        Raises:
            ValueError: If the dimension is no multiple of the pass's rows.
        """
        if self.are_all:
            return slice(0, size)
        if size % self.of:
            raise ValueError(f"a pass of {self.of} rows has a tensor with {size}")
        each = size // self.of
        return slice(self.start * each, self.stop * each)

    def cut(self, tensor_B: Tensor) -> Tensor:
        """Return these rows of a tensor, a view."""
        return tensor_B if self.are_all else tensor_B[self.of_size(len(tensor_B))]


def split_rows(tensor_B: Tensor, rows: Sequence[Rows]) -> tuple[Tensor, ...]:
    """Return the rows of all trials of a pass, views whose gradients together are one tensor.

    A view by :meth:`Rows.cut` has a gradient of the whole tensor's size, for each of them.
    """
    if len(rows) == 1:
        return (tensor_B,)
    return tensor_B.split([len(tensor_B) * (mine.stop - mine.start) // mine.of for mine in rows])


def rows_of(sizes: Sequence[int]) -> list[Rows]:
    """Lay trials with so many rows one behind the other.

    >>> rows_of([2, 1])
    [Rows(start=0, stop=2, of=3), Rows(start=2, stop=3, of=3)]
    """
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [Rows(end - size, end, sum(sizes)) for end, size in zip(ends, sizes, strict=True)]
