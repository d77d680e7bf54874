r"""Draws points that are likely to be good, by two densities over the space: of the good points and of the others.

The tree-structured Parzen estimator (Bergstra et al., 2011; what each part of it does: Watanabe, arXiv:2304.11127)
draws candidates from the density of good points, :math:`l`, and takes the one with the largest :math:`l / g`. Here

- both densities are over all leaves at once, so that leaves which matter together (α and ε) are drawn together;
- a leaf that a point does not read (β with l0) has no say in it, in either density;
- a choice among numbers is ordered: 0.1 says something about 0.3;
- no point is drawn twice while others are left, since a training with the same seed would say the same again.

What is good is the caller's to say: :func:`deft_ray.sweep.order.best`.

Shape suffixes: C candidates, N components (observed points and, last, the whole space), A leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import ndtr

from deft_ray.spec.domains import Domain, Scalar

#: Candidates among which the best is taken.
CANDIDATES = 64
#: Bandwidth on a leaf that is scaled to [0, 1], for one point in one dimension.
_WIDTH = 0.2
#: Rounds of candidates before a point is drawn a second time; the later half of them come from the whole space.
_ROUNDS = 8

Point = Mapping[str, Scalar]
#: Whether a point with these values reads a leaf; asked in the order of the space.
IsRead = Callable[[Point, str], bool]


class Space:
    """A space of points, and each point as a row of coordinates.

    Args:
        domains: By leaf, those first that decide whether others are read.
        is_read: Whether a point reads a leaf.
    """

    def __init__(self, domains: Mapping[str, Domain], is_read: IsRead) -> None:
        self._names, self._is_read = list(domains), is_read
        self._axes = [_Axis(domain) for domain in domains.values()]

    def encode(self, point: Point) -> np.ndarray:
        """Return a point's coordinates, one per leaf; NaN for a leaf that it does not read."""
        pairs = zip(self._names, self._axes, strict=True)
        return np.array([axis.encode(point[name]) if name in point else math.nan for name, axis in pairs])

    def draw(
        self,
        good: Sequence[np.ndarray],
        others: Sequence[np.ndarray],
        dice: np.random.Generator,
        tried: Sequence[np.ndarray] = (),
    ) -> dict[str, Scalar]:
        """Draw a point.

        Args:
            good: Rows of points to draw near to.
            others: Rows of points to keep away from: worse ones, and those that are being tried.
            dice: Source of randomness.
            tried: Rows of points that are not to be drawn again while others are left.
        """
        if not self._axes:
            return {}
        likely, unlikely = _Mixture(self._axes, good), _Mixture(self._axes, others)
        drawn = {row.tobytes() for row in tried}
        found: dict[str, Scalar] = {}
        for round_ in range(_ROUNDS):
            source = likely if round_ < _ROUNDS // 2 else _Mixture(self._axes, [])
            points = [self._decode(row) for row in source.draw(CANDIDATES, dice)]
            rows = [self.encode(point) for point in points]
            new = [place for place, row in enumerate(rows) if row.tobytes() not in drawn]
            asked = new or list(range(CANDIDATES))
            rows_C = np.array([rows[place] for place in asked])
            best = int(np.argmax(likely.log_density(rows_C) - unlikely.log_density(rows_C)))
            found = points[asked[best]]
            if new:
                break
        return found

    def _decode(self, row: Sequence[float]) -> dict[str, Scalar]:
        point: dict[str, Scalar] = {}
        for name, axis, place in zip(self._names, self._axes, row, strict=True):
            if self._is_read(point, name):
                point[name] = axis.decode(place)
        return point


