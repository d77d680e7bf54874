"""Slots that share the passes of one base leave what each of them leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_ray.models.base import Base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.host import load_task
from deft_ray.train.pack import Pack
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, step_together
from tests.slots import worst

Trial = Callable[..., TrialSpec]


@dataclass
class Left:
    """What a trial leaves: the losses of its steps, its adapter, and what its evaluation found."""

    losses: list[float]
    adapter: dict[str, Tensor]
    lambdas: dict[str, float]
    found: Evaluation


def left_by(slot: Slot, losses: list[float]) -> Left:
    """Evaluate a slot at its end, and copy what it has trained."""
    found = slot.evaluate()
    name = slot.seat.name
    adapter = {
        key.replace(f".{name}.", ".default."): value.detach().clone()
        for key, value in slot.model.named_parameters()
        if name in key.split(".")
    }
    return Left(losses, adapter, slot.lambdas(), found)


def alone(spec: TrialSpec, base: Base, ranks: Ranks) -> Left:
    """Run one trial by itself."""
    slot = Slot(spec, base, load_task(spec.task, spec.data, base), ranks)
    try:
        return left_by(slot, [slot.step().task_loss for _ in range(slot.steps)])
    finally:
        slot.close()


def together(specs: Sequence[TrialSpec], starts: Sequence[int], base: Base, ranks: Ranks) -> list[Left]:
    """Run trials in one pack; each comes after so many passes and goes when it has ended."""
    pack, left, losses = Pack(base), dict[int, Left](), [list[float]() for _ in specs]
    slots, passes = dict[int, Slot](), 0
    while len(left) < len(specs):
        for place, spec in enumerate(specs):
            if starts[place] <= passes and place not in left and place not in slots:
                slots[place] = Slot(spec, base, load_task(spec.task, spec.data, base), ranks, pack=pack)
        results = step_together([(slot, False) for slot in slots.values()]) if slots else []
        for (place, slot), result in list(zip(slots.items(), results, strict=True)):
            if result is not None:
                losses[place].append(result.task_loss)
            if slot.done == slot.steps:
                left[place] = left_by(slot, losses[place])
                slots.pop(place).close()
        passes += 1
    return [left[place] for place in range(len(specs))]


def check_equal(got: Left, want: Left, rel: float) -> None:
    assert got.losses == pytest.approx(want.losses, rel=rel)
    assert got.adapter.keys() == want.adapter.keys()
    assert worst(got.adapter, want.adapter) < 100 * rel, "AdamW turns roundings near zero into steps"
    assert got.lambdas == pytest.approx(want.lambdas, abs=100 * rel)
    assert got.found.scores == pytest.approx(want.found.scores, abs=0.02)
    assert got.found.counts.density() == pytest.approx(want.found.counts.density(), rel=1e-3)


#: Settings that differ in everything that slots may differ in.
MIXED: list[dict[str, Any]] = [
    {"task": "mrpc", "deft__alpha": 0.0},
    {"task": "sst2", "deft__alpha": 3.0, "deft__epsilon": 1e-2, "adapter__r": 2, "seed": 1},
    {"task": "mrpc", "deft__alpha": 1.0, "deft__approximation": "sigmoid", "adapter__target_modules": ["q", "v"]},
    {"task": "stsb", "deft__alpha": 2.0, "deft__adaptive": True, "deft__epsilon": 1e-3, "train__steps": 7},
    {"task": "squad", "deft__alpha": 1.0, "deft__approximation": "l1", "data__max_target_tokens": 4, "seed": 2},
    {"task": "rte", "deft__alpha": 5.0, "deft__alpha_decoder": 0.5, "train__learning_rate": 3e-3, "adapter__r": 8},
    {"task": "sst2", "deft__alpha": 1.0, "deft__count_padding": True, "train__micro_batch_size": 2, "seed": 3},
    {"task": "qnli", "deft__alpha": 4.0, "deft__alpha_delay": 0.4, "train__max_grad_norm": 0.1, "train__batch_size": 3},
]
STARTS = [0, 0, 2, 1, 3, 0, 1, 5]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_slot_of_a_pack_leaves_what_it_leaves_alone(
    trial: Trial, base_of: Any, ranks: Ranks, count: int, quantization: str
) -> None:
    specs = [
        trial("dry-t5", model__quantization=quantization, trial=f"t{place:04}", **leaves)
        for place, leaves in enumerate(MIXED[:count])
    ]
    base = base_of(specs[0])
    names = [name for name, _ in base.model.named_modules()]
    want = [alone(spec, base, ranks) for spec in specs]
    got = together(specs, STARTS, base, ranks)
    for mine, other in zip(got, want, strict=True):
        check_equal(mine, other, 1e-4)
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
