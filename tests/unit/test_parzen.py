"""Points drawn by two densities: against scipy's truncated normal, and in a conditional space."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deft_ray.spec.domains import Domain, Scalar
from deft_ray.sweep.parzen import CANDIDATES, Space, _Axis, _Mixture

NUMBERS = {
    "uniform": Domain("uniform", (-2.0, 3.0)),
    "log": Domain("loguniform", (1e-9, 1e-1)),
    "whole": Domain("randint", (2, 9)),
}
KINDS = Domain("choice", ("l0", "tanh", "sigmoid"))
RATES = Domain("choice", (1.0, 0.01, 0.1, 10.0))


def everywhere(_point: Mapping[str, Scalar], _name: str) -> bool:
    return True


def space(domains: dict[str, Domain], is_read: Any = everywhere) -> Space:
    return Space(domains, is_read)


# --- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "value", "place"),
    [
        (NUMBERS["uniform"], 0.5, 0.5),
        (NUMBERS["log"], 1e-5, 0.5),
        (NUMBERS["log"], 1e-1, 1.0),
        (NUMBERS["whole"], 2, 1 / 16),
        (NUMBERS["whole"], 9, 15 / 16),
        (KINDS, "sigmoid", 2.0),
        (RATES, 1.0, 2.0),
        (Domain("choice", (True, False)), True, 0.0),
    ],
)
def test_a_value_has_its_place_and_back(domain: Domain, value: Scalar, place: float) -> None:
    axis = _Axis(domain)
    assert axis.encode(value) == pytest.approx(place)
    back = axis.decode(axis.encode(value))
    assert type(back) is type(value)
    assert back == (pytest.approx(value) if isinstance(value, float) else value)


def test_no_value_leaves_its_domain() -> None:
    for domain in NUMBERS.values():
        assert all(_Axis(domain).decode(place) in domain for place in (0.0, 1e-17, 0.5, 1.0 - 1e-16, 1.0))


# --- densities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 30])
def test_the_density_of_numbers_is_a_mean_of_truncated_normals_and_the_uniform(count: int) -> None:
    dice = np.random.default_rng(count)
    rows, asked = dice.random((count, 2)), dice.random((20, 2))
    axes = [_Axis(NUMBERS["uniform"]), _Axis(NUMBERS["log"])]
    width = 0.2 * count ** (-1 / 6)
    kernels = [[stats.truncnorm(-m / width, (1 - m) / width, m, width) for m in row] for row in rows]
    want = [math.log((sum(a.pdf(x) * b.pdf(y) for a, b in kernels) + 1.0) / (count + 1)) for x, y in asked]
    assert _Mixture(axes, list(rows)).log_density(asked) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_a_density_over_choices_sums_to_one_and_falls_with_the_distance_where_they_are_numbers() -> None:
    axes = [_Axis(KINDS), _Axis(RATES)]
    mixture = _Mixture(axes, [np.array([1.0, 0.0])])
    shares = {
        (kind, rate): math.exp(mixture.log_density(np.array([[kind, rate]], dtype=float))[0]) / 12
        for kind in range(3)
        for rate in range(4)
    }
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[1, 0] > shares[1, 1] > shares[1, 2] >= shares[1, 3], "0.01 is nearer to 0.1 than to 10"
    assert shares[0, 0] == pytest.approx(shares[2, 0]), "texts have no order"


def test_points_are_drawn_from_the_density_that_is_computed() -> None:
    dice = np.random.default_rng(0)
    axes = [_Axis(NUMBERS["uniform"]), _Axis(RATES)]
    mixture = _Mixture(axes, [np.array([0.1, 3.0]), np.array([0.8, 1.0]), np.array([0.95, math.nan])])
    drawn = mixture.draw(40_000, dice)
    assert ((drawn[:, 0] >= 0.0) & (drawn[:, 0] <= 1.0)).all()
    edges = np.linspace(0.0, 1.0, 6)
    for option in range(4):
        here = drawn[drawn[:, 1] == option][:, 0]
        for low, high in itertools.pairwise(edges):
            grid = np.linspace(low, high, 201)
            density = np.exp(mixture.log_density(np.stack([grid, np.full(201, float(option))], axis=1)))
            share = np.trapezoid(density, grid) / 4
            assert np.mean((drawn[:, 1] == option) & (drawn[:, 0] >= low) & (drawn[:, 0] < high)) == pytest.approx(
                share, abs=0.008
            ), (option, low, len(here))


def test_a_leaf_that_a_point_does_not_read_has_no_say() -> None:
    axes = [_Axis(KINDS), _Axis(NUMBERS["log"])]
    without = _Mixture(axes, [np.array([0.0, math.nan])])
    alone = _Mixture(axes, [np.array([0.0, math.nan]), np.array([0.0, 0.3])])
    places = np.array([[0.0, x] for x in (0.1, 0.3, 0.9)])
    assert np.ptp(without.log_density(places)) == pytest.approx(0.0), "uniform on the leaf"
    assert np.argmax(alone.log_density(places)) == 1
    assert np.isfinite(alone.log_density(np.array([[1.0, math.nan]]))).all()


# --- points -----------------------------------------------------------------------------------------------------------


def beta_with_sigmoid(point: Mapping[str, Scalar], name: str) -> bool:
    return name != "beta" or point["kind"] == "sigmoid"


def test_a_point_has_the_leaves_that_it_reads() -> None:
    mine = space({"kind": KINDS, "beta": NUMBERS["log"], "alpha": NUMBERS["uniform"]}, beta_with_sigmoid)
    dice, rows, kinds = np.random.default_rng(0), list[np.ndarray](), Counter[str]()
    for number in range(40):
        point = mine.draw(rows[::4], [row for place, row in enumerate(rows) if place % 4], dice)
        assert set(point) == {"kind", "alpha"} | ({"beta"} if point["kind"] == "sigmoid" else set()), number
        kinds[str(point["kind"])] += 1
        rows.append(mine.encode(mine.draw([], [], dice)))
    assert len(kinds) == 3


def test_no_point_is_drawn_twice_while_there_are_others() -> None:
    mine = space({"kind": KINDS, "rate": RATES, "whole": Domain("randint", (1, 3))})
    for seed in range(5):
        dice, rows = np.random.default_rng(seed), list[np.ndarray]()
        for _ in range(36):
            rows.append(mine.encode(mine.draw(rows[:3], rows[3:], dice, rows)))
        assert len({row.tobytes() for row in rows}) == 36
        assert mine.draw(rows[:3], rows[3:], dice, rows)["kind"] in KINDS, "all are drawn: one of them again"


def test_points_are_drawn_near_to_the_good_ones_and_away_from_the_others() -> None:
    """Good where α and ε fall together, a ridge that no leaf shows alone."""
    mine = space({"alpha": Domain("uniform", (0.0, 1.0)), "epsilon": Domain("uniform", (0.0, 1.0))})
    dice = np.random.default_rng(0)
    tried = dice.random((80, 2))
    off = np.abs(tried[:, 0] + tried[:, 1] - 1.0)
    good, others = list(tried[off < 0.15]), list(tried[off >= 0.15])
    drawn = [mine.draw(good, others, dice) for _ in range(60)]
    misses = [abs(float(point["alpha"]) + float(point["epsilon"]) - 1.0) for point in drawn]
    assert np.median(misses) < 0.1
    assert np.median(off) > 0.25, "what chance does"
    assert np.ptp([float(point["alpha"]) for point in drawn]) > 0.5, "all along the ridge"


def test_a_draw_is_a_function_of_its_seed() -> None:
    mine = space({"kind": KINDS, **NUMBERS})
    rows = [mine.encode(mine.draw([], [], np.random.default_rng(seed))) for seed in range(12)]
    first, again = (mine.draw(rows[:4], rows[4:], np.random.default_rng(7)) for _ in range(2))
    assert first == again
    assert CANDIDATES > 1
    assert mine.draw(rows[:4], rows[4:], np.random.default_rng(8)) != first
