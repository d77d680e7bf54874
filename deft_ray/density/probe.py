"""The probe: takes the place of every MLP's activation, silent unless told to count or to penalise.

The density loss of a batch is, for each side (encoder, decoder) with weight α_side,

.. math:: \\alpha_{side} \\frac{1}{L} \\sum_l \\lambda_l \\frac{1}{N F} \\sum_{real tokens, f} s(a_{l,t,f})

(Runwal et al., arXiv:2402.01911, Eq. 6, 8 and 9, over real tokens; the authors' code counts padding too). λ is the
layer scale of ADA-DEFT where there is one, and 1 elsewhere. Where it is of the feature map, each neuron's mean over the
real tokens of the pass, the inner mean is

.. math:: \\frac{1}{F} \\sum_f s\\left(\\frac{1}{N} \\sum_{real tokens} a_{l,t,f}\\right)

with one slope per neuron for all tokens (the paper's words; docs/method.md). How its gradient comes about:
:mod:`deft_ray.density.activation`.

Shape suffixes: B batch, T tokens, F d_ff, N rows (B times T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from deft_ray.density.activation import Injection, Injections, MlpActivation
from deft_ray.density.approximations import Approximation, slope
from deft_ray.density.chunks import chunks
from deft_ray.density.counts import Counter, require_rows
from deft_ray.density.rows import Rows
from deft_ray.density.scales import LayerScales
from deft_ray.density.sites import SIDES, Site


@dataclass
class Penalty:
    """The density loss of one forward and backward pass.

    Args:
        approximation: Smooth indicator.
        weights: Weight of the gradient by side: α, times what this pass is of a step over ranks and micro-batches.
        masks: (B, T) by side, 1 at the tokens that count.
        measure: Whether to compute the smooth density too, for reports.
        scales: Layer scales of ADA-DEFT, already on the model; None without.
        rows: Whose rows of the pass these are; masks and densities are of them alone.
        feature_map: Whether the loss is of each neuron's mean over the tokens that count, not of each activation.
    """

    approximation: Approximation
    weights: Mapping[str, float]
    masks: Mapping[str, Tensor]
    measure: bool = False
    scales: LayerScales | None = None
    rows: Rows = field(default_factory=Rows)
    feature_map: bool = False

    def __post_init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._scaled: dict[str, Tensor] = {}

    def density(self, side: str) -> float | None:
        """Smooth density of one side, mean over layers; None unless measured."""
        return _mean_of_side(self._terms, side)

    def scaled_density(self, side: str) -> float | None:
        """The same with each layer weighed by its layer scale, as the loss has it."""
        return _mean_of_side(self._scaled, side)


class DensityProbe:
    """Takes the place of a model's activation modules until it is removed.

    Args:
        sites: Every MLP block.
        fused: Compute a GELU that is composed of several operators as the one that it equals to rounding, and a gated
            block as one function that keeps two tensors; see :func:`~deft_ray.density.activation.formula_of`.

    Attributes:
        names: Of the blocks.
        activation: Class name of the activation function that is computed, as exact zeros depend on it.
    """

    def __init__(self, sites: list[Site], *, fused: bool = False) -> None:
        self.names = [site.name for site in sites]
        self._layers = {side: sum(site.side == side for site in sites) for side in SIDES}
        self._counting: tuple[Counter, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        self._penalties: Sequence[Penalty] = ()
        self._undo: list[Callable[[], None]] = []
        self._activations: list[MlpActivation] = []
        self.activation = ""
        for index, site in enumerate(sites):
            self._install(index, site, fused)

    def _install(self, index: int, site: Site, fused: bool) -> None:
        stock = site.module
        observe = partial(self._observe, index, site)
        activation = MlpActivation(stock, fused=fused, observe=observe, gated=site.gate is not None)
        activation.train(site.block.training)
        site.put(activation)
        self._activations.append(activation)
        self.activation = activation.name
        self._undo.append(partial(site.put, stock))
        if fused and site.gate is not None and activation.formula is not None:
            self._undo.append(_replace_forward(site.block, partial(site.gate, site.block, activation)))

    def remove(self) -> None:
        """Give the model its own modules back."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def counting(
        self, counts: Counter, masks: Mapping[str, Tensor], there: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Add the activations of every forward pass inside to ``counts``.

        Args:
            counts: Where to.
            masks: Real tokens by side; a side without a mask is not counted.
            there: Real tokens and their padding by side, of sides with rows beside those that are asked for.
        """
        self._counting = (counts, masks, there or {})
        try:
            yield
        finally:
            self._counting = None

    @contextmanager
    def thresholding(self, tau: float) -> Iterator[None]:
        """Set activations with |a| ≤ τ to zero inside, in every block; what is counted there is what is left.

        For evaluation: inside, no pass may need a gradient.
        """
        for activation in self._activations:
            activation.tau = tau
        try:
            yield
        finally:
            for activation in self._activations:
                activation.tau = 0.0

    @contextmanager
    def penalising(self, *penalties: Penalty) -> Iterator[None]:
        """Add density losses' gradients to the backward pass inside; holds for forward *and* backward.

        Args:
            penalties: Of every trial in the pass, in the order of their rows, which leave none out.
        """
        self._penalties = penalties
        try:
            yield
        finally:
            self._penalties = ()

    def _observe(self, index: int, site: Site, act: Tensor) -> Injections:
        if self._counting is not None:
            counts, masks, there = self._counting
            if site.side in masks:
                counts.add(index, act, masks[site.side], there.get(site.side))
        found = [(penalty.rows, self._injection(site, penalty.rows.cut(act), penalty)) for penalty in self._penalties]
        return found if any(injection is not None for _, injection in found) else ()

    def _injection(self, site: Site, act: Tensor, penalty: Penalty) -> Injection | None:
        weight = penalty.weights[site.side]
        scales = penalty.scales
        scaled = scales is not None and weight != 0.0
        if weight == 0.0 and not penalty.measure:
            return None
        mask_N = penalty.masks[site.side].reshape(-1).to(torch.float32)
        require_rows(act.reshape(-1, act.shape[-1]), mask_N)
        mean_N = mask_N / (mask_N.sum() * act.shape[-1]).clamp(min=1.0)
        map_F = _feature_map(act, mean_N) if penalty.feature_map else None
        if penalty.measure or scaled:
            with torch.no_grad():
                penalty._terms[site.name] = density = _smooth_density(penalty.approximation, act, mean_N, map_F)
                scale = 1.0 if scales is None else scales.value(site.name).squeeze()
                penalty._scaled[site.name] = density * scale
        if weight == 0.0:
            return None
        slope_F = None if map_F is None else slope(penalty.approximation, map_F)
        weight /= self._layers[site.side]
        if scales is not None:
            scales.charge(site.name, weight * density)
            return Injection(penalty.approximation, mean_N * weight * scales.value(site.name), slope_F)
        return Injection(penalty.approximation, mean_N * weight, slope_F)


@torch.no_grad()
def _feature_map(act: Tensor, mean_N: Tensor) -> Tensor:
    """Each neuron's mean over the rows that count, (F,), float32.

    Args:
        act: (..., F) activations.
        mean_N: 1 / (rows that count x F) at each of them, 0 elsewhere, float32.
    """
    act_NF = act.reshape(-1, act.shape[-1])
    map_F = torch.zeros(act.shape[-1], dtype=torch.float32, device=act.device)
    for part in chunks(act_NF):
        map_F += mean_N[part] @ act_NF[part].float()
    return map_F * act.shape[-1]


def _smooth_density(approximation: Approximation, act: Tensor, mean_N: Tensor, map_F: Tensor | None) -> Tensor:
    """Mean of s over the activations that count, or over the feature map where there is one."""
    if map_F is not None:
        return approximation.value(map_F).mean()
    act_NF = act.reshape(-1, act.shape[-1])
    mean = torch.zeros((), dtype=torch.float32, device=act.device)
    for part in chunks(act_NF):
        mean += approximation.value(act_NF[part]).sum(dim=-1) @ mean_N[part]
    return mean


def _mean_of_side(terms: Mapping[str, Tensor], side: str) -> float | None:
    mine = [term for name, term in terms.items() if name.startswith(f"{side}.")]
    return float(torch.stack(mine).mean()) if mine else None


def _replace_forward(block: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Give one module its own forward pass; return what takes it back."""
    before = vars(block).get("forward")
    block.forward = forward
    return partial(delattr, block, "forward") if before is None else partial(setattr, block, "forward", before)
