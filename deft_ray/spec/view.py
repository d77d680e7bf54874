"""A spec under check, as its rules see it: values and domains as they stand, whatever else is broken."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from deft_ray.spec.domains import Domain
from deft_ray.spec.yaml_tree import Path


@dataclass(frozen=True)
class View:
    """The tree with defaults by hand: what the rules need, whatever is broken elsewhere."""

    values: dict[str, Any]
    space: dict[str, Domain]
    broken: Collection[Path]

    def get(self, dotted: str, default: Any = None) -> Any:
        node: Any = self.values
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return default if node is None else node

    def options(self, dotted: str, default: Any = None) -> tuple[Any, ...]:
        """Return the values that a leaf can take: of a range of numbers the first few and the last."""
        domain = self.space.get(dotted)
        if domain is None:
            return (self.get(dotted, default),)
        if domain.kind != "randint":
            return domain.args
        low, high = (int(bound) for bound in domain.args)
        return (*range(low, min(low + 64, high)), high)

    def is_broken(self, dotted: str) -> bool:
        return any(touches(tuple(dotted.split(".")), path) for path in self.broken)


def touches(one: Path, other: Path) -> bool:
    """Tell whether two paths are about the same thing: equal, or one above the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def all_values(view: View, dotted: str, default: Any) -> list[tuple[Path, Any]]:
    """Every value that a leaf has in some trial or baseline, with where it stands."""
    values: list[tuple[Path, Any]] = [(tuple(dotted.split(".")), value) for value in view.options(dotted, default)]
    baseline = view.get("baseline")
    if isinstance(baseline, dict) and dotted in baseline:
        values.append((("baseline", dotted), baseline[dotted]))
    return values


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    return type(value) in (int, float)
