"""A context that is too long for its source, cut into overlapping windows that each keep the question whole.

The authors' code also cuts a validation context into pieces, without an overlap, but then scores the answer to the
last piece alone, and in training it cuts the context off. Here nothing is left out: training sees the windows that
show the answer, validation answers in every window and keeps the answer that the model is surest of
(:func:`~deft_ray.tasks.scoring.surest_answers`).

Positions are characters of the context and token numbers within its tokens, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A part of a context's tokens.

    Args:
        first: Number of its first token.
        last: Number after its last token.
        begin: Character at which its first token begins.
        end: Character after its last token.
    """

    first: int
    last: int
    begin: int
    end: int


def cut_windows(spans: Sequence[Span], room: int, overlap: int) -> list[Window]:
    """Cut a context into windows that cover every token.

    Args:
        spans: Characters of each token of the context: (begin, end).
        room: Tokens of a window, at least 1; the last may have fewer.
        overlap: Tokens that two neighbours share. Each window but the last shows at least a quarter of its room anew,
            so that a long question, which leaves little room, does not make a window of every token.

    Returns:
        Windows in order; a single one if all tokens have room.

    Example:
        >>> [(w.first, w.last) for w in cut_windows([(n, n + 1) for n in range(10)], room=6, overlap=2)]
        [(0, 6), (4, 10)]
    """
    stride = max(room - overlap, -(-room // 4))
    firsts = range(0, max(len(spans) - room, 0) + stride, stride)
    lasts = [min(first + room, len(spans)) for first in firsts]
    return [Window(first, last, spans[first][0], spans[last - 1][1]) for first, last in zip(firsts, lasts, strict=True)]


def find_answer(context: str, answer: str, start: int | None) -> list[Span]:
    """Find where an answer stands in its context, blanks around it left out.

    Args:
        context: The whole context.
        answer: The answer; not empty.
        start: Where it is said to begin; not believed if it stands elsewhere.

    Returns:
        Its characters, (begin, end): one place if ``start`` is right, else every place where the text stands, in other
        letter case if nowhere in its own; empty if the context does not hold it.
    """
    answer, blanks = answer.strip(), len(answer) - len(answer.lstrip())
    if start is not None and start >= 0 and context.startswith(answer, start + blanks):
        return [(start + blanks, start + blanks + len(answer))]
    text = re.escape(answer)
    found = list(re.finditer(text, context)) or list(re.finditer(text, context, re.IGNORECASE))
    return [match.span() for match in found]


def windows_with(windows: Sequence[Window], places: Sequence[Span]) -> list[int]:
    """Return the numbers of the windows to train on.

    Args:
        windows: A context's windows, in order.
        places: Where the answer stands.

    Returns:
        All that hold one of the places whole; if there is none, the first of those that hold most of one. An answer
        that stands nowhere, as one in other words, leaves the first window.
    """
    shown = [
        [max(0, min(end, window.end) - max(begin, window.begin)) for begin, end in places] or [0] for window in windows
    ]
    lengths = [end - begin for begin, end in places] or [1]
    whole = [
        number
        for number, parts in enumerate(shown)
        if any(part == length for part, length in zip(parts, lengths, strict=True))
    ]
    return whole or [max(range(len(windows)), key=lambda number: max(shown[number]))]
