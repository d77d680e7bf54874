"""Put a fresh adapter on a shared base, and take it off again."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.utils import (
    ModulesToSaveWrapper,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from deft_ray.models.base import Base
from deft_ray.models.bottleneck import BottleneckConfig, hidden_units, output_width
from deft_ray.models.families import residual_stream
from deft_ray.models.heads import UNREAD, leaves_pooler_unread, remove_head, renew_head


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of linear layers.

    Args:
        r: Rank.
        lora_alpha: Scale times r.
        lora_dropout: Dropout on the update's input.
        target_modules: ``all-linear`` or names of modules.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | list[str]


@dataclass(frozen=True)
class Bottleneck:
    """A small MLP behind each MLP block.

    Args:
        reduction_factor: It has d_model / so many hidden units.
        reads_sum: Whether it reads the block's output with the residual stream added, in place of the output alone.
    """

    reduction_factor: int
    reads_sum: bool = False


@dataclass(frozen=True)
class Prefix:
    """Keys and values of ``virtual_tokens`` trained tokens before those of each self-attention.

    PEFT puts them into an encoder, and into the decoder of an encoder-decoder; T5's encoder stays as it is.
    """

    virtual_tokens: int


@dataclass(frozen=True)
class Prompt:
    """Embeddings of ``virtual_tokens`` trained tokens before the encoder's input; the task head reads the first."""

    virtual_tokens: int


Adapter = Lora | Bottleneck | Prefix | Prompt

#: Name of a base's first adapter, which is PEFT's own for it.
FIRST = "default"


def attach_adapter(
    base: Base,
    adapter: Adapter,
    *,
    outputs: int | None,
    two_layer_head: bool = False,
    source_tokens: int = 0,
    gradient_checkpointing: bool = False,
    beside: PeftModel | None = None,
    name: str = FIRST,
) -> PeftModel:
    """Attach an adapter, and a task head to a model with one stack; draws from torch's global random state.

    Args:
        base: The shared base, without an adapter but those of ``beside``.
        adapter: Which, and how large.
        outputs: Classes of the head (1 for a regression); None for text-to-text models.
        two_layer_head: See :func:`~deft_ray.models.heads.renew_head`; the same as of ``beside``.
        source_tokens: Longest source that the model will be given; 0 where it does not matter.
        gradient_checkpointing: Recompute blocks in the backward pass; not with a prefix, which a block computed again
            would take in twice.
        beside: The base's PEFT model, where the base has an adapter already, of the same kind.
        name: Of the adapter, no other one's.

    Returns:
        The PEFT model; only its adapters and heads are trainable, in float32.

    Raises:
        ValueError: If the adapter does not fit the base: a target names no module (PEFT alone would pass over it in
            silence), a bottleneck has no hidden unit, or the source takes more positions than there are, with
            virtual tokens or without.
    """
    _require_positions(base, adapter.virtual_tokens if isinstance(adapter, Prefix | Prompt) else 0, source_tokens)
    config = _peft_config(base, adapter, two_layer_head)
    if outputs is not None:
        renew_head(base.model, base.family, outputs, two_layers=two_layer_head)
    if beside is None:
        try:
            model: PeftModel = get_peft_model(base.model, config, adapter_name=name)
        except Exception:  # whatever it was: no head stays on the base, and no pooler unread
            remove_head(base.model)
            raise
    else:
        model = beside
        try:
            model.add_adapter(name, config)
        except Exception:  # whatever it was, the others train on: PEFT leaves them half frozen, and half of this one
            model.peft_config.setdefault(name, config)
            detach_adapter(model, name)
            raise
    for _, parameter in adapter_parameters(model, name):
        parameter.requires_grad_(True)
    if gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.disable_input_require_grads()  # a hook for the reentrant kind, which nobody would take off again
    return model


def _peft_config(base: Base, adapter: Adapter, two_layer_head: bool) -> PeftConfig:
    task = TaskType.SEQ_2_SEQ_LM if base.family.text_to_text else TaskType.SEQ_CLS
    if isinstance(adapter, Lora):
        if isinstance(adapter.target_modules, list):
            _require_targets(base, adapter.target_modules)
        return LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # PEFT says int, its code takes any number
            lora_dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
            exclude_modules=UNREAD if leaves_pooler_unread(base.family, two_layers=two_layer_head) else None,
            task_type=task,
        )
    if isinstance(adapter, Bottleneck):
        return _bottleneck_config(base, adapter, task)
    if isinstance(adapter, Prefix):
        return _prefix_config(base, adapter.virtual_tokens, task)
    return PromptTuningConfig(
        num_virtual_tokens=adapter.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.RANDOM,
        num_transformer_submodules=1,  # PEFT's 2 for an encoder-decoder adds rows that nothing ever reads
        task_type=task,
    )


def _bottleneck_config(base: Base, adapter: Bottleneck, task: TaskType) -> BottleneckConfig:
    names = {module: name for name, module in base.model.named_modules()}
    targets = {site.name: f"{names[site.block]}.{site.output}" for site in base.sites}
    for target in targets.values():
        hidden_units(output_width(base.model.get_submodule(target)), adapter.reduction_factor)
    config = BottleneckConfig(
        reduction_factor=adapter.reduction_factor, target_modules=list(targets.values()), task_type=task
    )
    if adapter.reads_sum:
        config.reads = "sum"
        residual, norm = residual_stream(base.family, base.model.config)
        for site in base.sites:
            block, target = names[site.block], targets[site.name]
            around = block.rpartition(".")[0]
            inside = residual.removeprefix("..")
            config.residuals[target] = f"{block if inside == residual else around}.{inside}"
            if norm is not None:
                config.norms[target] = f"{block}.{norm}"
    return config


