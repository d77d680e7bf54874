"""Differentiable stand-ins for "this activation is not zero", each with its closed-form slope.

All are computed in float32, whatever the model's dtype: bfloat16 absorbs ε beside a², and float16 underflows.

Shape suffixes: N rows (tokens), F d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from deft_ray.density.chunks import chunks

#: Names in a spec. ``auto`` there means tanh where the activation is never negative (ReLU), l0 otherwise.
KINDS = ("l0", "tanh", "sigmoid", "l1", "l2")

#: β where a spec names none: the only value that the published code leaves a trace of.
PUBLISHED_BETA = 20.0

#: Below this ε² comes near the smallest normal float32, 1.2e-38, and the slope's denominator is lost.
SMALLEST_EPSILON = 1e-18


class Approximation(Protocol):
    """A smooth s(a) with s(0) = 0 that grows with how far a is from zero."""

    kind: ClassVar[str]

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32."""

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""


@dataclass(frozen=True)
class L0:
    r"""Smooth 0/1 indicator of a non-zero activation.

    .. math:: s_\varepsilon(a) = a^2 / (a^2 + \varepsilon), \qquad
              s'_\varepsilon(a) = 2 a \varepsilon / (a^2 + \varepsilon)^2

    One half at a² = ε, and 1[a ≠ 0] as ε → 0. Runwal et al. (arXiv:2402.01911), Eq. 5; for activations of either sign.
    Its slope is steepest, 0.65 / √ε, at |a| = √(ε/3), and useful from about 0.03 √ε to 10 √ε only: 1e-5 to 3e-3 at the
    published ε = 1e-7. A larger ε reaches larger activations, and counts small ones for less.

    Args:
        epsilon: Half-way point, in squared activation units; at least 1e-18.

    Raises:
        ValueError: If ``epsilon`` is smaller.
    """

    kind: ClassVar[str] = "l0"
    epsilon: float

    def __post_init__(self) -> None:
        if not self.epsilon >= SMALLEST_EPSILON:
            raise ValueError(
                f"epsilon must be at least {SMALLEST_EPSILON:g}, or float32 loses it (got {self.epsilon!r})"
            )

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32 in [0, 1].

        >>> L0(1.0).value(torch.tensor([0.0, 1.0])).tolist()
        [0.0, 0.5]
        """
        square = act.float().square()
        return square / (square + self.epsilon)

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""
        torch.addcmul(torch.full((), self.epsilon, dtype=torch.float32, device=act.device), act, act, out=out).square_()
        torch.div(act, out, out=out)
        return 2.0 * self.epsilon


@dataclass(frozen=True)
class Tanh:
    r"""Smooth 0/1 indicator of a positive activation.

    .. math:: s_\beta(a) = \tanh(\beta a), \qquad s'_\beta(a) = \beta (1 - \tanh^2(\beta a))

    Runwal et al. (arXiv:2402.01911), Eq. 4, for ReLU, whose activations are never negative: a negative activation
    counts *below* zero here, so that the loss can be lowered without a single zero. Useful for 0 ≤ a < 3/β, beyond
    which it is flat; the published code leaves β = 20 as its only trace, so a < 0.15.

    Args:
        beta: Steepness at zero, in inverse activation units; > 0.

    Raises:
        ValueError: If ``beta`` is not positive.
    """

    kind: ClassVar[str] = "tanh"
    beta: float

    def __post_init__(self) -> None:
        _require_positive_beta(self.beta)

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32 in [-1, 1], and in [0, 1] for a ≥ 0.

        >>> Tanh(20.0).value(torch.tensor([0.0, 10.0])).tolist()
        [0.0, 1.0]
        """
        return torch.tanh(self.beta * act.float())

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""
        torch.mul(act, self.beta, out=out).tanh_().square_().neg_().add_(1.0)
        return self.beta


@dataclass(frozen=True)
class Sigmoid:
    r"""Smooth 0/1 indicator of a non-zero activation, from the logistic function of its magnitude.

    .. math:: s_\beta(a) = 2 \sigma(\beta |a|) - 1 = \tanh(\beta |a| / 2), \qquad
              s'_\beta(a) = \mathrm{sign}(a) \tfrac{\beta}{2} (1 - \tanh^2(\beta a / 2))

    Runwal et al. name a sigmoid without its formula (appendix A.2.1). This one is zero at zero, one far away and,
    unlike :class:`Tanh`, even in a, so that it serves activations of either sign; on ReLU it is ``Tanh(beta / 2)``.
    Useful for |a| < 6/β. At exactly zero its slope is set to zero.

    Args:
        beta: Steepness of the logistic function, in inverse activation units; > 0.

    Raises:
        ValueError: If ``beta`` is not positive.
    """

    kind: ClassVar[str] = "sigmoid"
    beta: float

    def __post_init__(self) -> None:
        _require_positive_beta(self.beta)

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32 in [0, 1].

        >>> Sigmoid(20.0).value(torch.tensor([0.0, -10.0])).tolist()
        [0.0, 1.0]
        """
        return torch.tanh(0.5 * self.beta * act.float()).abs()

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""
        torch.mul(act, 0.5 * self.beta, out=out).tanh_().square_().neg_().add_(1.0)
        out.mul_(act.sign())
        return 0.5 * self.beta


@dataclass(frozen=True)
class L1:
    r"""Magnitude of the activation.

    .. math:: s(a) = |a|, \qquad s'(a) = \mathrm{sign}(a)

    No fraction of anything, but the usual penalty for sparse activations: its slope reaches activations of any size. In
    units of the activation, so that α means something else than with the others. At exactly zero its slope is zero.
    """

    kind: ClassVar[str] = "l1"

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32, at least 0.

        >>> L1().value(torch.tensor([0.0, -2.0])).tolist()
        [0.0, 2.0]
        """
        return act.float().abs()

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""
        torch.sign(act, out=out)
        return 1.0


