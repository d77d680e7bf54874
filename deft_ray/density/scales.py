"""Layer scales of ADA-DEFT: one trainable λ in [0, 1] per MLP block, where 0 is the same as leaving the block out.

Runwal et al. (arXiv:2402.01911), section 3.5, say that λ multiplies the input of the dropout in the MLP block and
weighs the block's density, and that some λ end at 0. Their code has no ADA-DEFT, so three choices are ours:

- λ multiplies what the MLP's last linear layer gives, adapter included, before dropout and residual. Without a bias
  (T5) that equals the paper's place; with one (BERT, OPT, GPT-2, ViT) only here λ = 0 is exactly "block skipped".
- The density term is :math:`\\frac{1}{L} \\sum_l \\lambda_l D_l`, whose slope in λ is the block's density D_l, all the
  way to zero. Had the loss seen λ times the activation, l0's slope would vanish long before.
- λ is projected to [0, 1] after each step. Without that it would cross 0 and be rewarded for a negative weight;
  with it, zeros are exact. Adam moves a parameter by about the learning rate per step: λ has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deft_ray.density.rows import Rows
from deft_ray.density.sites import Site


class LayerScales(nn.Module):
    """λ of every block, drawn around ``init`` from torch's global random state.

    Args:
        sites: Every MLP block, its adapter on it.
        init: Mean of λ at the start, in [0, 1].
        noise: Standard deviation of λ at the start; the draws are cut to [0, 1].
        device: Where the blocks compute.

    Attributes:
        rows: The rows of a pass that are scaled; None for no row.

    Raises:
        ValueError: If ``init`` is outside [0, 1] or ``noise`` negative.
    """

    def __init__(self, sites: list[Site], *, init: float, noise: float, device: torch.device) -> None:
        super().__init__()
        if not 0.0 <= init <= 1.0:
            raise ValueError(f"lambda_init must be in [0, 1] (got {init!r})")
        if not noise >= 0.0:
            raise ValueError(f"lambda_noise must be at least 0 (got {noise!r})")
        values = (init + noise * torch.randn(len(sites), 1)).clamp(0.0, 1.0).to(device)
        self._scales = nn.ParameterList([nn.Parameter(value.clone()) for value in values])
        self._by_name = {site.name: scale for site, scale in zip(sites, self._scales, strict=True)}
        self._charges: dict[str, Tensor] = {}
        self.rows: Rows | None = Rows()
        self._handles = [
            site.block.get_submodule(site.output).register_forward_hook(self._hook(site.name)) for site in sites
        ]

    def remove(self) -> None:
        """Take the scales off the model."""
        for handle in self._handles:
            handle.remove()

    def value(self, name: str) -> Tensor:
        """Return a block's λ, (1,), without gradient."""
        return self._by_name[name].detach()

    def by_layer(self) -> dict[str, float]:
        """Return λ of every block, by name."""
        return {name: float(self.value(name)) for name in self._by_name}

    def set_values(self, values: Mapping[str, float]) -> None:
        """Set λ of every block, by name.

        Raises:
            KeyError: If a block has none.
        """
        with torch.no_grad():
            for name, scale in self._by_name.items():
                scale.fill_(values[name])

    def charge(self, name: str, slope: Tensor) -> None:
        """Set the slope of the density loss in a block's λ for the pass under way."""
        self._charges[name] = slope

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            if self.rows is None:
                return out
            scale: Tensor = self._by_name[name]
            slope = self._charges.pop(name, None)
            if slope is not None and torch.is_grad_enabled():
                scale = _AddSlope.apply(scale, slope)
            if self.rows.are_all:
                return out * scale.to(out.dtype)
            mine = self.rows.of_size(len(out))
            return torch.cat([out[: mine.start], out[mine] * scale.to(out.dtype), out[mine.stop :]])

        return hook


class _AddSlope(torch.autograd.Function):
    """Identity whose backward adds a constant to the gradient."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = slope
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] + ctx.slope, None
