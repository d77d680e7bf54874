"""Domains: what stands in a spec in place of a value that is searched."""

from __future__ import annotations

import math
from dataclasses import dataclass

Scalar = str | int | float | bool

KINDS = ("choice", "uniform", "loguniform", "randint")


@dataclass(frozen=True)
class Domain:
    """A set of values for one leaf of the spec.

    Args:
        kind: ``choice`` (any of ``args``), ``uniform`` or ``loguniform`` (a float between two bounds), ``randint``
            (a whole number between two bounds, both included).
        args: The values of a choice, else the lower and the upper bound.
    """

    kind: str
    args: tuple[Scalar, ...]

    def __str__(self) -> str:
        return f"{self.kind} {', '.join(f'{arg:g}' if isinstance(arg, float) else str(arg) for arg in self.args)}"

    def to_json(self) -> dict[str, list[Scalar]]:
        """Return the domain as it stands in YAML: ``{kind: [args]}``."""
        return {self.kind: list(self.args)}


def looks_like_domain(value: object) -> bool:
    """Tell whether a YAML node was meant as a domain: a mapping with one key that names a kind."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in KINDS


def parse_domain(value: dict[str, object]) -> tuple[Domain | None, list[tuple[tuple[str | int, ...], str]]]:
    """Read ``{kind: [args]}``.

    Args:
        value: A mapping for which :func:`looks_like_domain` holds.

    Returns:
        The domain, or None with the faults: (path below the mapping, message) pairs.
    """
    kind, args = next(iter(value.items()))
    if not isinstance(args, list) or any(not isinstance(arg, str | int | float | bool) for arg in args):
        return None, [((kind,), f"must be a list of values (got {args!r})")]
    if kind == "choice":
        if not args:
            return None, [((kind,), "empty domain: a choice needs at least one value (got [])")]
        if len(set(map(repr, args))) < len(args):
            return None, [((kind,), f"a value stands twice (got {args!r})")]
        return Domain(kind, tuple(args)), []
    return _parse_bounds(kind, args)


def _parse_bounds(
    kind: str, args: list[Scalar]
) -> tuple[Domain | None, list[tuple[tuple[str | int, ...], str]]]:
    if len(args) != 2:
        return None, [((kind,), f"needs two bounds, [low, high] (got {args!r})")]
    wanted = int if kind == "randint" else (int, float)
    faults: list[tuple[tuple[str | int, ...], str]] = []
    for index, arg in enumerate(args):
        if isinstance(arg, bool) or not isinstance(arg, wanted) or not math.isfinite(arg):
            faults.append(((kind, index), f"must be a {'whole' if kind == 'randint' else 'finite'} number (got {arg!r})"))
    if faults:
        return None, faults
    low, high = args
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if kind == "loguniform" and low <= 0:
        faults.append(((kind, 0), f"must be above 0 on a logarithmic scale (got {low!r})"))
    if not low < high:
        faults.append(((kind,), f"empty domain: the lower bound must be below the upper (got [{low!r}, {high!r}])"))
    if faults:
        return None, faults
    if kind == "randint":
        return Domain(kind, (low, high)), []
    return Domain(kind, (float(low), float(high))), []
