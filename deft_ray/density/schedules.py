"""How the density loss changes over a training: its weight, and the width of its approximation."""

from __future__ import annotations

import math


def alpha_share(step: int, *, steps: int, delay: float, ramp: float) -> float:
    """Share of α that a step gets.

    A strong loss from the first step on kills a task before its head has learnt it, so α can be switched on late
    (``delay``), or rise linearly (``ramp``).

    Args:
        step: From 0.
        steps: Steps in all.
        delay: Share of the steps before the loss is switched on, in [0, 1].
        ramp: Share of the steps over which it then rises to α, in [0, 1].

    >>> [alpha_share(step, steps=4, delay=0.25, ramp=0.5) for step in range(4)]
    [0.0, 0.5, 1.0, 1.0]
    """
    waited = int(delay * steps)
    if step < waited:
        return 0.0
    rising = int(ramp * steps)
    return min(1.0, (step - waited + 1) / rising) if rising else 1.0


def epsilon_at(step: int, *, steps: int, start: float, end: float | None) -> float:
    """Return ε of a step: constant, or from ``start`` at the first step to ``end`` at the last in equal ratios.

    Args:
        step: From 0.
        steps: Steps in all.
        start: First ε.
        end: Last ε; None for a constant one.

    >>> [round(epsilon_at(step, steps=3, start=1e-2, end=1e-6), 8) for step in range(3)]
    [0.01, 0.0001, 1e-06]
    """
    if end is None or steps == 1:
        return start
    share = step / (steps - 1)
    return math.exp((1.0 - share) * math.log(start) + share * math.log(end))
