"""Several adapters on one base: in a pass that several trials share, each row goes through its own trial's adapter.

PEFT holds the adapters; it would put one adapter's update on all rows, or sort rows by name in evaluation only. Here
each adapter has rows that follow on each other, so that they are views and nothing is gathered.

Shape suffixes: B batch, N rows (B times T), I and O a layer's inputs and outputs, R rank, K adapters of one shape.
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
        self._bottlenecks: list[BottleneckLayer] = []

    def install(self, model: PeftModel) -> None:
        """Route every layer that has an adapter, and the task head; again after each adapter that is added.

        Prefix and prompt tuning have no such layers: they are the only adapter of their base.

        Raises:
            CannotShareError: If one of several adapters is on an embedding or a convolution.
        """
        self._bottlenecks = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
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

    def forget(self) -> None:
        """Let go of what a pass has left that did not come to its end: it would hold all that lies before."""
        for layer in self._bottlenecks:
            if layer.stream is not None:
                layer.stream.take()

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
    nodes more, and each slot's rows would get a gradient of the whole tensor's size. Neighbours of one shape are one
    batched product.
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
        updated_NO, batches, lows = out_NO.clone(), _batches(updates, len(out_NO)), []
        for batch, down_KRI, up_KOR in _stacked(batches, weights):
            low_KNR = torch.bmm(batch.of(input_NI).to(down_KRI.dtype), down_KRI.mT).mul_(batch.scaling)
            mine_KNO = batch.of(updated_NO)
            if mine_KNO.dtype == low_KNR.dtype:
                mine_KNO.baddbmm_(low_KNR, up_KOR.mT)
            else:
                update_KNO = torch.bmm(low_KNR, up_KOR.mT)
                mine_KNO += update_KNO.to(mine_KNO.dtype) if is_quantised else update_KNO
            lows.append(low_KNR)
        ctx.batches = batches
        ctx.save_for_backward(input_B, *lows, *weights)
        return updated_NO.view(out_B.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the input, the base's output, and each A and B."""
        input_B, *saved = ctx.saved_tensors
        lows, weights = saved[: len(ctx.batches)], saved[len(ctx.batches) :]
        input_NI, grad_NO, found = _flat(input_B), _flat(grads[0]), list[Tensor | None]()
        grad_NI = torch.zeros_like(input_NI) if ctx.needs_input_grad[0] else None
        for (batch, down_KRI, up_KOR), low_KNR in zip(_stacked(ctx.batches, weights), lows, strict=True):
            grad_KNO = batch.of(grad_NO).to(up_KOR.dtype)
            grad_KNR = torch.bmm(grad_KNO, up_KOR).mul_(batch.scaling)
            grad_KRI = torch.bmm(grad_KNR.mT, batch.of(input_NI).to(down_KRI.dtype))
            grad_KOR = torch.bmm(grad_KNO.mT, low_KNR)
            found += [grad for both in zip(grad_KRI, grad_KOR, strict=True) for grad in both]
            if grad_NI is None:
                continue
            if grad_NI.dtype == down_KRI.dtype:
                torch.bmm(grad_KNR, down_KRI, out=batch.of(grad_NI))
            else:
                batch.of(grad_NI).copy_(torch.bmm(grad_KNR, down_KRI))
        return None if grad_NI is None else grad_NI.view(input_B.shape), grads[0], None, None, *found


@dataclass(frozen=True)
class _Batch:
    """Adapters of one shape whose rows follow on each other, as many rows each.

    Args:
        count: How many.
        place: Their rows in a tensor of the pass, (N, ...).
        scaling: What each update is multiplied by.
    """

    count: int
    place: slice
    scaling: float

    def of(self, tensor_N: Tensor) -> Tensor:
        """Return their rows, (count, rows of each, ...), a view."""
        return tensor_N[self.place].view(self.count, -1, tensor_N.shape[-1])


def _batches(updates: Sequence[Update], size: int) -> list[_Batch]:
    """Put neighbours of one shape together; in the order of the updates."""
    found: list[_Batch] = []
    last: Any = None
    for update in updates:
        place = update.rows.of_size(size)
        kind = update.down.shape, update.up.shape, update.down.dtype, update.scaling, place.stop - place.start
        if kind == last and place.start == found[-1].place.stop:
            before = found.pop()
            found.append(_Batch(before.count + 1, slice(before.place.start, place.stop), update.scaling))
        else:
            found.append(_Batch(1, place, update.scaling))
        last = kind
    return found


def _stacked(batches: Sequence[_Batch], weights: Sequence[Tensor]) -> Iterator[tuple[_Batch, Tensor, Tensor]]:
    """Give each batch its A, (K, R, I), and B, (K, O, R), of weights that alternate."""
    start = 0
    for batch in batches:
        mine = list(weights[start : start + 2 * batch.count])
        start += len(mine)
        yield batch, _stack(mine[::2]), _stack(mine[1::2])


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
