"""What a training pass costs, learnt from the passes themselves, and which slots had better not share one.

Slots that share a pass are padded to the longest of them. A pass costs something whatever is in it (layers are started,
four-bit weights are opened), and something for every token, padding included:

.. math:: seconds = fixed + each \\cdot tokens

Where tokens are what costs, as with a small model on a CPU, slots of unlike lengths are cheaper in passes of their own;
where the pass is, as with small batches on a large quantised model, in one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

#: Turns in which all slots pass alone, and then as many in which they pass together, before anything is known.
TRIED = 3
#: Passes that are remembered for each number of slots.
REMEMBERED = 16


@dataclass(frozen=True)
class Size:
    """What a slot brings into a pass.

    Args:
        rows: Examples.
        source: Tokens that each is padded to.
        target: Tokens that each answer is padded to; 0 where there is a head.
    """

    rows: int
    source: int
    target: int


def tokens_of(sizes: Sequence[Size]) -> int:
    """Tokens of a pass that these share, padding included.

    >>> tokens_of([Size(2, 10, 3), Size(4, 8, 5)])
    90
    """
    longest = max(size.source for size in sizes) + max(size.target for size in sizes)
    return sum(size.rows for size in sizes) * longest


class PassCost:
    """Learns what passes cost."""

    def __init__(self) -> None:
        self._seen: defaultdict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._turns = 0
        self._line: tuple[float, float] | None = None

    def add(self, sizes: Sequence[Size], seconds: float) -> None:
        """Note a pass."""
        self._seen[len(sizes)].append((tokens_of(sizes), seconds))

    def groups(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Say which slots share a pass: the split that is expected to cost least.

        Args:
            sizes: What each slot brings.

        Returns:
            Places of slots, each once.
        """
        everybody = list(range(len(sizes)))
        if len(sizes) < 2:
            return [everybody] if everybody else []
        self._turns += 1
        if self._turns <= TRIED:
            return [[place] for place in everybody]
        if self._turns <= 2 * TRIED:
            return [everybody]
        if self._line is None or self._turns % REMEMBERED == 0:
            self._line = self._fit()
        return self._cheapest(sizes, *self._line)

    def _fit(self) -> tuple[float, float]:
        """Seconds of a pass and of each of its tokens: the median of the slopes between any two passes (Theil, Sen)."""
        seen = [each for passes in self._seen.values() for each in passes]
        if len({tokens for tokens, _ in seen}) < 2:
            return 1.0, 0.0
        tokens, seconds = zip(*seen, strict=True)
        with np.errstate(invalid="ignore"):  # of its confidence interval, which nobody asked for
            slope, fixed, *_ = theilslopes(seconds, tokens)
        return max(float(fixed), 0.0), max(float(slope), 0.0)

    @staticmethod
    def _cheapest(sizes: Sequence[Size], fixed: float, each: float) -> list[list[int]]:
        """Split slots in the order of their lengths; of splits that cost the same, the one with fewer passes."""
        order = sorted(range(len(sizes)), key=lambda place: (sizes[place].source, sizes[place].target, place))
        best: list[tuple[float, int, list[list[int]]]] = [(0.0, 0, [])]
        for end in range(1, len(order) + 1):
            splits = []
            for start in range(end):
                seconds, passes, before = best[start]
                together = order[start:end]
                cost = fixed + each * tokens_of([sizes[place] for place in together])
                splits.append((seconds + cost, passes + 1, [*before, sorted(together)]))
            best.append(min(splits, key=lambda split: split[:2]))
        return best[-1][2]