def _prefix_config(base: Base, virtual_tokens: int, task: TaskType) -> PrefixTuningConfig:
    """Tell PEFT how wide and how many the keys are; for an encoder-decoder it would guess wrong.

    It would take d_model for the keys' width and the encoder's depth for the decoder's. And it deals the trained keys
    and values out four to a layer, two of them for cross-attention, which it then drops, round a ring of 2 x
    ``num_layers``: if that is even, layer i shares with layer i + ``num_layers`` / 2 and half of the ring is never
    read. Round an odd ring every layer comes by its own; at most one layer's worth is left over, which nothing reads.
    """
    config, sizes = PrefixTuningConfig(num_virtual_tokens=virtual_tokens, task_type=task), base.model.config
    if base.family.text_to_text:
        config.token_dim, config.num_layers = sizes.num_heads * sizes.d_kv, sizes.num_decoder_layers | 1
    return config


def _require_targets(base: Base, target_modules: list[str]) -> None:
    linear = {
        name.split(".")[-1] for name, module in base.model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    names = [name for name, _ in base.model.named_modules()]
    lost = [target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in names)]
    if lost:
        there = ", ".join(sorted(linear))
        raise ValueError(f"adapter.target_modules: no module is named {', '.join(lost)}; linear layers here: {there}")


def _require_positions(base: Base, virtual_tokens: int, source_tokens: int) -> None:
    """Virtual tokens take positions, a prefix's too; T5's relative ones do not end."""
    there = _positions(base)
    if there is None or virtual_tokens + source_tokens <= there:
        return
    if not virtual_tokens:
        raise ValueError(
            f"data.max_source_tokens: there are sources of {source_tokens} tokens, the model has {there} positions; "
            "lower it to that"
        )
    raise ValueError(
        f"adapter.virtual_tokens: {virtual_tokens} virtual tokens and sources of up to {source_tokens} tokens take "
        f"{virtual_tokens + source_tokens} positions, the model has {there}; take fewer virtual tokens or lower "
        "data.max_source_tokens"
    )


def _positions(base: Base) -> int | None:
    """Count the learnt positions that a source can take; RoBERTa numbers them from behind its padding token.

    None where they do not end: T5's are relative, images are of one size.
    """
    for name, module in base.model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    there: int | None = getattr(base.model.config, "max_position_embeddings", None)
    return there


def adapter_parameters(model: PeftModel, name: str) -> list[tuple[str, nn.Parameter]]:
    """Return what one adapter trains, its head with it, each with its name in the model."""
    return [(key, value) for key, value in model.named_parameters() if name in key.split(".")]


def virtual_positions(model: PeftModel) -> int:
    """Return how many positions the adapter puts before the encoder's input: those of a prompt, else none."""
    config = model.active_peft_config
    return int(config.num_virtual_tokens) if isinstance(config, PromptTuningConfig) else 0


def load_adapter_weights(model: PeftModel, folder: Path, name: str = FIRST) -> None:
    """Give an attached adapter, and its head, the values of a saved one.

    Args:
        model: With the same kind and size of adapter as was saved.
        folder: As ``save_pretrained`` wrote it.
        name: Of the adapter.

    Raises:
        ValueError: If the saved adapter lacks a value, or has one that this adapter has no place for.
    """
    saved = load_peft_weights(str(folder), device="cpu")
    found: Any = set_peft_model_state_dict(model, saved, adapter_name=name)
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    strange = set(found.unexpected_keys) - wanted  # virtual tokens have their place under another name
    faults = [f"lacks {name}" for name in wanted - saved.keys()] + [f"has {name} too" for name in strange]
    if faults:
        raise ValueError(f"{folder}: is no adapter of this kind: {', '.join(sorted(faults)[:5])}")


def save_adapter(model: PeftModel, folder: Path, name: str = FIRST) -> None:
    """Write one adapter, and its head, as PEFT writes a model's only one."""
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    inside = folder / name  # where PEFT puts all but the first
    for file in list(inside.iterdir()) if name != FIRST else ():
        file.rename(folder / file.name)
    if name != FIRST:
        inside.rmdir()


def detach_adapter(model: PeftModel, name: str = FIRST) -> None:
    """Take an adapter off; with the last one the base has its own modules back."""
    others = [other for other in model.peft_config if other != name]
    if others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another one is active now, which says nothing here
            model.delete_adapter(name)
        model.set_adapter(others[0])  # PEFT may be left without an active one, where its first layer has none left
        for other in others:
            for _, parameter in adapter_parameters(model, other):
                parameter.requires_grad_(True)
        return
    base: Any = model.get_base_model()
    remove_head(base)
    if not model.active_peft_config.is_prompt_learning:
        model.unload()
    vars(base).pop("prepare_inputs_for_generation", None)  # PEFT's generate() leaves it on the instance
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.activation_checkpointing_disable()
    base.requires_grad_(False)


def trainable_share(model: PeftModel, name: str = FIRST) -> float:
    """Trainable parameters over all parameters, as if the model had this adapter alone.

    4-bit weights count as the parameters that they hold. PEFT keeps a frozen copy of an encoder's head beside the one
    that it trains; the copy is no part of the model and does not count.
    """
    mine = {id(parameter) for _, parameter in adapter_parameters(model, name)}
    not_mine = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for parameter in module.parameters()
    } | {id(parameter) for other in model.peft_config for _, parameter in adapter_parameters(model, other)}
    trained = rest = 0
    for parameter in model.parameters():
        if id(parameter) in mine:
            trained += _held_parameters(parameter)
        elif id(parameter) not in not_mine:
            rest += _held_parameters(parameter)
    return trained / (trained + rest)


def _held_parameters(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
