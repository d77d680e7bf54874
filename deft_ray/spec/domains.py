"""Domains: what stands in a spec in place of a value that is searched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deft_ray.spec.yaml_tree import Fault, show

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

    def __contains__(self, value: object) -> bool:
        """Tell whether a value lies in the domain, bounds included; true and false are no numbers."""
        if self.kind == "choice":
            return any(_same(value, arg) for arg in self.args)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "randint" else int | float):
            return False
        low, high = map(float, self.args)
        return low <= value <= high

    def to_json(self) -> dict[str, list[Scalar]]:
        """Return the domain as it stands in YAML: ``{kind: [args]}``."""
        return {self.kind: list(self.args)}


def _same(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def looks_like_domain(value: object) -> bool:
    """Tell whether a YAML node was meant as a domain: a mapping with one key that names a kind."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in KINDS


def parse_domain(value: dict[str, Any]) -> tuple[Domain | None, list[Fault]]:
    """Read ``{kind: [args]}``.

    Args:
        value: A mapping for which :func:`looks_like_domain` holds.

    Returns:
        The domain, or None with the faults: (path below the mapping, message) pairs.
    """
    kind, args = next(iter(value.items()))
    if not isinstance(args, list):
        wanted = "a list of values" if kind == "choice" else "two bounds, [low, high]"
        return None, [((kind,), f"must be {wanted} (got {show(args)})")]
    return _parse_choice(args) if kind == "choice" else _parse_bounds(kind, args)


def _parse_choice(args: list[Any]) -> tuple[Domain | None, list[Fault]]:
    if not args:
        return None, [(("choice",), "empty domain: a choice needs at least one value (got [])")]
    faults: list[Fault] = []
    for index, arg in enumerate(args):
        if not isinstance(arg, Scalar):
            faults.append((("choice", index), f"must be a text, a number, or true or false (got {show(arg)})"))
        elif any(_same(arg, before) for before in args[:index]):
            faults.append((("choice", index), f"value stands twice (got {show(arg)})"))
    return (None if faults else Domain("choice", tuple(args))), faults


def _parse_bounds(kind: str, args: list[Any]) -> tuple[Domain | None, list[Fault]]:
    if len(args) != 2:
        return None, [((kind,), f"needs two bounds, [low, high] (got {show(args)})")]
    wanted = int if kind == "randint" else int | float
    faults: list[Fault] = []
    for index, arg in enumerate(args):
        if isinstance(arg, bool) or not isinstance(arg, wanted) or not math.isfinite(arg):
            must = f"must be a {'whole' if kind == 'randint' else 'finite'} number"
            faults.append(((kind, index), f"{must} (got {show(arg)})"))
        elif kind == "loguniform" and arg <= 0:
            faults.append(((kind, index), f"must be above 0 on a logarithmic scale (got {show(arg)})"))
    if not faults and not args[0] < args[1]:
        faults.append(((kind,), f"empty domain: the lower bound must be below the upper (got {show(args)})"))
    if faults:
        return None, faults
    return Domain(kind, tuple(args) if kind == "randint" else tuple(map(float, args))), []
