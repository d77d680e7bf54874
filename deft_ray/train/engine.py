"""A DeepSpeed engine around one slot's trainable parameters, and nothing else.

The engine sees the adapter and the head only. DeepSpeed knows nothing of the frozen base, and neither broadcasts nor
casts nor saves it, so an engine costs what the adapter costs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deft_ray.density.scales import LayerScales

_SILENT = 10**9


class SlotModule(nn.Module):
    """What DeepSpeed takes for the whole model: the trainable parameters of a slot.

    The pass that finds their gradients is shared by several slots, so DeepSpeed does not see it. What it sees is the
    pass of a stand-in, a zero with the same gradients.

    Args:
        trainable: The adapter's and the head's parameters.
        scales: Layer scales of ADA-DEFT, or None.
        scales_learning_rate: Their peak learning rate.
    """

    def __init__(
        self, trainable: Sequence[nn.Parameter], scales: LayerScales | None = None, scales_learning_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.scales_learning_rate = scales_learning_rate
        self.trainable = tuple(trainable)
        self.scales = tuple(scales.parameters()) if scales is not None else ()
        for index, parameter in enumerate((*self.trainable, *self.scales)):
            self.register_parameter(f"parameter_{index}", parameter)

    def forward(self, gradients: list[Tensor | None]) -> Tensor:
        """Return a zero with these gradients.

        Args:
            gradients: In the order of :meth:`parameters`; None for one without. The list is emptied, so that nobody
                holds them any more and the parameters take them over as they are.
        """
        parameters = [*self.trainable, *self.scales]
        used = [place for place, gradient in enumerate(gradients) if gradient is not None]
        given = [gradients[place] for place in used]
        gradients.clear()
        zero: Tensor = _StandIn.apply(given, *(parameters[place] for place in used))
        return zero


class _StandIn(torch.autograd.Function):
    """A zero with given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        if grads[0].is_cuda or grads[0] != 1:  # on a GPU it would have to be waited for
            gradients[:] = [gradient * grads[0] for gradient in gradients]
        found = None, *gradients
        gradients.clear()
        return found


def build_engine(
    module: SlotModule,
    *,
    batch_size: int,
    micro_batch_size: int,
    accumulation: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    zero_stage: int,
    paged: bool = False,
) -> Any:
    """Build a DeepSpeed engine with AdamW; needs an initialised process group.

    Args:
        module: The slot's trainable parameters, float32.
        batch_size: Examples per step over all workers.
        micro_batch_size: Examples per forward pass and worker.
        accumulation: Forward passes per step.
        learning_rate: First learning rate; set per step through :func:`set_learning_rate`.
        weight_decay: AdamW's.
        max_grad_norm: Clip the gradient's global norm to this; 0 for never. DeepSpeed's silent default is 1. At stage 0
            it is clipped by torch, as by any other trainer, as DeepSpeed sums the norm in another order.
        zero_stage: 0 to 3; 3 shares out the trainable parameters too, the frozen base stays whole on every worker.
        paged: See :func:`build_optimizer`.
    """
    deepspeed = _deepspeed()
    plain = zero_stage == 0
    clipped = max_grad_norm if plain else 0.0
    optimizer = build_optimizer(module, learning_rate, weight_decay, paged=paged, max_grad_norm=clipped)
    config = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if plain else max_grad_norm,
        "zero_optimization": {"stage": zero_stage, **({"param_persistence_threshold": 0} if zero_stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _SILENT,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if plain and engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False  # else every gradient is copied together and back, to no end
    return engine


@contextmanager
def whole(module: SlotModule) -> Iterator[None]:
    """Hold every parameter in full on every worker, where ZeRO-3 has shared them out; collective."""
    shared = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared):
        yield


class _Bounded(torch.optim.Optimizer):
    """Clips gradients before, and bounds parameters after, every step of the optimizer it is mixed into.

    Parameters of a group with ``bounds`` are kept between them, inside the optimizer and not behind it, so that it
    holds for the master copies that ZeRO steps on.

    Attributes:
        max_grad_norm: See :func:`build_engine`; 0 where gradients come clipped.
    """

    max_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        if self.max_grad_norm:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        loss = super().step(closure)
        for group in self.param_groups:
            if group.get("bounds") is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group["bounds"])
        return loss


class BoundedAdamW(_Bounded, torch.optim.AdamW):
    """torch's AdamW, bounded."""


def build_optimizer(
    module: SlotModule, learning_rate: float, weight_decay: float, *, paged: bool = False, max_grad_norm: float = 0.0
) -> torch.optim.Optimizer:
    """Return fused AdamW; layer scales have their own learning rate, no decay, and stay in [0, 1].

    Each group's ``rate_share`` is its learning rate over the slot's.

    Args:
        module: The slot's trainable parameters.
        learning_rate: First learning rate.
        weight_decay: AdamW's; 0 for layer scales.
        paged: bitsandbytes' AdamW with 32-bit moments, which a GPU short of memory moves to the host's (QLoRA, Dettmers
            et al., arXiv:2305.14314): those of 100,000 parameters and more. bitsandbytes never gives that memory back,
            so each trial of a host keeps its share. On a CPU the same without paging.
        max_grad_norm: What it clips gradients to by itself; 0 for never.
    """
    groups: list[dict[str, Any]] = [{"params": list(module.trainable), "weight_decay": weight_decay, "rate_share": 1.0}]
    if module.scales:
        share = module.scales_learning_rate / learning_rate
        groups.append({"params": list(module.scales), "weight_decay": 0.0, "rate_share": share, "bounds": (0.0, 1.0)})
    optimizer: Any
    if not paged:
        optimizer = BoundedAdamW(groups, lr=learning_rate, fused=True)
    else:
        from bitsandbytes.optim import AdamW32bit, PagedAdamW32bit

        on_gpu = module.trainable[0].device.type == "cuda"
        # bitsandbytes has no types, and is loaded only by who asks for it: half a second
        bounded = type("BoundedPagedAdamW", (_Bounded, PagedAdamW32bit if on_gpu else AdamW32bit), {})
        optimizer = bounded(groups, lr=learning_rate)
    optimizer.max_grad_norm = max_grad_norm
    found: torch.optim.Optimizer = optimizer
    return found


def _deepspeed() -> Any:
    """Import DeepSpeed without what training has no use for.

    Its autotuner loads MLflow if it can: a second or two in every worker. Its communication layer compiles
    shared-memory collectives, for inference only, where its table of operators allows it: a compiler and a minute.
    """
    if "deepspeed" not in sys.modules:
        mlflow = sys.modules.get("mlflow")
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own way to say: not to be had
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
            if mlflow is not None:
                sys.modules["mlflow"] = mlflow
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the slot's learning rate for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_share"]


def learning_rate_at(step: int, *, peak: float, steps: int, warmup_share: float, schedule: str) -> float:
    """Learning rate of one step.

    Args:
        step: From 0.
        peak: Highest rate.
        steps: Steps in all.
        warmup_share: Share of the steps in which the rate rises linearly to its peak.
        schedule: ``linear`` falls to 0 after the last step, ``constant`` stays.
    """
    warmup = int(warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (steps - step) / max(1, steps - warmup)
