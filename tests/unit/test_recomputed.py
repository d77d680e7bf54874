"""A step on real architectures whose blocks are computed again or compiled: what the plain step takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deft_ray.spec.schema import TrialSpec
from deft_ray.train.slot import Slot
from tests.slots import EPSILON, shaken, taken_gradient, worst

#: Model and task of every family, and of T5 both blocks.
CASES = (
    ("t5", "squad"),
    ("dry-t5", "squad"),
    ("bert", "rte"),
    ("roberta", "stsb"),
    ("opt", "sst2"),
    ("gpt2", "mnli"),
    ("vit", "images"),
)


def recomputed(slot: Slot, *, reentrant: bool) -> None:
    """Compute each layer again in the backward pass, as transformers does it."""
    slot.base.model.enable_input_require_grads()  # the reentrant kind has no gradient without
    slot.base.model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def compiled(slot: Slot) -> None:
    """Compile the model where it stands; real graphs, without a compiler's rounding."""
    torch._dynamo.reset()
    slot.model.compile(backend="aot_eager")


WAYS: dict[str, Callable[[Slot], None]] = {
    "reentrant": lambda slot: recomputed(slot, reentrant=True),
    "non-reentrant": lambda slot: recomputed(slot, reentrant=False),
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own, while they compile
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["stock", "fused"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_gradient_is_that_of_the_plain_step(
    open_slot: Callable[[TrialSpec], Slot],
    trial: Callable[..., TrialSpec],
    name: str,
    task: str,
    activation: str,
    way: str,
) -> None:
    leaves = {
        "model__activation": activation,
        "deft__alpha": 20.0,
        "deft__epsilon": EPSILON,
        "train__max_grad_norm": 0.0,
        "train__micro_batch_size": 2,
    }

    def gradient(alpha: float, prepare: Callable[[Slot], None] | None) -> dict[str, Tensor]:
        slot = shaken(open_slot(trial(name, task, **{**leaves, "deft__alpha": alpha})))
        if prepare is not None:
            prepare(slot)
        slot.step()
        return taken_gradient(slot)

    want = gradient(20.0, None)
    got = gradient(20.0, WAYS[way])

    assert worst(got, want) < 1e-4
    assert worst(gradient(0.0, None), want) > 0.05, "the loss has to weigh something here"
