"""Several adapters on one base: in a pass that several trials share, each row goes through its own trial's adapter.

PEFT holds the adapters; it would put one adapter's update on all rows, or sort rows by name in evaluation only. Here
each adapter has rows that follow on each other, so that they are views and nothing is gathered.

Shape suffixes: B batch, N rows (B times T), I and O a layer's inputs and outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from deft_ray.density.rows import Rows, split_rows
from deft_ray.models.bottleneck import BottleneckLayer

#: Adapters' names and their rows, in the order of the rows.
Routes = Sequence[tuple[str, Rows]]


class CannotShareError(ValueError):
    """An adapter has to wait until the base is free of others."""


class Routing:
    """Which rows of the pass under way go through which adapter.

    Attributes:
        routes: Which, leaving no row out; empty for PEFT's own way.
    """

    def __init__(self) -> None:
        self.routes: Routes = ()

    def install(self, model: PeftModel) -> None:
        """Route every layer that has an adapter, and the task head; again after each adapter that is added.

        Prefix and prompt tuning have no such layers: they are the only adapter of their base.

        Raises:
            CannotShareError: If one of several adapters is on an embedding or a convolution.
        """
        for module in model.modules():
            if isinstance(module, LoraLayer):
                if len(model.peft_config) > 1 and (what := _no_matrix(module)):
                    raise CannotShareError(f"adapter.target_modules: an adapter on {what} cannot share a base")
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
        updated: Tensor = update(layer, self.routes, input_B, out_B)
        return updated

    def _head(self, wrapper: ModulesToSaveWrapper, input_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Forward pass of a task head: each row through its own trial's."""
        if not self.routes:
            own: Tensor = type(wrapper).forward(wrapper, input_B, *args, **kwargs)
            return own
        heads = [partial(wrapper.modules_to_save[name], *args, **kwargs) for name, _ in self.routes]
        return _each(heads, self.routes, input_B)


def remove_routing(model: nn.Module) -> None:
    """Give layers their own forward pass back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            vars(module).pop("forward", None)


def _no_matrix(layer: LoraLayer) -> str | None:
    """Name what a layer is whose update is no product of two matrices."""
    if layer.lora_embedding_A:
        return "an embedding"
    matrices: Any = layer.lora_A.values()
    return "a convolution" if any(matrix.weight.dim() != 2 for matrix in matrices) else None


def _each(functions: Sequence[Callable[[Tensor], Tensor]], routes: Routes, tensor_B: Tensor) -> Tensor:
    """Give each route's rows to a function of its own."""
    parts = split_rows(tensor_B, [rows for _, rows in routes])
    out = [function(part_B) for function, part_B in zip(functions, parts, strict=True)]
    return out[0] if len(out) == 1 else torch.cat(out)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _bottleneck(layer: Any, routes: Routes, _input: Tensor, out_B: Tensor) -> Tensor:
    """What the tuner for bottlenecks does."""
    rows = [mine for _, mine in routes]
    residual_B = None if layer.stream is None else layer.stream.take()
    residuals = [None] * len(rows) if residual_B is None else split_rows(residual_B, rows)
    functions = [
        partial(layer.added, name, residual=mine) if name in layer.bottleneck_down else _same
        for (name, _), mine in zip(routes, residuals, strict=True)
    ]
    return _each(functions, routes, out_B)


def _lora(layer: Any, routes: Routes, input_B: Tensor, out_B: Tensor) -> Tensor:
    """What PEFT's layer does, in the same order of casts."""
    dropouts = [layer.lora_dropout[name] if name in layer.lora_A else _same for name, _ in routes]
    if layer.training and any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
        dtypes = {matrix.weight.dtype for matrix in layer.lora_A.values()}
        input_B = _each(dropouts, routes, input_B.to(*dtypes))
    updates = [
        Update(rows, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name, rows in routes
        if name in layer.lora_A
    ]
    if not updates:
        return out_B
    weights = [weight for update in updates for weight in (update.down, update.up)]
    is_quantised = hasattr(layer.get_base_layer().weight, "quant_state")
    updated: Tensor = LoraUpdates.apply(input_B, out_B, updates, is_quantised, *weights)
    return updated


@dataclass(frozen=True)
class Update:
    """One adapter's part in a layer.

    Args:
        rows: Its rows.
        down: LoRA's A, (R, I).
        up: LoRA's B, (O, R).
        scaling: What the update is multiplied by.
    """

    rows: Rows
    down: Tensor
    up: Tensor
    scaling: float


class LoraUpdates(torch.autograd.Function):
    r"""LoRA's update of one layer by several adapters, each on its own rows.

    .. math:: out'_k = out_k + s_k\, in_k A_k^T B_k^T

    The products are so small that starting them costs more than computing them. Left to autograd, each would be a few
    nodes more, and each slot's rows would get a gradient of the whole tensor's size.
    """

    @staticmethod
    def forward(
        ctx: Any, input_B: Tensor, out_B: Tensor, updates: Sequence[Update], is_quantised: bool, *weights: Tensor
    ) -> Tensor:
        """Return the updated output; rows of no adapter as they are.

        Args:
            input_B: What the layer was given, (B, ..., I).
            out_B: What its base gave, (B, ..., O); its dtype stays.
            updates: At least one; ranks may differ.
            is_quantised: Whether updates are cast before they are added, as PEFT does on quantised layers.
            weights: A and B of each once more, for autograd.
        """
        input_NI, out_NO = _flat(input_B), _flat(out_B)
        updated_NO, lows = out_NO.clone(), []
        for update in updates:
            mine = update.rows.of_size(len(out_NO))
            low_NR = torch.mm(input_NI[mine].to(update.down.dtype), update.down.t()).mul_(update.scaling)
            lows.append(low_NR)
            if out_NO.dtype == low_NR.dtype:
                updated_NO[mine].addmm_(low_NR, update.up.t())
            else:
                update_NO = torch.mm(low_NR, update.up.t())
                updated_NO[mine] += update_NO.to(out_NO.dtype) if is_quantised else update_NO
        ctx.updates = [(update.rows, update.scaling) for update in updates]
        ctx.save_for_backward(input_B, *weights, *lows)
        return updated_NO.view(out_B.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the input, the base's output, and each A and B."""
        input_B, *saved = ctx.saved_tensors
        weights, lows = saved[: 2 * len(ctx.updates)], saved[2 * len(ctx.updates) :]
        input_NI, grad_NO, found = _flat(input_B), _flat(grads[0]), list[Tensor | None]()
        grad_NI = torch.zeros_like(input_NI) if ctx.needs_input_grad[0] else None
        for (rows, scaling), down_RI, up_OR, low_NR in zip(ctx.updates, weights[::2], weights[1::2], lows, strict=True):
            mine = rows.of_size(len(grad_NO))
            mine_NO = grad_NO[mine].to(up_OR.dtype)
            grad_NR = torch.mm(mine_NO, up_OR).mul_(scaling)
            found += [torch.mm(grad_NR.t(), input_NI[mine].to(down_RI.dtype)), torch.mm(mine_NO.t(), low_NR)]
            if grad_NI is not None:
                grad_NI[mine] = torch.mm(grad_NR, down_RI)
        return None if grad_NI is None else grad_NI.view(input_B.shape), grads[0], None, None, *found


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
