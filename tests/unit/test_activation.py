"""The activation with the loss built in: what it computes, and what it keeps for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN, NewGELUActivation

from deft_ray.density.activation import GELU, SILU, TANH_GELU, Formula, Injection, Injections, MlpActivation, formula_of
from deft_ray.density.approximations import L0
from deft_ray.density.rows import Rows

ROWS, D_FF = 6, 40
ELEMENT = ROWS * D_FF


def silent(_act: Tensor) -> Injections:
    return ()


def injecting(_act: Tensor) -> Injections:
    return [(Rows(), Injection(L0(1e-3), torch.rand(ROWS)))]


def injecting_shared(_act: Tensor) -> Injections:
    return [(Rows(), Injection(L0(1e-3), torch.rand(ROWS), torch.rand(D_FF)))]


def kept_bytes(forward: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> int:
    """Bytes as long as an activation that autograd or anybody in Python keeps of a forward pass, each storage once."""
    torch.manual_seed(0)
    pre, linear = (torch.randn(ROWS, D_FF, dtype=dtype, requires_grad=True) for _ in range(2))
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward(pre * 1, linear * 1)
    gc.collect()
    seen = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.numel() == ELEMENT]
    for tensor in seen:  # what a function holds in its context is nothing that autograd tells of
        if not any(tensor is mine for mine in (pre, linear, out)):
            note(tensor)
    found = sum(tensor.nbytes for tensor in kept.values() if tensor.numel() == ELEMENT)
    out.sum().backward()
    return found


def gated(activation: MlpActivation) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda pre, linear: activation(pre) * linear


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_loss_keeps_nothing_and_the_fused_gate_a_third_of_stock(dtype: torch.dtype, size: int) -> None:
    stock = NewGELUActivation()
    plain = kept_bytes(lambda pre, linear: stock(pre) * linear, dtype)
    without, with_loss, behind = (
        MlpActivation(stock, fused=False, observe=observe, gated=gated_behind)
        for observe, gated_behind in ((silent, True), (injecting, True), (injecting, False))
    )
    fused, fused_loss = (MlpActivation(stock, fused=True, observe=observe) for observe in (silent, injecting))
    with_map, fused_map = (
        MlpActivation(stock, fused=fuse, observe=injecting_shared, gated=True) for fuse in (False, True)
    )

    assert plain == 6 * size * ELEMENT, "the composed GELU keeps five tensors of its own, the product one more"
    assert kept_bytes(gated(without), dtype) == kept_bytes(gated(with_loss), dtype) == plain
    assert kept_bytes(gated(behind), dtype) == plain, "nor where it is computed again of its input"
    assert kept_bytes(fused.gate, dtype) == kept_bytes(fused_loss.gate, dtype) == 2 * size * ELEMENT
    assert kept_bytes(gated(with_map), dtype) == plain, "nor has a loss of the feature map, but for a row of slopes"
    assert kept_bytes(fused_map.gate, dtype) == 2 * size * ELEMENT


def test_what_nobody_told_autograd_of_is_found_too() -> None:
    hoard: list[Tensor] = []

    def hoarding(act: Tensor) -> Injections:
        hoard.append(act)
        return ()

    plain, keeping = (MlpActivation(nn.GELU(), fused=False, observe=observe) for observe in (silent, hoarding))
    bytes_of = [kept_bytes(lambda pre, linear, of=of: of(pre) + linear, torch.float32) for of in (plain, keeping)]
    assert bytes_of == [4 * ELEMENT, 8 * ELEMENT]


@pytest.mark.parametrize(
    "stock",
    [nn.GELU(), nn.SiLU(), nn.ReLU(), ACT2FN["gelu"], ACT2FN["gelu_new"], ACT2FN["quick_gelu"]],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("consumer_keeps", [False, True])
def test_an_ungated_block_keeps_no_more_with_the_loss(stock: nn.Module, consumer_keeps: bool) -> None:
    def block(activation: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda pre, linear: activation(pre) * linear if consumer_keeps else activation(pre) + linear

    plain = kept_bytes(block(stock), torch.float32)
    with_loss = kept_bytes(block(MlpActivation(stock, fused=False, observe=injecting)), torch.float32)

    assert with_loss == plain


@pytest.mark.parametrize(
    ("module", "formula"),
    [
        (nn.GELU(), GELU),
        (nn.GELU(approximate="tanh"), TANH_GELU),
        (nn.SiLU(), SILU),
        (nn.ReLU(), None),
        (ACT2FN["gelu"], GELU),
        (ACT2FN["gelu_pytorch_tanh"], TANH_GELU),
        (ACT2FN["silu"], SILU),
        (ACT2FN["gelu_new"], None),
        (ACT2FN["gelu_python"], None),
        (ACT2FN["quick_gelu"], None),
    ],
)
def test_a_module_is_taken_for_an_operator_only_where_it_is_one(module: nn.Module, formula: Formula | None) -> None:
    assert formula_of(module, fused=False) is formula


def test_fusing_replaces_the_composed_gelu_only() -> None:
    assert formula_of(ACT2FN["gelu_new"], fused=True) is TANH_GELU
    assert formula_of(nn.ReLU(), fused=True) is None
    assert formula_of(nn.GELU(), fused=True) is GELU


@pytest.mark.parametrize(
    ("formula", "reference"),
    [
        (GELU, functional.gelu),
        (TANH_GELU, lambda z: functional.gelu(z, approximate="tanh")),
        (SILU, functional.silu),
    ],
)
def test_backward_of_a_formula_is_autograds_bit_for_bit(
    formula: Formula, reference: Callable[[Tensor], Tensor]
) -> None:
    pre, grad = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33)
    (want,) = torch.autograd.grad(reference(pre), pre, grad)

    assert torch.equal(formula.backward(grad, pre.detach()), want)
    assert torch.equal(formula.forward(pre.detach()), reference(pre).detach())


def test_fused_gate_without_a_loss_is_the_operators_bit_for_bit() -> None:
    activation = MlpActivation(NewGELUActivation(), fused=True, observe=silent)
    pre, linear, grad = (torch.randn(7, 33, requires_grad=True) for _ in range(3))
    want = torch.autograd.grad(functional.gelu(pre, approximate="tanh") * linear, (pre, linear), grad.detach())
    got = torch.autograd.grad(activation.gate(pre, linear), (pre, linear), grad.detach())

    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert activation.name == "GELUTanh"
    assert MlpActivation(NewGELUActivation(), fused=False, observe=silent).name == "NewGELUActivation"


def test_exact_zeros_of_the_fused_gelu_begin_where_the_docstring_says() -> None:
    for dtype, composed in ((torch.float32, -5.16), (torch.bfloat16, -3.06)):
        pre = torch.linspace(-7, -2, 50_001).to(dtype)
        for module, edge in ((NewGELUActivation(), composed), (nn.GELU(approximate="tanh"), -5.06)):
            zeros = pre[module(pre) == 0]
            assert float(zeros.max()) == pytest.approx(edge, abs=0.02), (dtype, module)


def test_without_gradients_the_activation_is_told_of_and_nothing_is_kept() -> None:
    seen: list[Tensor] = []
    for stock in (NewGELUActivation(), nn.GELU(), nn.ReLU()):
        activation = MlpActivation(stock, fused=False, observe=seen.append)
        pre = torch.randn(3, 5, requires_grad=True)
        with torch.no_grad():
            out = activation(pre)
        assert not out.requires_grad
        assert torch.equal(seen[-1], stock(pre).detach())
        assert torch.equal(out, seen[-1])
