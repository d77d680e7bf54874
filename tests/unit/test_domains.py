"""Domains: what they hold, and what is no domain."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from deft_ray.spec.domains import Domain, looks_like_domain, parse_domain


def parsed(kind: str, args: Any) -> Domain:
    domain, faults = parse_domain({kind: args})
    assert faults == []
    assert domain is not None
    return domain


@pytest.mark.parametrize("value", [{"choice": []}, {"uniform": 3}, {"loguniform": None}, {"randint": [1, 2]}])
def test_a_mapping_of_one_kind_is_meant_as_a_domain(value: object) -> None:
    assert looks_like_domain(value)


@pytest.mark.parametrize(
    "value", [None, 3, "choice", ["choice"], {}, {"normal": [0, 1]}, {"choice": [1], "randint": [1, 2]}]
)
def test_anything_else_is_not(value: object) -> None:
    assert not looks_like_domain(value)


@pytest.mark.parametrize(
    ("kind", "args", "types"),
    [
        ("choice", [1, "l0", 0.5, True], [int, str, float, bool]),
        ("choice", [1], [int]),
        ("uniform", [0, 2], [float, float]),
        ("uniform", [-1.5, 1], [float, float]),
        ("loguniform", [1e-9, 1], [float, float]),
        ("randint", [-3, 4], [int, int]),
    ],
)
def test_arguments_keep_their_values_and_bounds_their_kind_of_number(
    kind: str, args: list[Any], types: list[type]
) -> None:
    domain = parsed(kind, args)
    assert list(domain.args) == args
    assert [type(arg) for arg in domain.args] == types


@pytest.mark.parametrize(
    ("kind", "args"),
    [("choice", ["a", 1, False]), ("uniform", [0.0, 2.5]), ("loguniform", [1e-7, 1e-3]), ("randint", [1, 9])],
)
def test_json_gives_the_same_domain_back(kind: str, args: list[Any]) -> None:
    domain = parsed(kind, args)
    again, faults = parse_domain(json.loads(json.dumps(domain.to_json())))
    assert (again, faults) == (domain, [])


@pytest.mark.parametrize(
    ("kind", "args", "text"),
    [
        ("choice", ["l0", 4, True], "choice l0, 4, True"),
        ("uniform", [0, 2], "uniform 0, 2"),
        ("loguniform", [1e-7, 0.25], "loguniform 1e-07, 0.25"),
        ("randint", [1, 64], "randint 1, 64"),
    ],
)
def test_a_domain_reads_like_the_spec(kind: str, args: list[Any], text: str) -> None:
    assert str(parsed(kind, args)) == text


@pytest.mark.parametrize(
    ("kind", "args", "path", "message"),
    [
        ("choice", [], (), "empty domain: a choice needs at least one value (got [])"),
        ("choice", "l0", (), 'must be a list of values (got "l0")'),
        ("choice", None, (), "must be a list of values (got null)"),
        ("choice", {"a": 1}, (), 'must be a list of values (got {"a": 1})'),
        ("choice", [4, None], (1,), "must be a text, a number, or true or false (got null)"),
        ("choice", [["q"], "all-linear"], (0,), 'must be a text, a number, or true or false (got ["q"])'),
        ("choice", [8, 16, 8], (2,), "value stands twice (got 8)"),
        ("choice", [1, 1.0], (1,), "value stands twice (got 1.0)"),
        ("uniform", 3, (), "must be two bounds, [low, high] (got 3)"),
        ("uniform", [], (), "needs two bounds, [low, high] (got [])"),
        ("uniform", [1], (), "needs two bounds, [low, high] (got [1])"),
        ("loguniform", [1, 2, 3], (), "needs two bounds, [low, high] (got [1, 2, 3])"),
        ("uniform", [2, 1], (), "empty domain: the lower bound must be below the upper (got [2, 1])"),
        ("uniform", [1, 1.0], (), "empty domain: the lower bound must be below the upper (got [1, 1.0])"),
        ("randint", [3, 3], (), "empty domain: the lower bound must be below the upper (got [3, 3])"),
        ("uniform", [0, math.nan], (1,), "must be a finite number (got NaN)"),
        ("uniform", [-math.inf, 0], (0,), "must be a finite number (got -Infinity)"),
        ("uniform", [False, 2], (0,), "must be a finite number (got false)"),
        ("loguniform", ["1e-3", 2], (0,), 'must be a finite number (got "1e-3")'),
        ("loguniform", [0, 1], (0,), "must be above 0 on a logarithmic scale (got 0)"),
        ("randint", [1, 2.5], (1,), "must be a whole number (got 2.5)"),
        ("randint", [1, 4.0], (1,), "must be a whole number (got 4.0)"),
        ("randint", [True, 4], (0,), "must be a whole number (got true)"),
    ],
)
def test_faults_say_where_what_and_the_value(kind: str, args: Any, path: tuple[int, ...], message: str) -> None:
    assert parse_domain({kind: args}) == (None, [((kind, *path), message)])


def test_every_bad_bound_is_told() -> None:
    _, faults = parse_domain({"loguniform": [-1, "x"]})
    assert [path for path, _ in faults] == [("loguniform", 0), ("loguniform", 1)]


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Domain("choice", (8, 16)), [8, 16, 16.0], [4, "8", None, True]),
        (Domain("choice", (True, "l0")), [True, "l0"], [1, False, "l", None]),
        (Domain("choice", (0, 1)), [0, 1.0], [True, False]),
        (Domain("uniform", (0.0, 2.0)), [0, 2, 0.0, 1.5, 2.0], [-1e-9, 2.1, math.nan, math.inf, "1", None, True, [1]]),
        (Domain("loguniform", (1e-7, 1e-3)), [1e-7, 1e-5, 1e-3], [0.99e-7, 1.01e-3, 0]),
        (Domain("randint", (2, 4)), [2, 3, 4], [1, 5, 3.0, True, "3"]),
    ],
)
def test_bounds_belong_to_a_domain_and_true_is_no_number(domain: Domain, inside: list[Any], outside: list[Any]) -> None:
    assert [value for value in inside if value not in domain] == []
    assert [value for value in outside if value in domain] == []
