"""Where a model keeps its MLP activations: what the density room needs to know of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class Site:
    """One MLP block.

    Args:
        name: ``encoder.0``: side and index of the block.
        block: The module that holds the block's layers.
        activation: Name, within ``block``, of the activation module, whose output is (..., d_ff).
        output: Name, within ``block``, of the last linear layer of the MLP.
        gate: Of a gated block: its forward pass, (block, activation module, hidden) to hidden, with
            ``activation.gate(pre, linear)`` in it. None of any other.
    """

    name: str
    block: nn.Module
    activation: str
    output: str
    gate: Callable[[nn.Module, Any, Tensor], Tensor] | None = None

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``."""
        return self.name.split(".", 1)[0]

    @property
    def module(self) -> nn.Module:
        """The activation module, as it is at this moment."""
        return self.block.get_submodule(self.activation)

    def put(self, module: nn.Module) -> None:
        """Put a module in the activation module's place."""
        parent, _, name = self.activation.rpartition(".")
        setattr(self.block.get_submodule(parent), name, module)
