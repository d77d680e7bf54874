r"""Bottleneck adapters for PEFT, which ships none: a small MLP behind each MLP block.

With :math:`h` what the block's last linear layer gives out,

.. math:: h' = h + U f(D h + b_D) + b_U, \qquad D: (m, d_{model}),\; U: (d_{model}, m),\; f = \mathrm{ReLU},

with :math:`m = \lfloor d_{model} / \text{reduction\_factor} \rfloor` (Runwal et al., arXiv:2402.01911, Eq. 12; the
placement of Pfeiffer et al., arXiv:2005.00247: one adapter per block, none behind attention). Dropout, the residual
addition and, in BERT and RoBERTa, the layer norm come after it, as the architecture has them:

    T5       x + dropout(adapter(MLP(norm(x))))
    BERT     norm(x + dropout(adapter(MLP(x))))

The paper's equation is followed. The library that its authors ran, adapter-transformers 3.2.1, differs in one point:
its ``PfeifferConfig`` has ``original_ln_before``, so D reads the sum with the residual stream x (in BERT and RoBERTa
the normed sum), :math:`h' = h + U f(D\,\mathrm{norm}(h + x) + b_D) + b_U`. That is ``reads="sum"``; parameters, order
of addition and what the first block sees are the same. Its U starts at N(0, 0.02²); here at zero, so that a fresh
adapter is exactly the identity, as a fresh LoRA is. Its h is behind the block's dropout, ours before it.

Importing this module makes ``PeftModel.from_pretrained`` open folders whose ``peft_type`` is ``BOTTLENECK``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

PEFT_TYPE = "BOTTLENECK"

_START_STD = 0.02


def hidden_units(d_model: int, reduction_factor: int) -> int:
    """Return the width of a bottleneck.

    Args:
        d_model: Width of what the adapter reads and writes.
        reduction_factor: How many times narrower it is inside; > 0.

    Raises:
        ValueError: If that leaves no hidden unit.
    """
    if reduction_factor > d_model:
        raise ValueError(
            f"adapter.reduction_factor: leaves no hidden unit of a width of {d_model} (got {reduction_factor}), "
            f"at most {d_model} is allowed"
        )
    return d_model // reduction_factor


def output_width(layer: nn.Module) -> int:
    """Return how many features a linear layer gives out; GPT-2's ``Conv1D`` calls them ``nf``."""
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    width = getattr(layer, "out_features", None)
    return int(layer.nf if width is None else width)  # type: ignore[arg-type]


@dataclass
class BottleneckConfig(PeftConfig):
    """What ``adapter_config.json`` holds.

    Args:
        target_modules: Names of the linear layers to put an adapter behind.
        reduction_factor: See :func:`hidden_units`.
        reads: What D reads: ``mlp`` for h, ``sum`` for h + x.
        residuals: With ``sum``, by target: name of the module that is given the residual stream x before the MLP.
        norms: By target: name of the layer norm that the sum goes through; none where there is none.
        modules_to_save: Further modules to train and save; PEFT adds the task head.
    """

    target_modules: list[str] | str | None = field(default=None)
    reduction_factor: int = 16
    reads: str = "mlp"
    residuals: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with a bottleneck adapter behind it.

    Weights are float32 and so is what the adapter computes; its result is cast to what the layer gives out.

    Args:
        base_layer: The frozen layer, quantised or not.
        adapter_name: Name of the adapter.
        config: See :class:`BottleneckConfig`.
        stream: Of the block that the layer ends; needed by adapters that read the sum.

    Attributes:
        stream: The same.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, stream: Stream | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.stream: Stream | None = None
        self._of_sum: set[str] = set()
        self.add(adapter_name, config, stream)

    def add(self, adapter_name: str, config: BottleneckConfig, stream: Stream | None = None) -> None:
        """Add a fresh adapter: D from N(0, 0.02²), all else zero."""
        d_model, device = output_width(self.base_layer), next(self.base_layer.parameters()).device
        width = hidden_units(d_model, config.reduction_factor)
        down = nn.Linear(d_model, width, device=device, dtype=torch.float32)
        up = nn.Linear(width, d_model, device=device, dtype=torch.float32)
        nn.init.normal_(down.weight, std=_START_STD)
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self._of_sum.discard(adapter_name)
        if config.reads == "sum":
            assert stream is not None
            self.stream = stream
            self._of_sum.add(adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., d_model): the layer's output and, unless switched off, what the adapter adds to it."""
        hidden: Tensor = self.base_layer(*args, **kwargs)
        residual = None if self.stream is None else self.stream.take()
        if self.disable_adapters:
            return hidden
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = self.added(name, hidden, residual)
        return hidden

    def added(self, name: str, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Return the layer's output with what one adapter adds to it; ``residual`` is of the same rows."""
        read = hidden
        if name in self._of_sum:
            assert self.stream is not None
            assert residual is not None
            read = self.stream.summed(hidden, residual)
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        added: Tensor = up(torch.relu(down(read.to(next(down.parameters()).dtype))))
        return hidden + added.to(hidden.dtype)


class Stream:
    """The residual stream beside one MLP block.

    Args:
        source: Module that is given it before the MLP.
        norm: Layer norm of the sum with the block's output, or None.
    """

    def __init__(self, source: nn.Module, norm: nn.Module | None) -> None:
        self._hidden: Tensor | None = None
        self._norm = norm
        self._handle = source.register_forward_pre_hook(self._note)

    def _note(self, _source: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def take(self) -> Tensor | None:
        """Return it as it is in the pass under way, (..., d_model), and keep it no longer."""
        hidden, self._hidden = self._hidden, None
        return hidden

    def summed(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return what leaves the block if no adapter is there."""
        total = hidden + residual
        return total if self._norm is None else self._norm(total)

    def remove(self) -> None:
        """Take no more note of it."""
        self._handle.remove()
        self._hidden = None


class BottleneckModel(BaseTuner):
    """PEFT's handle on a model with bottleneck adapters; an adapter cannot be merged into the weights."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as PEFT declares it

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BottleneckLayer) else None
        stream = self._stream(peft_config, current_key, layer) if peft_config.reads == "sum" else None
        if layer is not None:
            layer.add(adapter_name, peft_config, stream)
        else:
            layer = BottleneckLayer(target, adapter_name, peft_config, stream)
            self._replace_module(parent, target_name, layer, target)

    def _stream(self, config: BottleneckConfig, target: str, layer: BottleneckLayer | None) -> Stream:
        """The residual stream beside a block: one for all its adapters."""
        if layer is not None and layer.stream is not None:
            return layer.stream
        norm = config.norms.get(target)
        source = self.model.get_submodule(config.residuals[target])
        return Stream(source, None if norm is None else self.model.get_submodule(norm))

    def unload(self) -> nn.Module:
        """Return the model without adapters."""
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer) and module.stream is not None:
                module.stream.remove()
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place; PEFT's own would hand a task head's weight on, which not every head has."""
        setattr(parent, child_name, new_module)


# PEFT's register_peft_method takes the names of PEFT's own enumeration only; these are the tables that it fills.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BottleneckModel.prefix  # type: ignore[index]
