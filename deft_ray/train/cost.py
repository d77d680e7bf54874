"""What a training pass costs, learnt from the passes themselves, and which slots had better not share one.

Slots that share a pass are padded to the longest of them. A pass costs something whatever is in it (layers are started,
four-bit weights are opened), and something for every token, padding included:

.. math:: seconds = fixed + each \\cdot tokens

Where tokens are what costs, as with a small model on a CPU, slots of unlike lengths are cheaper in passes of their own;
where the pass is, as with small batches on a large quantised model, in one.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

#: Turns of slots beside each other in which all pass alone, each followed by one in which they pass together, before
#: anything is known: by turns, so that what slows the machine slows both.
TRIED = 3
#: Every so many turns one slot passes alone, so that what is known of such passes is not of another hour.
PROBED = 32
#: Passes that are remembered for each number of slots, for so many turns: fewer where there were none since.
REMEMBERED, REMEMBERED_TURNS, KEPT = 16, 4 * PROBED, 4
#: Passes of a slot by itself after which what was found out is forgotten: nothing tells then whether it still holds.
RETRIED = 16 * PROBED
#: Fewer slots will do if a trial's part of a pass costs at most so much more with them: the search learns sooner, and
#: hosts end together. Dealt out in twos and threes, the quickstart's last trials left a host idle for a tenth of it.
WORTH = 0.2
#: Seconds of training that a piece of an evaluation may have, for each second of the others' passes.
#: A backward pass costs at least what the forward pass before it does, so a piece of twice as many would take as long;
#: less a fifth, as there are counts and the logits of all candidates. With two, half of the pieces of Flan-T5-base's
#: shape took longer than a step, up to 1.15 times.
EVALUATED = 1.6


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


@dataclass(frozen=True)
class Room:
    """What passes of an evaluation may take while others wait: in seconds of training passes, or in tokens.

    Args:
        most: All of them together.
        fixed: A pass, whatever is in it.
        each: A token.
    """

    most: float
    fixed: float
    each: float

    def tokens(self) -> int:
        """Return the tokens of one pass, at most.

        >>> Room(10.0, 4.0, 2.0).tokens()
        3
        """
        return int((self.most - self.fixed) / self.each) if self.each else sys.maxsize

    def passes(self, tokens: int) -> int:
        """Return the number of passes of so many tokens each, at most, and at least one.

        >>> Room(10.0, 1.0, 1.0).passes(3), Room(10.0, 1.0, 1.0).passes(30)
        (2, 1)
        """
        return max(1, int(self.most / (self.fixed + self.each * tokens)))


class PassCost:
    """Learns what passes cost."""

    def __init__(self) -> None:
        self._seen: defaultdict[int, deque[tuple[int, int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._turns = self._by_itself = 0
        self._turn: list[int] = []
        """Tokens of each pass of the last turn that had any."""
        self._turn_is_over = False
        self._line: tuple[float, float] | None = None

    def begin_turn(self) -> None:
        """Begin the passes of another turn."""
        self._turn_is_over = True

    def add(self, sizes: Sequence[Size], seconds: float) -> None:
        """Note a pass."""
        self._turn = [*([] if self._turn_is_over else self._turn), tokens_of(sizes)]
        self._turn_is_over = False
        self._seen[len(sizes)].append((self._turns, tokens_of(sizes), seconds))

    @property
    def tokens_alone(self) -> int:
        """Tokens of the longest pass of a single slot that is remembered; 0 before there is one."""
        return max((tokens for _, tokens, _ in self._seen[1]), default=0)

    def alone_s(self, size: Size) -> float | None:
        """Seconds that a slot's pass is expected to take by itself; None while nothing is known."""
        if self._line is None:
            return None
        fixed, each = self._line
        return fixed + each * tokens_of([size])

    def room(self) -> Room | None:
        """What passes of an evaluation may take, to take no longer than those of the last turn; None if nothing passed.

        See :data:`EVALUATED`.
        """
        fixed, each = self._line or (0.0, 1.0)
        seconds = fixed * len(self._turn) + each * sum(self._turn)
        return Room(EVALUATED * seconds, fixed, each) if self._turn else None

    def slots_worth(self, most: int) -> int:
        """Slots that are worth having, of at most so many.

        Two before anything is known, as it takes two to learn it. Then the fewest of which a trial's part of a pass is
        expected to cost at most :data:`WORTH` more than with the most. Where that is one, two are tried again later.
        """
        if self._line is None:
            return min(most, 2)
        fixed, each = self._line
        tokens = float(np.mean([tokens / count for count, passes in self._seen.items() for _, tokens, _ in passes]))
        best = fixed / most + each * tokens
        return next(count for count in range(1, most + 1) if fixed / count + each * tokens <= (1 + WORTH) * best)

    def groups(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Say which slots share a pass: the split that is expected to cost least.

        Args:
            sizes: What each slot brings.

        Returns:
            Places of slots, each once.
        """
        everybody = list(range(len(sizes)))
        self._by_itself = self._by_itself + 1 if len(sizes) == 1 else 0
        if self._by_itself == RETRIED:
            self._turns, self._line = 0, None
        if len(sizes) < 2:
            return [everybody] if everybody else []
        if not self._turns:
            self._seen.clear()  # first passes are slow: the machine is starting
        self._turns += 1
        if self._turns <= 2 * TRIED:
            return [[place] for place in everybody] if self._turns % 2 else [everybody]
        if self._line is None or self._turns % REMEMBERED == 0:
            self._line = self._fit()
        if self._turns % PROBED:
            return self._cheapest(sizes, *self._line)
        probe = self._turns // PROBED % len(sizes)
        rest = [place for place in everybody if place != probe]
        split = self._cheapest([sizes[place] for place in rest], *self._line)
        return [[probe], *([rest[place] for place in group] for group in split)]

    def _fit(self) -> tuple[float, float]:
        """Seconds of a pass and of each of its tokens: the median of the slopes between any two passes (Theil, Sen)."""
        seen = [each for passes in self._seen.values() for each in self._recent(passes)]
        if len({tokens for tokens, _ in seen}) < 2:
            return 1.0, 0.0
        tokens, seconds = zip(*seen, strict=True)
        with np.errstate(invalid="ignore"):  # of its confidence interval, which nobody asked for
            slope, fixed, *_ = theilslopes(seconds, tokens)
        return max(float(fixed), 0.0), max(float(slope), 0.0)

    def _recent(self, passes: Sequence[tuple[int, int, float]]) -> list[tuple[int, float]]:
        """Tokens and seconds of passes that are not too long ago, or of the last few."""
        first = self._turns - REMEMBERED_TURNS
        recent = [(tokens, seconds) for turn, tokens, seconds in passes if turn > first]
        return recent if len(recent) >= KEPT else [each[1:] for each in list(passes)[-KEPT:]]

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
