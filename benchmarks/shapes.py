"""Flan-T5's shapes with random weights: what a benchmark of step time and memory needs, without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

#: d_model, d_ff, heads, layers a stack; T5X's flan-t5 configurations.
SHAPES = {
    "tiny": (64, 128, 4, 2),
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "xl": (2048, 5120, 32, 24),
    "xxl": (4096, 10240, 64, 24),
}
VOCABULARY = 32128


def build_t5(shape: str, *, quantization: str, dtype: torch.dtype, device: torch.device) -> T5ForConditionalGeneration:
    """Build a frozen gated-GELU T5, layer by layer, so that an unquantised XXL never has to exist.

    Args:
        shape: Key of :data:`SHAPES`.
        quantization: ``none`` or ``nf4``; then ``wo`` and the output layer stay in ``dtype``.
        dtype: Compute dtype.
        device: Where to.
    """
    d_model, d_ff, heads, layers = SHAPES[shape]
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quantization == "nf4" and not name.endswith(("wo", "lm_head")):
            _replace(model, name, _quantised(module, dtype, device))
        else:
            _fill(module, dtype, device)
    model.requires_grad_(False)
    return model


def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            value = torch.ones(parameter.shape) if parameter.dim() == 1 else _random(parameter.shape, device)
            setattr(module, name, nn.Parameter(value.to(device=device, dtype=dtype)))


def _random(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device) * shape[-1] ** -0.5


def _quantised(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = _random(linear.weight.shape, device).to(dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to(device)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def random_batch(rows: int, source: int, target: int, device: torch.device, *, seed: int = 0) -> dict[str, Any]:
    """Return a batch without padding: ``input_ids``, ``attention_mask`` (rows, source), ``labels`` (rows, target)."""
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, source), generator=dice)
    labels = torch.randint(3, VOCABULARY, (rows, target), generator=dice)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
    }
