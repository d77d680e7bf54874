"""A slot's dropout is its own wherever it passes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.spec.schema import TrialSpec
from deft_ray.train.cost import PassCost, Size
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.loading import load_task
from deft_ray.train.pack import Pack
from deft_ray.train.random_state import Draws, seed_everything, seeded
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, StepResult, step_together
from tests.slots import new_slot, run

Trial = Callable[..., TrialSpec]


def one_by_one(_self: PassCost, sizes: Sequence[Size]) -> list[list[int]]:
    return [[place] for place in range(len(sizes))]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_slot_that_passes_alone_drops_what_it_drops_by_itself(
    trial: Trial, base_of: Any, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """The base's dropout and LoRA's: losses, adapter, score and density are those of the trial by itself.

    Beside one that comes after its first step and is evaluated in between, and over a save and a load beside it.
    """
    monkeypatch.setattr(PassCost, "groups", one_by_one)
    how = {"model__quantization": quantization, "train__learning_rate": 1e-3}
    first = trial("t5", "sst2", adapter__lora_dropout=0.3, **how)
    second = trial("t5", "mrpc", trial="t0001", seed=7, adapter__lora_dropout=0.1, adapter__r=2, **how)
    base = base_of(first)
    pack = Pack(base)

    def join(spec: TrialSpec) -> Slot:
        return Slot(spec, base, load_task(spec.task, spec.data, base), ranks, pack=pack)

    want, ends = [], []
    for spec in (first, second):
        alone = new_slot(spec, base, ranks)
        want.append(run(alone, 3))
        ends.append(end_of(alone))
        alone.close()
    slots = [join(first)]
    got = [run(slots[0], 1), []]
    slots.append(join(second))
    for _ in range(2):
        for losses, result in zip(got, step_together([(slot, False) for slot in slots]), strict=True):
            assert isinstance(result, StepResult)
            losses.append(result.task_loss)
        slots[1].evaluate()
        slots[0].save(tmp_path)
        slots[0].close()
        slots[0] = join(first)
        slots[0].load(tmp_path)
    got[1] += run(slots[1], 1)
    for slot, (adapter, found) in zip(slots, ends, strict=True):
        learnt, mine = end_of(slot)
        assert float((learnt - adapter).norm() / adapter.norm()) < 1e-3
        assert mine.scores == pytest.approx(found.scores, abs=1e-6)
        assert mine.counts.density() == pytest.approx(found.counts.density(), rel=1e-4)
        slot.close()
    assert got == [pytest.approx(losses, rel=1e-5) for losses in want]


def end_of(slot: Slot) -> tuple[torch.Tensor, Evaluation]:
    """What a slot has learnt, LoRA's B, which begins at zero; and what its evaluation finds."""
    found = slot.evaluate()
    learnt = [
        value.detach().reshape(-1).clone()
        for name, value in slot.model.named_parameters()
        if "lora_B" in name and slot.seat.name in name.split(".")
    ]
    return torch.cat(learnt), found


def test_streams_are_drawn_from_apart() -> None:
    """Each goes on where it was; the global one is not moved; what failed has drawn nothing."""
    seed_everything(3)
    want = torch.rand(6)
    seed_everything(3)
    draws = Draws()
    seed_everything(4)
    others = torch.rand(6)
    seed_everything(4)
    got = []
    for part in range(3):
        with draws.made_global():
            got.append(torch.rand(2))
        if part == 1:
            with pytest.raises(ZeroDivisionError), draws.made_global():
                1 / torch.rand(1).int().item()
        got_beside = torch.rand(2)
        assert torch.equal(got_beside, others[2 * part : 2 * part + 2])
    assert torch.equal(torch.cat(got), want)


def test_seeding_a_slot_moves_nothing_outside() -> None:
    seed_everything(5)
    want = torch.rand(2)
    seed_everything(5)
    with seeded(3):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), want)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), inside)