class _Axis:
    """One leaf as a coordinate: a number in [0, 1], or the place of an option.

    Args:
        domain: Its domain.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.options: tuple[Scalar, ...] = ()
        self.ordered = False
        if domain.kind == "choice":
            self.ordered = all(isinstance(arg, int | float) and not isinstance(arg, bool) for arg in domain.args)
            self.options = tuple(sorted(domain.args, key=float)) if self.ordered else domain.args
        elif domain.kind == "loguniform":
            self._low, self._high = (math.log(float(arg)) for arg in domain.args)
        else:
            self._low, self._high = map(float, domain.args)
            self._high += domain.kind == "randint"

    def encode(self, value: Scalar) -> float:
        """Return the coordinate of a value; a whole number lies in the middle of its own interval."""
        if self.options:
            return float(self.options.index(value))
        number = math.log(float(value)) if self.domain.kind == "loguniform" else float(value)
        number += 0.5 if self.domain.kind == "randint" else 0.0
        return min(1.0, max(0.0, (number - self._low) / (self._high - self._low)))

    def decode(self, place: float) -> Scalar:
        """Return the value at a coordinate."""
        if self.options:
            return self.options[int(place)]
        number, (low, high) = self._low + place * (self._high - self._low), self.domain.args
        if self.domain.kind == "randint":
            return min(int(high), math.floor(number))
        number = math.exp(number) if self.domain.kind == "loguniform" else float(number)
        return min(float(high), max(float(low), number))


class _Mixture:
    """A density over the space: the mean of a kernel about every observed point and of the uniform density.

    Args:
        axes: Of the space.
        rows: Coordinates of the points.
    """

    def __init__(self, axes: Sequence[_Axis], rows: Sequence[np.ndarray]) -> None:
        self._axes, self._count = axes, len(rows)
        self._rows_N = np.array([*rows, np.full(len(axes), math.nan)])
        self._width = _WIDTH * max(1, len(rows)) ** (-1.0 / (len(axes) + 4))
        self._shares = [_shares(axis, self._width, len(rows)) if axis.options else None for axis in axes]

    def log_density(self, rows_C: np.ndarray) -> np.ndarray:
        """Return the logarithm of the density at each row of coordinates, up to what no mixture changes."""
        logs_CN = np.zeros((len(rows_C), self._count + 1))
        for axis, shares, place_C, middle_N in zip(self._axes, self._shares, rows_C.T, self._rows_N.T, strict=True):
            logs_CN += self._log_kernel(axis, shares, place_C, middle_N)
        most = logs_CN.max(axis=1, keepdims=True)
        return np.log(np.exp(logs_CN - most).mean(axis=1)) + most[:, 0]

    def _log_kernel(
        self, axis: _Axis, shares: np.ndarray | None, place_C: np.ndarray, middle_N: np.ndarray
    ) -> np.ndarray:
        """Logarithms on one axis, (C, N); where either point has no coordinate, of the uniform density."""
        there_CN = ~np.isnan(place_C)[:, None] & ~np.isnan(middle_N)[None, :]
        if shares is not None:
            share_CN = shares[np.nan_to_num(middle_N).astype(int)][:, np.nan_to_num(place_C).astype(int)].T
            return np.where(there_CN, np.log(share_CN * len(axis.options)), 0.0)
        inside_N = ndtr((1.0 - middle_N) / self._width) - ndtr(-middle_N / self._width)
        z_CN = (place_C[:, None] - middle_N[None, :]) / self._width
        logs_CN = -0.5 * z_CN**2 - np.log(self._width * math.sqrt(2.0 * math.pi) * inside_N)[None, :]
        return np.where(there_CN, logs_CN, 0.0)

    def draw(self, count: int, dice: np.random.Generator) -> np.ndarray:
        """Draw so many rows of coordinates, of all leaves."""
        middles_CA = self._rows_N[dice.integers(self._count + 1, size=count)]
        columns = zip(self._axes, self._shares, middles_CA.T, strict=True)
        return np.stack([self._draw_axis(axis, shares, middle_C, dice) for axis, shares, middle_C in columns], axis=1)

    def _draw_axis(
        self, axis: _Axis, shares: np.ndarray | None, middle_C: np.ndarray, dice: np.random.Generator
    ) -> np.ndarray:
        anywhere_C, share_C = np.isnan(middle_C), dice.random(len(middle_C))
        if shares is not None:
            size = len(axis.options)
            below_C = np.cumsum(shares, axis=1)[np.nan_to_num(middle_C).astype(int)]
            near_C = (share_C[:, None] > below_C[:, :-1]).sum(axis=1)
            return np.where(anywhere_C, np.floor(share_C * size), near_C)
        place_C = np.where(anywhere_C, share_C, np.nan)
        while (missing_C := np.isnan(place_C)).any():  # again where the kernel reaches beyond the space
            drawn_C = dice.normal(middle_C[missing_C], self._width)
            place_C[missing_C] = np.where((drawn_C >= 0.0) & (drawn_C <= 1.0), drawn_C, np.nan)
        return place_C


def _shares(axis: _Axis, width: float, count: int) -> np.ndarray:
    """Return the kernel about each option, (options, options); every option keeps a share that shrinks with count."""
    places = np.arange(len(axis.options))
    if axis.ordered:
        z = (places[:, None] - places[None, :]) / (width * len(places))
        kernel = np.exp(-0.5 * z**2)
    else:
        kernel = np.eye(len(places))
    kernel = kernel / kernel.sum(axis=1, keepdims=True) + 1.0 / (len(places) * (count + 1))
    shares: np.ndarray = kernel / kernel.sum(axis=1, keepdims=True)
    return shares
