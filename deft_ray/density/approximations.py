"""Differentiable stand-ins for "this activation is not zero", each with its closed-form slope.

Shape suffixes: B batch, T tokens, F d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def soft_nonzero(act_BTF: Tensor, epsilon: float) -> Tensor:
    r"""Smooth 0/1 indicator of a non-zero activation.

    .. math:: s_\varepsilon(a) = a^2 / (a^2 + \varepsilon)

    One half at a² = ε, and 1[a ≠ 0] as ε → 0. Runwal et al. (arXiv:2402.01911), Eq. 5; the default for GELU.
    Its slope is useful for |a| from about 0.03 √ε to 10 √ε only: 1e-5 to 3e-3 at the published ε = 1e-7.

    Args:
        act_BTF: Activations after the non-linearity; any float dtype.
        epsilon: Half-way point, in squared activation units; > 0.

    Returns:
        Same shape, float32, in [0, 1].

    Raises:
        ValueError: If ``epsilon`` is not positive.

    >>> soft_nonzero(torch.tensor([0.0, 1.0]), epsilon=1.0).tolist()
    [0.0, 0.5]
    """
    _require_positive("epsilon", epsilon)
    square = act_BTF.float().square()
    return square / (square + epsilon)


def soft_nonzero_slope(act_BTF: Tensor, epsilon: float) -> Tensor:
    r"""Derivative of :func:`soft_nonzero`: :math:`2 a \varepsilon / (a^2 + \varepsilon)^2`, float32."""
    _require_positive("epsilon", epsilon)
    act = act_BTF.float()
    below = act.square() + epsilon
    return 2.0 * act / below * (epsilon / below)  # below² would be zero in float32 for ε under 1e-19


def soft_positive(act_BTF: Tensor, beta: float) -> Tensor:
    r"""Smooth 0/1 indicator of a positive activation.

    .. math:: s_\beta(a) = \tanh(\beta a)

    Runwal et al. (arXiv:2402.01911), Eq. 4, for ReLU, whose activations are never negative: a negative activation
    counts *below* zero here. Saturates for a > 3/β; the published code leaves β = 20 as its only trace.

    Args:
        act_BTF: Activations after the non-linearity; any float dtype.
        beta: Steepness at zero, in inverse activation units; > 0.

    Returns:
        Same shape, float32, in [-1, 1], and in [0, 1] for a ≥ 0.

    Raises:
        ValueError: If ``beta`` is not positive.

    >>> soft_positive(torch.tensor([0.0, 10.0]), beta=20.0).tolist()
    [0.0, 1.0]
    """
    _require_positive("beta", beta)
    return torch.tanh(beta * act_BTF.float())


def soft_positive_slope(act_BTF: Tensor, beta: float) -> Tensor:
    r"""Derivative of :func:`soft_positive`: :math:`\beta (1 - \tanh^2(\beta a))`, float32."""
    _require_positive("beta", beta)
    return beta * (1.0 - torch.tanh(beta * act_BTF.float()).square())


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0 (got {value!r})")


@dataclass(frozen=True)
class Approximation:
    """One approximation with its parameter bound.

    Args:
        kind: ``l0`` or ``tanh``.
        parameter: ε of l0 or β of tanh; > 0.
    """

    kind: str
    parameter: float

    def __post_init__(self) -> None:
        if self.kind not in ("l0", "tanh"):
            raise ValueError(f"approximation must be 'l0' or 'tanh' (got {self.kind!r})")
        _require_positive("epsilon" if self.kind == "l0" else "beta", self.parameter)

    def value(self, act_BTF: Tensor) -> Tensor:
        """Smooth indicator per activation, float32."""
        return (soft_nonzero if self.kind == "l0" else soft_positive)(act_BTF, self.parameter)

    def slope(self, act_BTF: Tensor) -> Tensor:
        """Derivative of :meth:`value` per activation, float32."""
        return (soft_nonzero_slope if self.kind == "l0" else soft_positive_slope)(act_BTF, self.parameter)
