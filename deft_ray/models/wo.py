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
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from deft_ray.density.sites import Site
from deft_ray.models.quantised import TOLERANCE, open_linear, relative_error


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
        ValueError: If a block is off by more than :data:`~deft_ray.models.quantised.TOLERANCE`.
    """
    dice = torch.Generator().manual_seed(0)
    for site in sites:
        block: Any = site.block
        hidden_BTD = torch.randn(1, 8, model.config.d_model, generator=dice).to(model.device, model.dtype)
        for attempt in (1, 2):
            error = relative_error(block(hidden_BTD), open_linear(block.wo, _before_wo(block, hidden_BTD)))
            if not error <= TOLERANCE:
                raise ValueError(_fault(f"{site.name}: pass {attempt} is off by {error:.3g} of what its weights say"))


def _fault(what: str) -> str:
    return f"model.wo: 'nf4' does not compute rightly here: {what}; use 'bfloat16' or 'float32'"
