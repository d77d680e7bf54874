"""A base in four bits, proven right once it is loaded: each layer against its own weights, opened."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

#: Relative error at which a layer counts as wrong: well above a few roundings of bfloat16 (2^-8 each), far below what a
#: cast to uint8 leaves, where negative numbers wrap around: 40 to 300 on small models.
TOLERANCE = 0.05


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with weights of four bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def open_linear(layer: Any, input_BTX: Tensor) -> Tensor:
    """Output of a four-bit layer without its bias: a plain product with its weights, opened, in their dtype."""
    weight_YX = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return nn.functional.linear(input_BTX.to(weight_YX.dtype), weight_YX)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Distance over length; the distance where the length is zero."""
    length = float(want.float().norm())
    distance = float((got.float() - want.float()).norm())
    return distance / length if length else distance


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Run a quantised model twice on a fixed input: layers against their opened weights, logits against themselves.

    Twice, as a first evaluation may lay weights out anew. One layer is open at a time. Layers are compared on what
    enters them, so that nothing adds up over the depth of a model.

    Args:
        model: In evaluation mode; of any family.

    Raises:
        ValueError: If a layer is off by more than :data:`TOLERANCE`, or the logits are not finite, or not the same
            twice.
    """
    inputs = _fixed_inputs(model)
    faults: list[str] = []
    passes = []
    for attempt in (1, 2):
        with ExitStack() as stack:
            for name, layer in four_bit_layers(model).items():
                handle = layer.register_forward_hook(partial(_compare, faults, f"{name}: pass {attempt}"))
                stack.callback(handle.remove)
            passes.append(model(**inputs).logits)
    if not faults and not passes[0].isfinite().all():
        faults.append("the logits of a fixed input are not finite")
    if not faults and not relative_error(passes[1], passes[0]) <= TOLERANCE:
        faults.append("the logits of a fixed input differ between two passes")
    if faults:
        cure = "use 'none', or another model.dtype" + (" or model.wo" if model.config.is_encoder_decoder else "")
        raise ValueError(f"model.quantization: 'nf4' does not compute rightly here: {faults[0]}; {cure}")


def _compare(faults: list[str], where: str, layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: note a layer that does not compute what its weights say."""
    want_BTY = open_linear(layer, arguments[0])
    if layer.bias is not None:
        want_BTY += layer.bias.to(want_BTY.dtype)
    error = relative_error(output, want_BTY)
    if not error <= TOLERANCE:
        faults.append(f"{where} is off by {error:.3g} of what its weights say")


def _fixed_inputs(model: Any) -> dict[str, Tensor]:
    """Eight tokens, or a picture of rising brightness."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        shape = (1, config.num_channels, *(size if isinstance(size, list | tuple) else (size, size)))
        values = torch.linspace(-1, 1, shape[1] * shape[2] * shape[3]).reshape(shape)
        return {"pixel_values": values.to(model.device, model.dtype)}
    ids = torch.arange(2, 10, device=model.device).unsqueeze(0) % config.vocab_size
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
