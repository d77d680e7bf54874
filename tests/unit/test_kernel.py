"""The Triton kernel against float64: on a GPU itself, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

from deft_ray.density import activation, kernel
from deft_ray.density.activation import Injection
from deft_ray.density.approximations import L0, L1, L2, Approximation, Sigmoid, Tanh
from deft_ray.density.rows import Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "tanh_gelu": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "identity": lambda z: z,
}
#: Each with its own formula in float64.
APPROXIMATIONS: tuple[tuple[Approximation, Callable[[Tensor], Tensor]], ...] = (
    (L0(1e-3), lambda a: a**2 / (a**2 + 1e-3)),
    (L0(1e-7), lambda a: a**2 / (a**2 + 1e-7)),
    (Tanh(20.0), lambda a: torch.tanh(20.0 * a)),
    (Sigmoid(3.0), lambda a: 2.0 * torch.sigmoid(3.0 * a.abs()) - 1.0),
    (L1(), torch.abs),
    (L2(), torch.square),
)


def reference(
    grad: Tensor, pre: Tensor, linear: Tensor | None, weight_N: Tensor, value: Callable[[Tensor], Tensor], formula: str
) -> tuple[Tensor, ...]:
    """Autograd in float64, of a loss that has ``grad`` as its gradient at the block's output."""
    inputs = [tensor.double().requires_grad_() for tensor in (pre, linear) if tensor is not None]
    act = FORMULAS[formula](inputs[0])
    out = act if linear is None else act * inputs[1]
    loss = (grad.double() * out).sum() + (weight_N.double().view(*pre.shape[:-1], 1) * value(act)).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", range(len(APPROXIMATIONS)))
def test_the_kernel_is_the_gradient(formula: str, gated: bool, case: int) -> None:
    """Over rows that are longer than a block and no multiple of it."""
    approximation, value = APPROXIMATIONS[case]
    dice = torch.Generator().manual_seed(case)
    grad, pre, linear = (torch.randn(2, 3, 1500, generator=dice).to(DEVICE) for _ in range(3))
    weight_N = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0], device=DEVICE)
    got = kernel.backward(grad, pre, linear if gated else None, weight_N, approximation, formula)
    want = reference(grad, pre, linear if gated else None, weight_N, value, formula)

    assert (got[1] is None) is not gated
    for one, other in zip(got, want, strict=False):
        assert one is not None
        # an activation that is off by a rounding meets a slope that changes by 1/√ε within √ε
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=2e-5)


def test_strided_inputs_and_rows_without_weight() -> None:
    grad, pre = (torch.randn(5, 8, device=DEVICE).t() for _ in range(2))
    weight_N = torch.zeros(8, device=DEVICE)
    got, _ = kernel.backward(grad, pre, None, weight_N, L0(1e-3), "gelu")

    torch.testing.assert_close(got, torch.ops.aten.gelu_backward(grad, pre))


def rounded(act: Tensor) -> Tensor:
    """A float32 tensor in bfloat16 as the device rounds it: a GPU to the nearest, Triton's interpreter towards zero."""
    return act.bfloat16() if act.is_cuda else (act.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def test_bfloat16_takes_the_slope_of_the_rounded_activation() -> None:
    dice = torch.Generator().manual_seed(0)
    grad, pre, linear = (torch.randn(4, 300, generator=dice).bfloat16().to(DEVICE) for _ in range(3))
    weight_N = torch.full((4,), 10.0, device=DEVICE)
    got = kernel.backward(grad, pre, linear, weight_N, Tanh(20.0), "tanh_gelu")
    act = rounded(functional.gelu(pre.float(), approximate="tanh")).double()
    z = pre.double().requires_grad_()
    (derivative,) = torch.autograd.grad(functional.gelu(z, approximate="tanh").sum(), z)
    slope = 20.0 / torch.cosh(20.0 * act) ** 2
    want = (grad.double() * linear.double() + 10.0 * slope) * derivative

    assert got[0].dtype == got[1].dtype == torch.bfloat16
    torch.testing.assert_close(got[0].double(), want, rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(got[1].double(), grad.double() * act, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("stock", [nn.ReLU(), nn.GELU(), NewGELUActivation()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("gated", [True, False])
def test_the_activation_trains_the_same_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch, stock: nn.Module, gated: bool
) -> None:
    """Without it on a CPU; on a GPU it is what runs by itself."""
    injection = Injection(L0(1e-2), torch.rand(6, device=DEVICE))
    pre, linear, grad = (torch.randn(2, 3, 70, device=DEVICE, requires_grad=True) for _ in range(3))
    found = []
    for used in (None, kernel):
        monkeypatch.setattr(activation, "_kernel_for", lambda _tensor, used=used: used)
        block = activation.MlpActivation(stock, fused=True, observe=lambda _act: [(Rows(), injection)])
        out = block.gate(pre, linear) if gated and block.formula is not None else block(pre) * linear
        found.append(torch.autograd.grad(out, (pre, linear), grad.detach()))

    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
