"""The backward pass of an activation with the density loss in it, as one Triton kernel for a GPU.

Composed of torch's operators it is eight to a dozen kernels, each a trip through memory; here every element is read and
written once. All is computed in float32; the activation is rounded to its dtype first, because the loss is one of the
activation that the forward pass gave.

Needs Triton, which torch brings along where it is built for CUDA; :mod:`deft_ray.density.activation` does without it
elsewhere.

Shape suffixes: N rows (tokens), F d_ff.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deft_ray.density.approximations import L0, Approximation, Sigmoid, Tanh

#: Elements of a row that one program takes.
_BLOCK = 1024


@triton.jit
def _backward_kernel(
    grad_ptr: Any,
    pre_ptr: Any,
    linear_ptr: Any,
    weight_ptr: Any,
    grad_pre_ptr: Any,
    grad_linear_ptr: Any,
    width: Any,
    parameter: Any,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(pre_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + row)

    if FORMULA == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        act = z * share
        derivative = share + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif FORMULA == "tanh_gelu":
        inner = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        share = 1.0 / (1.0 + tl.exp(-inner))  # (1 + tanh(inner / 2)) / 2 without the cancellation
        act = z * share
        derivative = share + act * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif FORMULA == "silu":
        share = 1.0 / (1.0 + tl.exp(-z))
        act = z * share
        derivative = share * (1.0 + z * (1.0 - share))
    else:
        act = z
        derivative = 1.0
    act = act.to(pre_ptr.dtype.element_ty).to(tl.float32)

    sign = tl.where(act > 0.0, 1.0, tl.where(act < 0.0, -1.0, 0.0))
    if KIND == "l0":
        whole = act * act + parameter
        slope = 2.0 * parameter * act / (whole * whole)
    elif KIND == "l1":
        slope = sign
    elif KIND == "l2":
        slope = 2.0 * act
    else:  # tanh and sigmoid: 1 - tanh² without the cancellation
        steep = parameter if KIND == "tanh" else 0.5 * parameter
        tail = tl.exp(-2.0 * steep * tl.abs(act))
        slope = steep * 4.0 * tail / ((1.0 + tail) * (1.0 + tail))
        if KIND == "sigmoid":
            slope = slope * sign

    upper = grad
    if GATED:
        upper = grad * tl.load(linear_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_linear_ptr + place, (grad * act).to(grad_linear_ptr.dtype.element_ty), mask=inside)
    grad_pre = (upper + weight * slope) * derivative
    tl.store(grad_pre_ptr + place, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=inside)


def backward(
    grad: Tensor, pre: Tensor, linear: Tensor | None, weight_N: Tensor, approximation: Approximation, formula: str
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients at ``pre`` and, of a gated block, at ``linear``.

    Args:
        grad: (..., F) gradient at the activation, or at its product with ``linear``.
        pre: (..., F) input of the activation.
        linear: (..., F) what the activation is multiplied with; None without a gate.
        weight_N: Weight of each row's slopes, float32.
        approximation: Smooth indicator.
        formula: ``gelu``, ``tanh_gelu`` or ``silu``; ``identity`` where ``pre`` is the activation itself.
    """
    grad, pre = grad.contiguous(), pre.contiguous()
    linear = linear.contiguous() if linear is not None else None
    grad_pre = torch.empty_like(grad)
    grad_linear = torch.empty_like(grad) if linear is not None else None
    width = pre.shape[-1]
    _backward_kernel[(weight_N.numel(), triton.cdiv(width, _BLOCK))](
        grad,
        pre,
        linear,
        weight_N.contiguous(),
        grad_pre,
        grad_linear,
        width,
        _parameter(approximation),
        FORMULA=formula,
        KIND=approximation.kind,
        GATED=linear is not None,
        BLOCK=_BLOCK,
    )
    return grad_pre, grad_linear


def _parameter(approximation: Approximation) -> float:
    match approximation:
        case L0():
            return approximation.epsilon
        case Tanh() | Sigmoid():
            return approximation.beta
        case _:
            return 0.0
