"""Where a model keeps its MLP activations: what the density room needs to know of an architecture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class Site:
    """One MLP block.

    Args:
        name: ``encoder.0``: side and index of the block.
        block: The module that holds the block's layers.
        activation: Name, within ``block``, of the activation module, whose output is (..., d_ff).
        output: Name, within ``block``, of the last linear layer of the MLP.
    """

    name: str
    block: nn.Module
    activation: str
    output: str

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``."""
        return self.name.split(".", 1)[0]

    @property
    def module(self) -> nn.Module:
        """The activation module, as it is at this moment."""
        return self.block.get_submodule(self.activation)