@dataclass(frozen=True)
class L2:
    r"""Square of the activation.

    .. math:: s(a) = a^2, \qquad s'(a) = 2 a

    What weight decay is to weights; in squared units of the activation. Its slope falls with the activation: it presses
    on large ones and lets small ones be. On the nano model with LoRA it takes less off the exact density than
    :class:`L1` does. Runwal et al. report a norm that fails (Table 7) and do not say which; either may be meant.
    """

    kind: ClassVar[str] = "l2"

    def value(self, act: Tensor) -> Tensor:
        """Return s(a) per activation, float32, at least 0.

        >>> L2().value(torch.tensor([0.0, -2.0])).tolist()
        [0.0, 4.0]
        """
        return act.float().square()

    def fill_slope(self, act: Tensor, out: Tensor) -> float:
        """Write s'(a) / c into ``out`` (float32, as ``act``), return the constant c."""
        out.copy_(act)
        return 2.0


def build_approximation(kind: str, *, epsilon: float, beta: float | None) -> Approximation:
    """Return an approximation by name.

    Args:
        kind: One of :data:`KINDS`.
        epsilon: ε of l0.
        beta: β of tanh and sigmoid; :data:`PUBLISHED_BETA` if None.

    Raises:
        ValueError: If there is no such kind, or its parameter is out of range.
    """
    if kind == "l0":
        return L0(epsilon)
    if kind in ("l1", "l2"):
        return L1() if kind == "l1" else L2()
    if kind not in KINDS:
        raise ValueError(f"approximation must be one of {', '.join(KINDS)} (got {kind!r})")
    beta = PUBLISHED_BETA if beta is None else beta
    return Tanh(beta) if kind == "tanh" else Sigmoid(beta)


def slope(approximation: Approximation, act: Tensor) -> Tensor:
    """Return s'(a) per activation, float32."""
    act = act.float()
    out = torch.empty_like(act)
    return approximation.fill_slope(act, out) * out


def add_slope(approximation: Approximation, grad_NF: Tensor, act_NF: Tensor, weight_N: Tensor) -> Tensor:
    """Return ``grad + weight x s'(act)``, computed in float32 and given in the gradient's dtype.

    The sum is what the backward pass of a density loss adds at an MLP's activation. On a CPU it is built chunk by
    chunk: on whole layers the few passes over memory would cost more than the arithmetic.

    Args:
        approximation: Smooth indicator.
        grad_NF: Incoming gradient; not changed.
        act_NF: Activations, any float dtype.
        weight_N: Weight of each row, float32.
    """
    out_NF = torch.empty_like(grad_NF)
    buffer_NF: Tensor | None = None
    for part in chunks(act_NF):
        act, out = act_NF[part].float(), out_NF[part]
        buffer_NF = torch.empty_like(act) if buffer_NF is None else buffer_NF
        slope_NF = buffer_NF[: act.shape[0]]
        factor = approximation.fill_slope(act, slope_NF)
        into = out if out.dtype == torch.float32 else slope_NF
        torch.addcmul(grad_NF[part].float(), slope_NF, weight_N[part].unsqueeze(1), value=factor, out=into)
        if into is not out:
            out.copy_(into)
    return out_NF


def add_shared_slope(grad_NF: Tensor, slope_F: Tensor, weight_N: Tensor) -> Tensor:
    """Return ``grad + weight x slope``, computed in float32 and given in the gradient's dtype.

    Args:
        grad_NF: Incoming gradient; not changed.
        slope_F: Slope of each neuron, the same in all rows, float32.
        weight_N: Weight of each row, float32.
    """
    out_NF = torch.empty_like(grad_NF)
    for part in chunks(grad_NF):
        out_NF[part] = torch.addcmul(grad_NF[part].float(), weight_N[part].unsqueeze(1), slope_F)
    return out_NF


def _require_positive_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0 (got {beta!r})")
