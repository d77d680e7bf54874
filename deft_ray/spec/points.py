"""The points of a sweep that are known before it starts: those to try first, a grid's, and a path's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from deft_ray.spec.domains import Domain, Scalar
from deft_ray.spec.resolve import DECIDING, is_read
from deft_ray.spec.schema import SweepSpec

Point = dict[str, Scalar]


def count_points(spec: SweepSpec) -> int:
    """Points of each task: ``search.trials``, or all of a grid or a path."""
    if spec.search.path is not None:
        return len(path(spec))
    return len(grid(spec)) if spec.search.sampler == "grid" else spec.search.trials


def first_points(spec: SweepSpec) -> list[Point]:
    """Points that come before the sampler's own: of a grid or a path all, else ``search.try_first``."""
    if spec.search.path is not None:
        return path(spec)
    if spec.search.sampler == "grid":
        return grid(spec)
    return [dict(point) for point in spec.search.try_first[: spec.search.trials]]


def grid(spec: SweepSpec) -> list[Point]:
    """Every combination of the values of choices and of whole numbers, leaves that are not read left out."""
    names = list(deciding_first(spec))
    found: dict[tuple[tuple[str, Scalar], ...], None] = {}
    for combination in itertools.product(*(_values(spec.space[name]) for name in names)):
        values = dict(zip(names, combination, strict=True))
        found.setdefault(tuple((name, values[name]) for name in spec.space if is_read(spec, values, name)))
    return [dict(point) for point in found]


def path(spec: SweepSpec) -> list[Point]:
    """Rising values of α: a choice's, or ``search.trials`` evenly spread over a range, on a log scale if it has one."""
    domain, count = spec.space["deft.alpha"], spec.search.trials
    if domain.kind == "choice":
        return [{"deft.alpha": value} for value in sorted(domain.args, key=float)]
    low, high = map(float, domain.args)
    shares = [index / max(1, count - 1) for index in range(count)]
    if domain.kind == "loguniform":
        alphas = [low * (high / low) ** share for share in shares]
    else:
        alphas = [low + share * (high - low) for share in shares]
    return [{"deft.alpha": min(high, alpha)} for alpha in alphas]


def deciding_first(spec: SweepSpec) -> Iterator[str]:
    """Searched leaves in an order in which those that decide whether others are read come first."""
    return iter(sorted(spec.space, key=lambda dotted: dotted not in DECIDING))


def sample_of(spec: SweepSpec, config: Mapping[str, Scalar | None]) -> Point:
    """Return the values of the searched leaves that a trial with these settings reads."""
    sample: Point = {}
    for dotted in deciding_first(spec):
        value = config.get(dotted)
        if value is not None and is_read(spec, sample, dotted):
            sample[dotted] = value
    return sample


def _values(domain: Domain) -> Sequence[Scalar]:
    return domain.args if domain.kind == "choice" else range(int(domain.args[0]), int(domain.args[1]) + 1)
