"""Model families: which class loads them, where their MLP activations are, what their task head is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from deft_ray.density.activation import MlpActivation
from deft_ray.density.sites import Site


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what we need.

    Args:
        name: ``t5``, ``bert`` or ``roberta``.
        text_to_text: True for encoder-decoder models that answer in words.
        blocks: Pattern of the names of the modules that hold an MLP; groups ``side`` (optional) and ``index``.
        activation: Name of the activation module within such a block.
        output: Name of the MLP's last linear layer within such a block.
    """

    name: str
    text_to_text: bool
    blocks: str
    activation: str
    output: str


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "t5", True, r"(?P<side>encoder|decoder)\.block\.(?P<index>\d+)\.layer\.\d+\.DenseReluDense", "act", "wo"
        ),
        Family(
            "bert", False, r"bert\.encoder\.layer\.(?P<index>\d+)", "intermediate.intermediate_act_fn", "output.dense"
        ),
        Family(
            "roberta",
            False,
            r"roberta\.encoder\.layer\.(?P<index>\d+)",
            "intermediate.intermediate_act_fn",
            "output.dense",
        ),
    )
}


def find_sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """List every MLP block, encoder first.

    Args:
        model: The base, without an adapter.
        family: Its family.

    Returns:
        One site per MLP block; each activation module's output is (batch, tokens, d_ff), before any gate product.

    Raises:
        ValueError: If fewer or more are found than the configuration has blocks.
    """
    pattern = re.compile(family.blocks)
    matches = [(pattern.fullmatch(name), module) for name, module in model.named_modules()]
    sites = [
        Site(
            f"{match.groupdict().get('side') or 'encoder'}.{match['index']}",
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


def renew_head(model: Any, family: Family, outputs: int) -> None:
    """Put a freshly initialised task head on an encoder; uses torch's global random state.

    Args:
        model: A sequence-classification model.
        family: Its family.
        outputs: Number of classes, or 1 for a regression.
    """
    config = model.config
    config.num_labels = outputs
    config.problem_type = "regression" if outputs == 1 else "single_label_classification"
    model.num_labels = outputs
    old = next(model.classifier.parameters())
    head = RobertaClassificationHead(config) if family.name == "roberta" else nn.Linear(config.hidden_size, outputs)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)
    head.register_forward_pre_hook(_to_float32)
    model.classifier = head.to(device=old.device, dtype=torch.float32)


def _to_float32(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head trains in float32 whatever the base computes in."""
    return tuple(hidden.float() for hidden in inputs)


def activation_name(sites: list[Site]) -> str:
    """Name the activation function, as exact zeros depend on it: the class name of the activation module."""
    return type(sites[0].module).__name__


def is_never_negative(sites: list[Site]) -> bool:
    """Tell whether no activation can be below zero, from the function's values at a few points."""
    points = torch.linspace(-6.0, 6.0, 97)
    return all(bool((site.module(points) >= 0).all()) for site in sites)
