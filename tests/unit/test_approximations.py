"""Approximations against numbers worked out by hand and against finite differences in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deft_ray.density.approximations import (
    KINDS,
    L0,
    L1,
    L2,
    Approximation,
    Sigmoid,
    Tanh,
    add_shared_slope,
    add_slope,
    build_approximation,
    slope,
)

#: Each approximation once more, in float64 and as anybody would write it.
REFERENCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l0": lambda act, epsilon: act**2 / (act**2 + epsilon),
    "tanh": lambda act, beta: (torch.exp(2 * beta * act) - 1) / (torch.exp(2 * beta * act) + 1),
    "sigmoid": lambda act, beta: 2 / (1 + torch.exp(-beta * act.abs())) - 1,
    "l1": lambda act, _: act.abs(),
    "l2": lambda act, _: act * act,
}

CASES: list[tuple[Approximation, float, float]] = [
    # approximation, its parameter, the activation at which it bends
    *((L0(epsilon), epsilon, math.sqrt(epsilon)) for epsilon in (1e-9, 1e-7, 1e-5, 1e-2, 1.0)),
    *((Tanh(beta), beta, 1 / beta) for beta in (0.1, 1.0, 20.0, 500.0)),
    *((Sigmoid(beta), beta, 1 / beta) for beta in (0.1, 1.0, 20.0, 500.0)),
    (L1(), 0.0, 1.0),
    (L2(), 0.0, 0.1),
]


@pytest.mark.parametrize(("approximation", "parameter", "bend"), CASES)
def test_values_and_slopes_are_the_formula_and_its_finite_difference(
    approximation: Approximation, parameter: float, bend: float
) -> None:
    act = bend * torch.linspace(
        -20, 20, 402, dtype=torch.float64
    )  # an even count leaves out zero, where |a| has a kink
    step = 1e-5 * bend
    formula = REFERENCE[approximation.kind]
    difference = (formula(act + step, parameter) - formula(act - step, parameter)) / (2 * step)

    torch.testing.assert_close(approximation.value(act).double(), formula(act, parameter), rtol=1e-6, atol=1e-6)
    assert ((slope(approximation, act).double() - difference).abs() * bend).max() < 2e-6


@pytest.mark.parametrize("epsilon", [1e-9, 1e-7, 1e-3, 1.0])
def test_l0_is_one_half_where_the_square_is_epsilon(epsilon: float) -> None:
    root = math.sqrt(epsilon)
    values = L0(epsilon).value(torch.tensor([0.0, root, -root, 1e3 * root, 3 * root]))

    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 0.5, 1.0, 0.9]), rtol=1e-5, atol=2e-6)


def test_the_steepest_slope_of_l0_is_where_algebra_puts_it() -> None:
    steepest = slope(L0(1e-7), torch.tensor([math.sqrt(1e-7 / 3)])).item()

    assert steepest == pytest.approx(3 * math.sqrt(3) / 8 / math.sqrt(1e-7), rel=1e-5)
    assert steepest == pytest.approx(2054, rel=1e-3)


@pytest.mark.parametrize(
    ("approximation", "near", "reach", "far"),
    [(L0(1e-7), 1e-5, 3e-3, 0.1), (Tanh(20.0), 0.0, 0.15, 0.5), (Sigmoid(20.0), 1e-9, 0.3, 1.0)],
)
def test_slopes_reach_as_far_as_the_docstrings_say(
    approximation: Approximation, near: float, reach: float, far: float
) -> None:
    steepest = float(slope(approximation, torch.logspace(-7, 1, 4001)).max())
    low, high, beyond = slope(approximation, torch.tensor([near, reach, far])).tolist()

    assert low > 1e-3 * steepest
    assert 1e-4 * steepest < high < 0.05 * steepest
    assert beyond < 1e-4 * steepest


def test_sigmoid_on_relu_is_tanh_at_half_the_slope() -> None:
    act = torch.rand(1000) * 2

    torch.testing.assert_close(Sigmoid(8.0).value(act), Tanh(4.0).value(act))
    torch.testing.assert_close(slope(Sigmoid(8.0), act), slope(Tanh(4.0), act))


@pytest.mark.parametrize("approximation", [L0(1e-7), Sigmoid(20.0), L1(), L2()], ids=lambda a: a.kind)
def test_even_approximations_have_no_slope_at_zero(approximation: Approximation) -> None:
    act = torch.tensor([0.0, -0.01, 0.01])

    assert slope(approximation, act)[0] == 0.0
    assert slope(approximation, act)[1] == -slope(approximation, act)[2]
    assert approximation.value(act)[1] == approximation.value(act)[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameter", [1e-18, 1e-9, 1.0, 1e9, 1e30])
def test_huge_and_tiny_parameters_stay_finite(kind: str, parameter: float) -> None:
    act = torch.tensor([0.0, 1e-20, 1e-6, 1.0, -1.0, 1e6])
    approximation = build_approximation(kind, epsilon=parameter, beta=parameter)

    assert torch.isfinite(approximation.value(act)).all()
    assert torch.isfinite(slope(approximation, act)).all()
    assert approximation.value(act)[0] == 0
    assert kind in ("l1", "l2") or approximation.value(act).abs().max() <= 1


def test_limits_are_the_indicators() -> None:
    act = torch.tensor([-2.0, -1e-2, 0.0, 1e-2, 2.0])

    assert L0(1e-18).value(act).tolist() == [1, 1, 0, 1, 1]
    assert L0(1e20).value(act).tolist() == pytest.approx([0, 0, 0, 0, 0], abs=1e-19)
    assert Tanh(1e6).value(act).tolist() == [-1, -1, 0, 1, 1]
    assert Sigmoid(1e6).value(act).tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("approximation", [Tanh(20.0), Sigmoid(20.0)], ids=lambda a: a.kind)
def test_slope_far_away_is_flat(approximation: Approximation, infinity: float) -> None:
    assert slope(approximation, torch.tensor([infinity])).item() == 0.0
    assert approximation.value(torch.tensor([infinity])).abs().item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_goes_through_float32(kind: str) -> None:
    act = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e-3
    approximation = build_approximation(kind, epsilon=1e-7, beta=20.0)

    assert approximation.value(act).dtype == slope(approximation, act).dtype == torch.float32
    assert torch.equal(approximation.value(act), approximation.value(act.float()))
    assert torch.equal(slope(approximation, act), slope(approximation, act.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 1024), (2, 200_000)])
def test_add_slope_is_gradient_plus_weight_times_slope(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    grad, act = (torch.randn(*shape, generator=dice).to(dtype) for _ in range(2))
    weight = torch.rand(shape[0], generator=dice)
    approximation = build_approximation(kind, epsilon=1e-2, beta=3.0)
    before = grad.clone()

    got = add_slope(approximation, grad, act, weight)
    want = grad.double() + weight.double().unsqueeze(1) * slope(approximation, act).double()

    assert got.dtype == dtype
    assert torch.equal(grad, before)
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 1024), (2, 200_000)])
def test_a_shared_slope_is_added_to_every_row_by_its_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    grad, slope_F = torch.randn(*shape, generator=dice).to(dtype), torch.randn(shape[1], generator=dice)
    weight, before = torch.rand(shape[0], generator=dice), grad.clone()

    got = add_shared_slope(grad, slope_F, weight)

    assert got.dtype == dtype
    assert torch.equal(grad, before)
    want = grad.double() + weight.double().unsqueeze(1) * slope_F.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_beta_defaults_to_the_published_one() -> None:
    assert build_approximation("tanh", epsilon=1.0, beta=None) == Tanh(20.0)
    assert build_approximation("sigmoid", epsilon=1.0, beta=None) == Sigmoid(20.0)
    assert build_approximation("l0", epsilon=1e-3, beta=None) == L0(1e-3)


@pytest.mark.parametrize("epsilon", [0.0, -1e-7, math.nan, 1e-19])
def test_epsilon_must_be_what_float32_can_hold(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"^epsilon must be at least 1e-18, or float32 loses it \(got .*\)$"):
        L0(epsilon)


@pytest.mark.parametrize("function", [Tanh, Sigmoid])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(function: Callable[[float], Approximation], beta: float) -> None:
    with pytest.raises(ValueError, match=r"^beta must be above 0 \(got .*\)$"):
        function(beta)


def test_an_unknown_kind_is_named() -> None:
    message = r"^approximation must be one of l0, tanh, sigmoid, l1, l2 \(got 'l3'\)$"
    with pytest.raises(ValueError, match=message):
        build_approximation("l3", epsilon=1.0, beta=1.0)
