"""Several adapters on one base: in a pass that several trials share, each row goes through its own trial's adapter.

PEFT holds the adapters; it would put one adapter's update on all rows, or sort rows by name in evaluation only. Here
each adapter has rows that follow on each other, so that they are views and nothing is gathered.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from deft_ray.density.rows import Rows
from deft_ray.models.bottleneck import BottleneckLayer


class CannotShareError(ValueError):
    """An adapter has to wait until the base is free of others."""


class Routing:
    """Which rows of the pass under way go through which adapter.

    Attributes:
        routes: Adapter's name and its rows, in the order of the rows, which leave none out; empty for PEFT's own way.
    """

    def __init__(self) -> None:
        self.routes: Sequence[tuple[str, Rows]] = ()

    def install(self, model: PeftModel) -> None:
        """Route every layer that has an adapter, and the task head; again after each adapter that is added.

        Prefix and prompt tuning have no such layers: they are the only adapter of their base.

        Raises:
            CannotShareError: If one of several adapters is on an embedding.
        """
        for module in model.modules():
            if isinstance(module, LoraLayer):
                if module.lora_embedding_A and len(model.peft_config) > 1:
                    raise CannotShareError("adapter.target_modules: an adapter on an embedding cannot share a base")
                vars(module)["forward"] = partial(self._layer, module, _lora)
            elif isinstance(module, BottleneckLayer):
                vars(module)["forward"] = partial(self._layer, module, _bottleneck)
            elif isinstance(module, ModulesToSaveWrapper):
                vars(module)["forward"] = partial(self._head, module)

    @contextmanager
    def routing(self, *routes: tuple[str, Rows]) -> Iterator[None]:
        """Route the passes inside; one that needs a gradient ends with its backward pass."""
        self.routes = routes
        try:
            yield
        finally:
            self.routes = ()

    def _layer(self, layer: Any, update: Any, input_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Forward pass of an adapted layer: its own output, and on each row the update of the row's adapter."""
        if not self.routes:
            own: Tensor = type(layer).forward(layer, input_B, *args, **kwargs)
            return own
        out_B: Tensor = layer.base_layer(input_B, *args, **kwargs)
        parts = [update(layer, name, rows.cut(input_B), rows.cut(out_B)) for name, rows in self.routes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _head(self, wrapper: ModulesToSaveWrapper, input_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Forward pass of a task head: each row through its own trial's."""
        if not self.routes:
            own: Tensor = type(wrapper).forward(wrapper, input_B, *args, **kwargs)
            return own
        parts = [wrapper.modules_to_save[name](rows.cut(input_B), *args, **kwargs) for name, rows in self.routes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def remove_routing(model: nn.Module) -> None:
    """Give layers their own forward pass back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            vars(module).pop("forward", None)


def _lora(layer: Any, name: str, input_B: Tensor, out_B: Tensor) -> Tensor:
    """What PEFT's layer does, in the same order of casts."""
    if name not in layer.lora_A:
        return out_B
    down, up = layer.lora_A[name], layer.lora_B[name]
    update_B = up(down(layer.lora_dropout[name](input_B.to(down.weight.dtype)))) * layer.scaling[name]
    if hasattr(layer.get_base_layer().weight, "quant_state"):
        return out_B + update_B.to(out_B.dtype)
    added: Tensor = out_B + update_B
    return added.to(out_B.dtype)


def _bottleneck(layer: Any, name: str, _input: Tensor, out_B: Tensor) -> Tensor:
    added: Tensor = layer.added(name, out_B) if name in layer.bottleneck_down else out_B
    return added
