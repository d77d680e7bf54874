"""A step on real architectures whose blocks are computed again or compiled: what the plain step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from deft_ray.spec.schema import TrialSpec
from deft_ray.train.slot import Slot
from tests.slots import EPSILON, counted_passes, shaken, taken_gradient, worst

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
COMPILED = ("dry-t5", "fused")


@contextmanager
def recomputed(slot: Slot, *, reentrant: bool) -> Iterator[None]:
    """Compute each layer again in the backward pass, as transformers does it."""
    base = slot.base.model
    base.enable_input_require_grads()  # the reentrant kind has no gradient without
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    with counted_passes(slot) as passes:
        yield
    base.disable_input_require_grads()
    assert set(passes.values()) == {2 * slot.accumulation}, "every block runs twice for each part of the batch"


@contextmanager
def compiled(slot: Slot) -> Iterator[None]:
    """Compile the model where it stands; real graphs, without a compiler's rounding."""
    torch._dynamo.reset()
    counters.clear()
    slot.model.compile(backend="aot_eager")
    yield
    assert counters["stats"]["unique_graphs"] > 0, "something was compiled"


WAYS: dict[str, Callable[[Slot], AbstractContextManager[None]]] = {
    "plain": lambda _slot: nullcontext(),
    "reentrant": lambda slot: recomputed(slot, reentrant=True),
    "non-reentrant": lambda slot: recomputed(slot, reentrant=False),
    "compiled": compiled,
}


def gradient_by_backward(slot: Slot) -> dict[str, Tensor]:
    """Gradient of a step by ``backward()``: the reentrant kind takes nothing else; a slot has the other kind."""
    for place in range(slot.accumulation):
        share = slot.share(measure=False)
        with slot.seat.draws.made_global(), slot.probe.penalising(share.penalty):
            (slot.model(**share.batch.inputs).loss * share.scale).backward()
        assert slot._step is not None
        slot._step.done = place + 1
    slot._step = None
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return found


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Model, task, activation and way; to compile takes long, so only one is."""
    for (name, task), activation in product(CASES, ("stock", "fused")):
        for way in ("reentrant", "non-reentrant"):
            yield name, task, activation, way
        if (name, activation) == COMPILED:
            yield name, task, activation, "compiled"


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own, while they compile
@pytest.mark.parametrize(("name", "task", "activation", "way"), list(cases()))
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
        "deft__epsilon": EPSILON,
        "train__max_grad_norm": 0.0,
        "train__micro_batch_size": None if way == "compiled" else 2,  # each shape is compiled anew
    }

    def gradient(alpha: float, way: str) -> dict[str, Tensor]:
        slot = shaken(open_slot(trial(name, task, deft__alpha=alpha, **leaves)))
        with WAYS[way](slot):
            if way == "reentrant":
                return gradient_by_backward(slot)
            slot.step()
        return taken_gradient(slot)

    want = gradient(20.0, "plain")

    assert worst(gradient(20.0, way), want) < 1e-4
    assert worst(gradient(0.0, "plain"), want) > 0.05, "the loss has to weigh something here"
