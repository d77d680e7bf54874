"""Model families: which class loads them, where their MLP activations are and the residual stream beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ReLUSquaredActivation

from deft_ray.density.activation import MlpActivation
from deft_ray.density.sites import Site


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what we need.

    Args:
        name: Key of :data:`FAMILIES`; transformers' model type.
        text_to_text: True for encoder-decoder models that answer in words.
        blocks: Pattern of the names of the modules that hold an MLP; groups ``side`` (optional) and ``index``.
        activation: Name of the activation module within such a block.
        output: Name of the MLP's last linear layer within such a block; GPT-2's is a ``Conv1D``.
        residual: Name, from such a block, of the module that is given the residual stream which the block's output is
            added to; a leading ``..`` is the module around the block.
        norm: Name of the layer norm of that sum, where blocks normalise behind it.
        side: The stack that reads the input. A decoder reads its answer from the last token, so it is padded left.
        head: Name of the task head, where there is one.
        images: True for models that read images.
    """

    name: str
    text_to_text: bool
    blocks: str
    activation: str
    output: str
    residual: str
    norm: str | None = None
    side: str = "encoder"
    head: str = "classifier"
    images: bool = False


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "t5",
            True,
            r"(?P<side>encoder|decoder)\.block\.(?P<index>\d+)\.layer\.\d+\.DenseReluDense",
            "act",
            "wo",
            "..layer_norm",
        ),
        Family(
            "bert",
            False,
            r"bert\.encoder\.layer\.(?P<index>\d+)",
            "intermediate.intermediate_act_fn",
            "output.dense",
            "intermediate.dense",
            norm="output.LayerNorm",
        ),
        Family(
            "roberta",
            False,
            r"roberta\.encoder\.layer\.(?P<index>\d+)",
            "intermediate.intermediate_act_fn",
            "output.dense",
            "intermediate.dense",
            norm="output.LayerNorm",
        ),
        Family(
            "opt",
            False,
            r"model\.decoder\.layers\.(?P<index>\d+)",
            "activation_fn",
            "fc2",
            "final_layer_norm",
            side="decoder",
            head="score",
        ),
        Family(
            "gpt2",
            False,
            r"transformer\.h\.(?P<index>\d+)\.mlp",
            "act",
            "c_proj",
            "..ln_2",
            side="decoder",
            head="score",
        ),
        Family(
            "vit",
            False,
            r"vit\.layers\.(?P<index>\d+)\.mlp",
            "activation_fn",
            "fc2",
            "..layernorm_after",
            images=True,
        ),
    )
}


def find_sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """List every MLP block, encoder first.

    Args:
        model: The base, without an adapter.
        family: Its family.

    Returns:
        One site per MLP block; each activation module's output is (batch, tokens, d_ff), or OPT's (batch x tokens,
        d_ff), before any gate product.

    Raises:
        ValueError: If fewer or more are found than the configuration has blocks.
    """
    pattern = re.compile(family.blocks)
    matches = [(pattern.fullmatch(name), module) for name, module in model.named_modules()]
    sites = [
        Site(
            f"{match.groupdict().get('side') or family.side}.{match['index']}",
            module,
            family.activation,
            family.output,
            gated_t5_forward if _has(module, "wi_1") else None,
        )
        for match, module in matches
        if match is not None and _has(module, family.activation) and _has(module, family.output)
    ]
    blocks = _count_blocks(model)
    if len(sites) != blocks:
        raise ValueError(
            f"found {len(sites)} MLP activations but {blocks} MLP blocks in a {type(model).__name__}; "
            f"families known: {', '.join(FAMILIES)}"
        )
    return sorted(sites, key=lambda site: (site.side != "encoder", int(site.name.split(".")[1])))


def gated_t5_forward(block: Any, activation: MlpActivation, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Forward pass of ``T5DenseGatedActDense`` with the gate as one function."""
    product_BTF = block.dropout(activation.gate(block.wi_0(hidden_BTD), block.wi_1(hidden_BTD)))
    assert product_BTF.is_floating_point(), product_BTF.dtype
    dtype = block.wo.weight.dtype
    out_BTD: torch.Tensor = block.wo(product_BTF.to(dtype) if dtype.is_floating_point else product_BTF)
    return out_BTD


def _has(module: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in module.named_modules())


def _count_blocks(model: PreTrainedModel) -> int:
    config = model.config
    if config.is_encoder_decoder:
        return int(config.num_layers) + int(config.num_decoder_layers)
    return int(config.num_hidden_layers)


def residual_stream(family: Family, config: Any) -> tuple[str, str | None]:
    """Return ``residual`` and ``norm`` of a model; of the OPTs only the one of 350 M parameters has a norm behind."""
    if family.name == "opt" and not config.do_layer_norm_before:
        return "fc1", "final_layer_norm"
    return family.residual, family.norm


def activation_name(sites: list[Site]) -> str:
    """Name the activation function, as exact zeros depend on it: the class name of the activation module."""
    return type(_activation(sites[0])).__name__


def activation_is_nonnegative(sites: list[Site]) -> bool:
    """Tell whether no activation can be below zero, as after a ReLU; GELU's can."""
    return all(isinstance(_activation(site), nn.ReLU | nn.ReLU6 | ReLUSquaredActivation) for site in sites)


def _activation(site: Site) -> nn.Module:
    """The model's own activation, whatever stands in for it while slots train."""
    return site.module.stock if isinstance(site.module, MlpActivation) else site.module
