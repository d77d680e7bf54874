"""The activation of an MLP block, with the density loss built in: counts it, or adds the loss's gradient to it.

The loss has a closed-form gradient that needs nothing but the activation. So no loss tensor is built and nothing is
kept for the backward pass that the block does not keep anyway: an autograd function computes the activation in the
forward pass, and its backward pass adds the gradient. That is right under gradient checkpointing of both kinds, where a
list of hooked activations loses its gradient or counts twice.

Shape suffixes: B batch, T tokens, F d_ff, N rows (B times T).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deft_ray.density.approximations import L1, Approximation, add_shared_slope, add_slope
from deft_ray.density.rows import Rows

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Formula:
    """An activation function that is one operator of torch, so that its gradient needs its input only.

    Args:
        name: What the kernel calls it.
        forward: Input to activation.
        backward: (gradient at the activation, input) to gradient at the input.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


GELU = Formula("gelu", functional.gelu, torch.ops.aten.gelu_backward)
TANH_GELU = Formula(
    "tanh_gelu",
    lambda z: functional.gelu(z, approximate="tanh"),
    lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
)
SILU = Formula("silu", functional.silu, torch.ops.aten.silu_backward)

#: By class name of the module, as torch and transformers call them. ReLU is not here: torch keeps its output anyway.
_FORMULAS = {
    "GELU": (GELU, TANH_GELU),
    "GELUActivation": (GELU,),
    "GELUTanh": (TANH_GELU,),
    "PytorchGELUTanh": (TANH_GELU,),
    "SiLU": (SILU,),
    "SiLUActivation": (SILU,),
}
#: The same function composed of several operators, which keep five tensors where one operator keeps its input.
_COMPOSED_TANH_GELU = ("NewGELUActivation", "FastGELUActivation")


def formula_of(module: nn.Module, *, fused: bool) -> Formula | None:
    """Return the operator that an activation module is, bit for bit; None if it is none.

    Args:
        module: The activation module.
        fused: Take the one operator ``gelu(approximate="tanh")`` for a GELU that is composed of several. Equal to
            rounding, but not in its exact zeros: in float32 below -5.06 and not below -5.16, in bfloat16 below -5.06
            and not below -3.06.
    """
    if fused and type(module).__name__ in _COMPOSED_TANH_GELU:
        return TANH_GELU
    probe = torch.linspace(-6.0, 6.0, 97)
    formulas = _FORMULAS.get(type(module).__name__, ())
    return next((formula for formula in formulas if torch.equal(formula.forward(probe), module(probe))), None)


@dataclass(frozen=True)
class Injection:
    """The density loss of one block in one forward and backward pass.

    Args:
        approximation: Smooth indicator.
        weight_N: Weight of each row's slopes, float32; 0 at padding.
        slope_F: Slope that all rows share, float32, where the loss is of the feature map; None where each activation
            has its own.
    """

    approximation: Approximation
    weight_N: Tensor  # noqa: N815
    slope_F: Tensor | None = None  # noqa: N815


#: What to inject into the rows of a pass, which follow on each other; empty for nothing at all.
Injections = Sequence[tuple[Rows, Injection | None]]

#: Called with each activation (..., d_ff); returns what to inject.
Observe = Callable[[Tensor], Injections]


class MlpActivation(nn.Module):
    """Stands in for a block's activation module.

    Args:
        stock: The module it stands in for.
        fused: See :func:`formula_of`.
        observe: Told of each activation.
        gated: Whether a product behind it keeps the activation for its own backward pass.

    Attributes:
        tau: Activations of at most this magnitude become zero; 0 in training. In the activation's dtype.
    """

    def __init__(self, stock: nn.Module, *, fused: bool, observe: Observe, gated: bool = False) -> None:
        super().__init__()
        self.stock, self.observe, self.tau = stock, observe, 0.0
        self._output_is_kept = gated or isinstance(stock, nn.ReLU)
        self.formula = formula_of(stock, fused=fused)
        self.name = "GELUTanh" if fused and self.formula is TANH_GELU else type(stock).__name__

    @torch.compiler.disable  # ε and weights change from step to step: the compiler would trace each anew, or wrongly
    def forward(self, pre_BTF: Tensor) -> Tensor:
        """Return the activation of ``pre_BTF``."""
        if self.formula is None:
            kept_BTF = self._cut(self.stock(pre_BTF))
            injections = self.observe(kept_BTF)
            if not injections or not kept_BTF.requires_grad:
                return kept_BTF
            source = (kept_BTF, None) if self._output_is_kept else (pre_BTF, self.stock)
            after: Tensor = _InjectAfter.apply(kept_BTF, *source, injections)
            return after
        if _needs_gradient(pre_BTF):
            assert self.tau == 0.0, "a threshold is for evaluation"
            inside: Tensor = _Activate.apply(pre_BTF, self.observe, self.formula)
            return inside
        act_BTF = self._cut(self.formula.forward(pre_BTF))
        self.observe(act_BTF)
        return act_BTF

    @torch.compiler.disable
    def gate(self, pre_BTF: Tensor, linear_BTF: Tensor) -> Tensor:
        """Return the activation of ``pre_BTF`` times ``linear_BTF``; keeps these two for the backward pass, no more.

        Needs a formula, that is, ``fused`` or an activation of one operator.
        """
        assert self.formula is not None
        if _needs_gradient(pre_BTF, linear_BTF):
            assert self.tau == 0.0, "a threshold is for evaluation"
            product: Tensor = _Gate.apply(pre_BTF, linear_BTF, self.observe, self.formula)
            return product
        act_BTF = self._cut(self.formula.forward(pre_BTF))
        self.observe(act_BTF)
        return act_BTF * linear_BTF

    def _cut(self, act_BTF: Tensor) -> Tensor:
        return act_BTF if self.tau == 0.0 else functional.hardshrink(act_BTF, self.tau)


