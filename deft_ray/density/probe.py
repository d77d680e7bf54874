"""The probe: sits behind each MLP's activation module, counts zeros or adds the density loss's gradient.

The density loss of a batch is, for each side (encoder, decoder) with weight α_side,

.. math:: \\alpha_{side} \\frac{1}{L} \\sum_l \\frac{1}{N F} \\sum_{real tokens, f} s(a_{l,t,f})

(Runwal et al., arXiv:2402.01911, Eq. 6 and 8, over real tokens; the authors' code counts padding too.) Its gradient
has a closed form that needs only the activation, which the block keeps anyway. So no loss tensor is built: an identity
function in the forward pass adds the gradient in the backward pass. This stays right under gradient checkpointing of
both kinds, where a list of hooked activations loses its gradient or counts twice.

Shape suffixes: B batch, T tokens, F d_ff.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deft_ray.density.approximations import Approximation
from deft_ray.density.counts import DensityCounts
from deft_ray.density.sites import SIDES, Site


@dataclass
class Penalty:
    """The density loss of one forward and backward pass.

    Args:
        approximation: Smooth indicator.
        weights: Weight of the gradient by side: α, times what this pass is of a step over ranks and micro-batches.
        masks: (B, T) by side, 1 at real tokens.
        measure: Whether to compute the smooth density too, for reports.
    """

    approximation: Approximation
    weights: Mapping[str, float]
    masks: Mapping[str, Tensor]
    measure: bool = False

    def __post_init__(self) -> None:
        self._terms: dict[str, Tensor] = {}

    def density(self, side: str) -> float | None:
        """Smooth density of one side, mean over layers; None unless measured."""
        terms = [term for name, term in self._terms.items() if name.startswith(f"{side}.")]
        return float(torch.stack(terms).mean()) if terms else None


class DensityProbe:
    """Hooks on a model's activation modules, silent unless told to count or to penalise.

    Args:
        sites: Every MLP block's activation module.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.names = [site.name for site in sites]
        self._layers = {side: sum(site.side == side for site in sites) for side in SIDES}
        self._counting: tuple[DensityCounts, Mapping[str, Tensor]] | None = None
        self._penalty: Penalty | None = None
        self._handles = [site.module.register_forward_hook(self._hook(index, site)) for index, site in enumerate(sites)]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def counting(self, counts: DensityCounts, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Add the activations of every forward pass inside to ``counts``; a side without a mask is not counted."""
        self._counting = (counts, masks)
        try:
            yield
        finally:
            self._counting = None

    @contextmanager
    def penalising(self, penalty: Penalty) -> Iterator[None]:
        """Add the density loss's gradient to the backward pass inside; holds for forward *and* backward."""
        self._penalty = penalty
        try:
            yield
        finally:
            self._penalty = None

    def _hook(self, index: int, site: Site) -> Any:
        def hook(_module: nn.Module, _inputs: Any, act: Tensor) -> Tensor | None:
            if self._counting is not None:
                counts, masks = self._counting
                if site.side in masks:
                    counts.add(index, act, masks[site.side])
            if self._penalty is not None:
                return self._penalise(site, act, self._penalty)
            return None

        return hook

    def _penalise(self, site: Site, act_BTF: Tensor, penalty: Penalty) -> Tensor | None:
        mask_BT = penalty.masks[site.side].to(torch.float32).reshape(act_BTF.shape[:-1])  # OPT's MLP has no B and T
        weight_BT = mask_BT / (mask_BT.sum() * act_BTF.shape[-1]).clamp(min=1.0)
        if penalty.measure:
            with torch.no_grad():
                value = (penalty.approximation.value(act_BTF) * weight_BT.unsqueeze(-1)).sum()
            penalty._terms[site.name] = value
        if penalty.weights[site.side] == 0.0 or not act_BTF.requires_grad:
            return None
        weight_BT = weight_BT * (penalty.weights[site.side] / self._layers[site.side])
        out: Tensor = _AddDensityGradient.apply(act_BTF, weight_BT, penalty.approximation)
        return out


class _AddDensityGradient(torch.autograd.Function):
    """Identity whose backward adds ``weight x slope(act)`` to the incoming gradient, in float32."""

    @staticmethod
    def forward(ctx: Any, act_BTF: Tensor, weight_BT: Tensor, approximation: Approximation) -> Tensor:
        ctx.save_for_backward(act_BTF, weight_BT)
        ctx.approximation = approximation
        return act_BTF.view_as(act_BTF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        act_BTF, weight_BT = ctx.saved_tensors
        added = ctx.approximation.slope(act_BTF) * weight_BT.unsqueeze(-1)
        return (grads[0] + added).to(grads[0].dtype), None, None
