"""Put a fresh adapter on a shared base, and take it off again."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from deft_ray.models.base import Base
from deft_ray.models.families import renew_head


def attach_adapter(
    base: Base,
    *,
    outputs: int | None,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: str | list[str],
    gradient_checkpointing: bool = False,
) -> PeftModel:
    """Attach a LoRA adapter, and a task head to a model with one stack; draws from torch's global random state.

    Args:
        base: The shared base, without an adapter.
        outputs: Classes of the head (1 for a regression); None for text-to-text models.
        r: LoRA rank.
        lora_alpha: LoRA scale times r.
        lora_dropout: Dropout on LoRA's input.
        target_modules: ``all-linear`` or names of modules.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Returns:
        The PEFT model; only its adapter and head are trainable, in float32.

    Raises:
        ValueError: If a target names no module; PEFT alone would pass over it in silence.
    """
    if isinstance(target_modules, list):
        _require_targets(base, target_modules)
    if outputs is not None:
        renew_head(base.model, base.family, outputs)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT's annotation says int, its code takes any number
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
        task_type=TaskType.SEQ_2_SEQ_LM if base.family.text_to_text else TaskType.SEQ_CLS,
    )
    model: PeftModel = get_peft_model(base.model, config)
    if gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.disable_input_require_grads()  # a hook for the reentrant kind, which nobody would take off again
    return model


def _require_targets(base: Base, target_modules: list[str]) -> None:
    linear = {
        name.split(".")[-1] for name, module in base.model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    names = [name for name, _ in base.model.named_modules()]
    lost = [target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in names)]
    if lost:
        there = ", ".join(sorted(linear))
        raise ValueError(f"adapter.target_modules: no module is named {', '.join(lost)}; linear layers here: {there}")


def detach_adapter(model: PeftModel) -> None:
    """Give the base its own modules back."""
    model.unload()
    base: Any = model.get_base_model()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.activation_checkpointing_disable()
    base.requires_grad_(False)


def trainable_share(model: PeftModel) -> float:
    """Trainable parameters over all parameters; 4-bit weights count as the parameters that they hold."""
    trainable, total = model.get_nb_trainable_parameters()
    return trainable / total