def _needs_gradient(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


@cache
def _kernel(device: torch.device) -> ModuleType | None:
    """The Triton kernel, if it runs: Triton needs a C compiler and a folder to write to, which not every image has."""
    try:
        from deft_ray.density import kernel

        one = torch.ones(1, 1, device=device)
        kernel.backward(one, one, None, one.view(1), L1(), "identity")
    except Exception as error:  # whatever it is, torch's operators do the same
        _log.warning("no Triton kernel for the density loss, torch's operators instead: %s", error)
        return None
    return kernel


def _kernel_for(tensor: Tensor) -> ModuleType | None:
    return _kernel(tensor.device) if tensor.is_cuda else None


def _backward(
    grad: Tensor, pre: Tensor, linear: Tensor | None, formula: Formula | None, injections: Injections
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients at ``pre`` and, of a gated block, at ``linear``.

    Args:
        grad: Gradient at the activation, or at its product with ``linear``.
        pre: Input of the activation.
        linear: What the activation is multiplied with; None without a gate.
        formula: The activation; None where ``pre`` is the activation itself.
        injections: The density losses; empty without.
    """
    if len(injections) <= 1:
        return _backward_of_rows(grad, pre, linear, formula, injections[0][1] if injections else None)
    parts = [
        _backward_of_rows(
            rows.cut(grad), rows.cut(pre), None if linear is None else rows.cut(linear), formula, injection
        )
        for rows, injection in injections
    ]
    linears = [part for _, part in parts if part is not None]
    return torch.cat([part for part, _ in parts]), torch.cat(linears) if linears else None


def _backward_of_rows(
    grad: Tensor, pre: Tensor, linear: Tensor | None, formula: Formula | None, injection: Injection | None
) -> tuple[Tensor, Tensor | None]:
    """The same for the rows of one density loss, or of none; on a GPU with a loss of each activation in one kernel."""
    own_slopes = injection is not None and injection.slope_F is None
    if injection is not None and own_slopes and (kernel := _kernel_for(grad)) is not None:
        name = "identity" if formula is None else formula.name
        gradients: tuple[Tensor, Tensor | None] = kernel.backward(
            grad, pre, linear, injection.weight_N, injection.approximation, name
        )
        return gradients
    act = pre if formula is None or (linear is None and not own_slopes) else formula.forward(pre)
    upper = grad if linear is None else grad * linear
    if injection is not None:
        upper = _injected(upper, act, injection)
    return upper if formula is None else formula.backward(upper, pre), None if linear is None else grad * act


def _injected(grad: Tensor, act: Tensor, injection: Injection) -> Tensor:
    width = act.shape[-1]
    if injection.slope_F is not None:
        return add_shared_slope(grad.reshape(-1, width), injection.slope_F, injection.weight_N).view(grad.shape)
    rows = add_slope(injection.approximation, grad.reshape(-1, width), act.reshape(-1, width), injection.weight_N)
    return rows.view(grad.shape)


class _InjectAfter(torch.autograd.Function):
    """Identity behind an activation; keeps what is kept anyway.

    That is the activation (ReLU keeps it, or a gate's product) or its input, of which it is computed again.
    """

    @staticmethod
    def forward(ctx: Any, act: Tensor, source: Tensor, stock: nn.Module | None, injections: Injections) -> Tensor:
        ctx.save_for_backward(source)
        ctx.stock, ctx.injections = stock, injections
        return act.view_as(act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        act = source if ctx.stock is None else ctx.stock(source)
        return _backward(grads[0], act, None, None, ctx.injections)[0], None, None, None


class _Activate(torch.autograd.Function):
    """The activation itself; keeps its input, as the operator does, and computes it again where the loss needs it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, observe: Observe, formula: Formula) -> Tensor:
        act = formula.forward(pre)
        ctx.save_for_backward(pre)
        ctx.injections, ctx.formula = observe(act), formula
        return act

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (pre,) = ctx.saved_tensors
        return _backward(grads[0], pre, None, ctx.formula, ctx.injections)[0], None, None


class _Gate(torch.autograd.Function):
    """Activation times the linear branch; keeps their two inputs and computes the activation again."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, linear: Tensor, observe: Observe, formula: Formula) -> Tensor:
        act = formula.forward(pre)
        ctx.save_for_backward(pre, linear)
        ctx.injections, ctx.formula = observe(act), formula
        return act * linear

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        pre, linear = ctx.saved_tensors
        return *_backward(grads[0], pre, linear, ctx.formula, ctx.injections), None, None
