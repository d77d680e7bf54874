"""T5's ``wo`` under NF4: left as it is, or quantised too and proven right.

transformers keeps ``wo`` out of 4-bit quantisation, and T5's MLP casts what enters ``wo`` to the dtype of its weight.
Of a 4-bit weight that is uint8, the storage: the activations are cut to whole numbers and nothing says so. So a block
with a 4-bit ``wo`` gets the forward pass of this module, and is checked once it is loaded.

Shape suffixes: B batch, T tokens, D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from deft_ray.density.sites import Site

#: Relative error at which a block counts as wrong: well above a few roundings of bfloat16 (2^-8 each), far below what a
#: cast to uint8 leaves, where negative numbers wrap around: 40 to 300 on small models.
TOLERANCE = 0.05


def resolve_wo(wo: str | None, device: torch.device) -> str | None:
    """Return how ``wo`` is to lie in memory under NF4; None is the compute dtype.

    Left to us it is bfloat16 on a GPU that computes in it, whatever the compute dtype: float32 takes 8 GB of a
    Flan-T5-XXL, for weights whose neighbours have four bits. What an adapter adds to the output of ``wo`` is rounded
    with it, as everything is in a model of bfloat16. On a CPU, where that can be many times slower, it is the compute
    dtype.

    Args:
        wo: What the spec says.
        device: Where the model computes.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if wo is None and fast else wo


@contextmanager
def loading_wo(wo: str | None) -> Iterator[None]:
    """Say how ``wo`` is loaded by any ``from_pretrained`` of a T5 inside.

    Args:
        wo: ``nf4`` quantises it with the rest; ``float32`` keeps what a float32 checkpoint holds; anything else changes
            nothing.
    """
    cls: Any = T5PreTrainedModel
    kept, strict = cls._keep_in_fp32_modules, cls._keep_in_fp32_modules_strict
    if wo == "nf4":
        cls._keep_in_fp32_modules = None  # on this class: every part of a T5 reads it there
    elif wo == "float32":
        cls._keep_in_fp32_modules_strict = ["wo"]
    try:
        yield
    finally:
        cls._keep_in_fp32_modules, cls._keep_in_fp32_modules_strict = kept, strict


def settle_wo(sites: list[Site], wo: str | None) -> None:
    """Bring every loaded ``wo`` to what was asked for.

    Args:
        sites: The MLP blocks of a T5 under NF4.
        wo: ``nf4``, ``bfloat16``, ``float32``, or None for the compute dtype.

    Raises:
        ValueError: If ``wo`` was to be quantised and is not, or was not to be and is.
    """
    for site in sites:
        output: Any = site.block.get_submodule(site.output)
        if wo == "nf4":
            if not isinstance(output, bnb.nn.Linear4bit):
                raise ValueError(f"model.wo: cannot be 'nf4' here: {site.name} has a {type(output).__name__}")
            site.block.forward = partial(_feed_forward, site.block)
            continue
        if not output.weight.is_floating_point():  # T5 would cast what enters it to that
            raise ValueError(f"model.wo: {site.name} is loaded as {output.weight.dtype}; ask for 'nf4'")
        if wo is not None:
            output.to(getattr(torch, wo))


def _feed_forward(block: Any, hidden_BTD: Tensor) -> Tensor:
    """T5's MLP, gated or not; the quantised ``wo`` computes in its own compute dtype, so nothing is cast."""
    act_BTF = _before_wo(block, hidden_BTD)
    assert act_BTF.is_floating_point(), act_BTF.dtype
    out_BTD: Tensor = block.wo(act_BTF)
    return out_BTD


def _before_wo(block: Any, hidden_BTD: Tensor) -> Tensor:
    if hasattr(block, "wi_0"):
        act_BTF: Tensor = block.act(block.wi_0(hidden_BTD)) * block.wi_1(hidden_BTD)
    else:
        act_BTF = block.act(block.wi(hidden_BTD))
    dropped: Tensor = block.dropout(act_BTF)
    return dropped


@torch.no_grad()
def check_wo(model: Any, sites: list[Site]) -> None:
    """Compare every block with its own weights, opened from four bits.

    Twice, as a first evaluation may lay weights out anew. One block's ``wo`` is open at a time: 84 MB of an XXL's in
    bfloat16, where a second, unquantised model would be 22 GB.

    Args:
        model: A T5 in evaluation mode whose ``wo`` are four-bit.
        sites: Its MLP blocks.

    Raises:
        ValueError: If a block is off by more than :data:`TOLERANCE`.
    """
    dice = torch.Generator().manual_seed(0)
    for site in sites:
        block: Any = site.block
        hidden_BTD = torch.randn(1, 8, model.config.d_model, generator=dice).to(model.device, model.dtype)
        for attempt in (1, 2):
            error = _relative_error(block(hidden_BTD), _expected(block, hidden_BTD))
            if not error <= TOLERANCE:
                raise ValueError(_fault(f"{site.name}: pass {attempt} is off by {error:.3g} of what its weights say"))


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Compare a quantised T5 with itself on a fixed text, whatever its ``wo``.

    Args:
        model: In evaluation mode.

    Raises:
        ValueError: If its logits are not finite, or not the same twice.
    """
    ids = torch.arange(2, 10, device=model.device).unsqueeze(0)
    first, second = (model(input_ids=ids, decoder_input_ids=ids).logits for _ in range(2))
    fault = "are not finite" if not first.isfinite().all() else ""
    if not fault and not _relative_error(second, first) <= TOLERANCE:
        fault = "differ between two passes"
    if fault:
        raise ValueError(
            f"model.quantization: 'nf4' does not compute rightly here: the logits of a fixed text {fault}; "
            "use 'none', or another model.dtype or model.wo"
        )


def _expected(block: Any, hidden_BTD: Tensor) -> Tensor:
    """The block's output with ``wo`` opened: a plain product of floating numbers."""
    weight_DF = bnb.functional.dequantize_4bit(block.wo.weight.data, block.wo.weight.quant_state)
    act_BTF = _before_wo(block, hidden_BTD)
    return nn.functional.linear(act_BTF.to(weight_DF.dtype), weight_DF)


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Distance over length; 0 where both are zero."""
    length = float(want.float().norm())
    distance = float((got.float() - want.float()).norm())
    return distance / length if length else distance


def _fault(what: str) -> str:
    return f"model.wo: 'nf4' does not compute rightly here: {what}; use 'bfloat16' or 'float32'"
