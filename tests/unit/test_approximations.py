"""Approximations against numbers worked out by hand and against finite differences in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deft_ray.density.approximations import (
    Approximation,
    soft_nonzero,
    soft_nonzero_slope,
    soft_positive,
    soft_positive_slope,
)


def l0(act: Tensor, epsilon: float) -> Tensor:
    return act.double() ** 2 / (act.double() ** 2 + epsilon)


def tanh(act: Tensor, beta: float) -> Tensor:
    exponential = torch.exp(2 * beta * act.double())
    return (exponential - 1) / (exponential + 1)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-7, 1e-3, 1.0])
def test_soft_nonzero_is_one_half_where_the_square_is_epsilon(epsilon: float) -> None:
    root = math.sqrt(epsilon)
    values = soft_nonzero(torch.tensor([0.0, root, -root, 1e3 * root, 3 * root]), epsilon)

    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 0.5, 1.0, 0.9]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-7, 1e-5, 1e-2, 1.0])
def test_slope_of_soft_nonzero_is_its_finite_difference(epsilon: float) -> None:
    act = math.sqrt(epsilon) * torch.linspace(-20, 20, 401, dtype=torch.float64)
    step = 1e-4 * math.sqrt(epsilon)
    difference = (l0(act + step, epsilon) - l0(act - step, epsilon)) / (2 * step)

    slope = soft_nonzero_slope(act, epsilon).double()

    # In units of the steepest slope, 3√3/8 / √ε.
    assert ((slope - difference).abs() * math.sqrt(epsilon)).max() < 1e-6
    torch.testing.assert_close(soft_nonzero(act, epsilon).double(), l0(act, epsilon), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0, 20.0, 500.0])
def test_slope_of_soft_positive_is_its_finite_difference(beta: float) -> None:
    act = torch.linspace(-4, 4, 401, dtype=torch.float64) / beta
    step = 1e-5 / beta
    difference = (tanh(act + step, beta) - tanh(act - step, beta)) / (2 * step)

    slope = soft_positive_slope(act, beta).double()

    assert ((slope - difference).abs() / beta).max() < 1e-6
    torch.testing.assert_close(soft_positive(act, beta).double(), tanh(act, beta), rtol=1e-5, atol=1e-6)


def test_the_steepest_slope_of_soft_nonzero_is_where_algebra_puts_it() -> None:
    epsilon = 1e-7
    act = torch.tensor([math.sqrt(epsilon / 3)])

    slope = soft_nonzero_slope(act, epsilon)

    assert slope.item() == pytest.approx(3 * math.sqrt(3) / 8 / math.sqrt(epsilon), rel=1e-5)
    assert slope.item() == pytest.approx(2054, rel=1e-3)


@pytest.mark.parametrize("kind", ["l0", "tanh"])
@pytest.mark.parametrize("parameter", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_huge_and_tiny_parameters_stay_finite(kind: str, parameter: float) -> None:
    act = torch.tensor([0.0, 1e-20, 1e-6, 1.0, -1.0, 1e6])
    approximation = Approximation(kind, parameter)

    assert torch.isfinite(approximation.value(act)).all()
    assert torch.isfinite(approximation.slope(act)).all()
    assert approximation.value(act).abs().max() <= 1
    assert approximation.value(act)[0] == 0


def test_limits_are_the_indicators() -> None:
    act = torch.tensor([-2.0, -1e-2, 0.0, 1e-2, 2.0])

    assert soft_nonzero(act, 1e-20).tolist() == [1, 1, 0, 1, 1]
    assert soft_nonzero(act, 1e20).tolist() == pytest.approx([0, 0, 0, 0, 0], abs=1e-19)
    assert soft_positive(act, 1e6).tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_slope_far_away_is_flat_for_tanh(infinity: float) -> None:
    assert soft_positive_slope(torch.tensor([infinity]), 20.0).item() == 0.0
    assert soft_positive(torch.tensor([infinity]), 20.0).item() == math.copysign(1.0, infinity)


@pytest.mark.parametrize("kind", ["l0", "tanh"])
def test_bfloat16_goes_through_float32(kind: str) -> None:
    act = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e-3
    approximation = Approximation(kind, 1e-7 if kind == "l0" else 20.0)

    assert approximation.value(act).dtype == approximation.slope(act).dtype == torch.float32
    assert torch.equal(approximation.value(act), approximation.value(act.float()))
    assert torch.equal(approximation.slope(act), approximation.slope(act.float()))


def test_approximation_picks_the_function_of_its_kind() -> None:
    act = torch.tensor([-0.3, 0.02])

    assert torch.equal(Approximation("l0", 1e-3).value(act), soft_nonzero(act, 1e-3))
    assert torch.equal(Approximation("tanh", 5.0).slope(act), soft_positive_slope(act, 5.0))


@pytest.mark.parametrize("function", [soft_nonzero, soft_nonzero_slope])
@pytest.mark.parametrize("epsilon", [0.0, -1e-7, math.nan])
def test_epsilon_must_be_positive(function: object, epsilon: float) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"^epsilon must be above 0 \(got .*\)$"):
        function(torch.zeros(1), epsilon)


@pytest.mark.parametrize("function", [soft_positive, soft_positive_slope])
def test_beta_must_be_positive(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"^beta must be above 0 \(got -1\.0\)$"):
        function(torch.zeros(1), -1.0)


@pytest.mark.parametrize(
    ("kind", "parameter", "message"),
    [
        ("sigmoid", 1.0, r"approximation must be 'l0' or 'tanh' \(got 'sigmoid'\)"),
        ("l0", 0.0, r"epsilon must be above 0 \(got 0\.0\)"),
        ("tanh", math.nan, r"beta must be above 0 \(got nan\)"),
    ],
)
def test_approximation_refuses_what_it_does_not_know(kind: str, parameter: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Approximation(kind, parameter)
