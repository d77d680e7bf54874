"""Slots that share the passes of one base leave what each of them leaves alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor, nn

from deft_ray.models.base import Base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.host import load_task
from deft_ray.train.pack import Pack
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, step_together
from tests.slots import run, worst

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
            assert not isinstance(result, Exception)
            if result is not None:
                losses[place].append(result.task_loss)
            if slot.done == slot.steps:
                left[place] = left_by(slot, losses[place])
                slots.pop(place).close()
        passes += 1
    return [left[place] for place in range(len(specs))]


def check_equal(got: Left, want: Left, rel: float) -> None:
    """Compare what two runs of a trial left; AdamW makes whole steps of any rounding, so weights may be further off."""
    assert got.losses == pytest.approx(want.losses, rel=rel)
    assert got.adapter.keys() == want.adapter.keys()
    assert worst(got.adapter, want.adapter) < 100 * rel
    assert got.lambdas == pytest.approx(want.lambdas, abs=100 * rel)
    assert got.found.scores == pytest.approx(want.found.scores, abs=100 * rel)
    assert got.found.counts.density() == pytest.approx(want.found.counts.density(), rel=10 * rel)


#: Settings that differ in everything that slots may differ in.
MIXED: list[dict[str, Any]] = [
    {"task": "mrpc", "deft__alpha": 0.0},
    {"task": "sst2", "deft__alpha": 3.0, "deft__epsilon": 1e-2, "adapter__r": 2, "seed": 1},
    {
        "task": "mrpc",
        "deft__alpha": 1.0,
        "deft__approximation": "sigmoid",
        "deft__beta": 5.0,
        "adapter__target_modules": ["q", "v"],
    },
    {"task": "stsb", "deft__alpha": 2.0, "deft__adaptive": True, "deft__epsilon": 1e-3, "train__steps": 7},
    {"task": "squad", "deft__alpha": 1.0, "deft__approximation": "l1", "data__max_target_tokens": 4, "seed": 2},
    {
        "task": "rte",
        "deft__alpha": 5.0,
        "deft__alpha_decoder": 0.5,
        "deft__epsilon": 1e-2,
        "train__learning_rate": 3e-3,
        "adapter__r": 8,
    },
    {
        "task": "sst2",
        "deft__alpha": 1.0,
        "deft__epsilon": 1e-2,
        "deft__count_padding": True,
        "train__micro_batch_size": 2,
        "seed": 3,
    },
    {
        "task": "qnli",
        "deft__alpha": 4.0,
        "deft__alpha_delay": 0.4,
        "deft__epsilon": 1e-2,
        "train__max_grad_norm": 0.1,
        "train__batch_size": 3,
    },
]
#: Passes after which each of them comes.
STARTS = [0, 0, 2, 1, 3, 0, 1, 5]


def check_pack(specs: list[TrialSpec], base: Base, ranks: Ranks, rel: float) -> None:
    """Train these alone and together, and compare; the base is left as it was, but for the untrained head."""
    names = body_of(base)
    want = [alone(spec, base, ranks) for spec in specs]
    got = together(specs, STARTS, base, ranks)
    for mine, other in zip(got, want, strict=True):
        check_equal(mine, other, rel)
    assert body_of(base) == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any("forward" in vars(module) for module in base.model.modules())


def body_of(base: Base) -> list[str]:
    """Names of a base's modules, but those of a head."""
    names = [name for name, _ in base.model.named_modules()]
    return names if base.family.text_to_text else [name for name in names if name.split(".")[0] != base.family.head]


@pytest.fixture
def double(base_of: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[TrialSpec], Base]]:
    """Gives a base in float64, where nothing but a fault is left to see; one worker has nothing to reduce."""
    opened: list[Base] = []

    def get(spec: TrialSpec) -> Base:
        opened.append(base_of(spec))
        opened[0].model.double()
        return opened[0]

    deepspeed = importlib.import_module("deepspeed.runtime.engine")
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "allreduce_gradients", lambda *_args, **_options: None)
    yield get
    opened[0].model.float()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_slot_of_a_pack_leaves_what_it_leaves_alone(trial: Trial, double: Any, ranks: Ranks, count: int) -> None:
    """To 1e-9 in float64; layer scales and their charges are float32."""
    specs = [trial("dry-t5", trial=f"t{place:04}", **leaves) for place, leaves in enumerate(MIXED[:count])]
    check_pack(specs, double(specs[0]), ranks, 1e-9 if count < 4 else 1e-7)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("quantization", "dtype", "rel"), [("none", "float32", 1e-4), ("nf4", "float32", 1e-4)])
def test_a_pack_of_eight_in_float32(
    trial: Trial, base_of: Any, ranks: Ranks, quantization: str, dtype: str, rel: float, stage: int
) -> None:
    how = {"model__quantization": quantization, "model__dtype": dtype, "train__zero_stage": stage}
    specs = [
        trial("dry-t5", trial=f"t{place:04}", **{"train__learning_rate": 1e-3, **leaves, **how})
        for place, leaves in enumerate(MIXED)
    ]
    check_pack(specs, base_of(specs[0]), ranks, rel)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("model", ["dry-bert", "dry-roberta", "dry-opt", "dry-gpt2"])
def test_slots_with_heads_of_one_shape_share_a_base(
    trial: Trial, base_of: Any, ranks: Ranks, model: str, kind: str
) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2, "deft__approximation": "l0", "adapter__kind": kind}
    if kind == "bottleneck":
        how |= {"adapter__reduction_factor": 8}
    reads = [{"adapter__reads": "sum"} if kind == "bottleneck" and place else {} for place in range(3)]
    specs = [
        trial(model, task, trial=f"t{place:04}", seed=place, deft__alpha=float(place), **how, **reads[place])
        for place, task in enumerate(("sst2", "mrpc", "rte"))
    ]
    check_pack(specs, base_of(specs[0]), ranks, 1e-4)


@pytest.mark.parametrize("model", ["dry-bert", "dry-gpt2"])
def test_slots_with_heads_of_two_layers_share_a_base(trial: Trial, base_of: Any, ranks: Ranks, model: str) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2, "adapter__head": "two-layer"}
    specs = [
        trial(model, task, trial=f"t{place:04}", seed=place, deft__alpha=float(place), **how)
        for place, task in enumerate(("sst2", "mrpc", "rte"))
    ]
    check_pack(specs, base_of(specs[0]), ranks, 1e-4)


def test_images_share_a_base(trial: Trial, base_of: Any, ranks: Ranks) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2}
    specs = [
        trial("dry-vit", "cifar10", trial=f"t{place:04}", seed=place, deft__alpha=place, **how) for place in (0, 1)
    ]
    check_pack(specs, base_of(specs[0]), ranks, 1e-4)


@pytest.mark.parametrize("targets", [["wi_0", "wo"], ["q"], "all-linear"])
def test_a_slot_goes_on_when_the_one_that_came_first_has_left(
    trial: Trial, double: Any, ranks: Ranks, targets: Any
) -> None:
    """Also where the base's first layers have no adapter then. An ε of 1e-7 would make 3e-6 of a rounding."""
    how = {"deft__alpha": 2.0, "deft__epsilon": 1e-4, "train__steps": 5}
    first = trial("dry-t5", "sst2", deft__alpha=1.0, train__steps=2)
    second = trial("dry-t5", "mrpc", trial="t0001", adapter__target_modules=targets, **how)
    check_pack([first, second], double(first), ranks, 1e-9)


def test_another_slot_moves_no_dropout(trial: Trial, base_of: Any, ranks: Ranks) -> None:
    """Building a slot draws from its own seed; those that are there go on with their stream."""
    spec = trial("t5", "sst2", adapter__lora_dropout=0.1)
    base, pack = base_of(spec), Pack(base_of(spec))
    slot = Slot(spec, base, load_task("sst2", spec.data, base), ranks, pack=pack)
    before = torch.get_rng_state()
    other = Slot(spec, base, load_task("sst2", spec.data, base), ranks, pack=pack)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(slot.seat.trainable, other.seat.trainable, strict=True)), "one seed"
    for each in (slot, other):
        each.close()


@pytest.mark.parametrize("leaves", [{"adapter__kind": "prefix"}, {"adapter__target_modules": ["nowhere"]}], ids=str)
def test_a_slot_that_cannot_be_opened_moves_no_dropout(
    trial: Trial, base_of: Any, ranks: Ranks, leaves: dict[str, Any]
) -> None:
    spec, refused = trial("t5", "sst2"), trial("t5", "sst2", trial="t0001", seed=7, **leaves)
    base, pack = base_of(spec), Pack(base_of(spec))
    slot = Slot(spec, base, load_task("sst2", spec.data, base), ranks, pack=pack)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"virtual tokens|nowhere"):
        Slot(refused, base, load_task("sst2", spec.data, base), ranks, pack=pack)
    assert torch.equal(torch.get_rng_state(), before)
    slot.close()


def test_a_seat_that_cannot_be_taken_leaves_no_trace(
    trial: Trial, base_of: Any, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = trial("dry-t5", "sst2")
    base = base_of(spec)
    names = [name for name, _ in base.model.named_modules()]
    with monkeypatch.context() as patch:
        patch.setattr("deft_ray.train.pack.DensityProbe", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            Slot(spec, base, load_task("sst2", spec.data, base), ranks)
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any("forward" in vars(module) for module in base.model.modules())


def out_of_memory(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_pass_that_fails_leaves_nothing_of_itself(trial: Trial, base_of: Any, ranks: Ranks) -> None:
    """A bottleneck that reads the residual stream has noted it by then, and with it all that lies before."""
    specs = [
        trial("dry-t5", trial=f"t{place:04}", adapter__kind="bottleneck", adapter__reads="sum") for place in range(2)
    ]
    base = base_of(specs[0])
    pack = Pack(base)
    slots = [Slot(spec, base, load_task(spec.task, spec.data, base), ranks, pack=pack) for spec in specs]
    streams = [site.block.get_submodule(site.output).stream for site in base.sites]
    hook = base.sites[1].block.get_submodule(base.sites[1].output).base_layer.register_forward_hook(out_of_memory)
    for beside in (slots, slots[:1]):
        with pytest.raises(RuntimeError, match="out of memory"):
            pack.run([slot.share(measure=False) for slot in beside])
        assert [stream.take() for stream in streams] == [None] * 4
    hook.remove()
    for slot in slots:
        slot.close()


def test_what_happens_in_one_slot_is_nothing_to_another(trial: Trial, base_of: Any, ranks: Ranks) -> None:
    """Bit for bit: with another's adapter of large numbers, or of none, a slot has the same loss and gradients."""
    specs = [trial("dry-t5", "sst2", trial=f"t{place:04}", seed=place, deft__alpha=2.0) for place in (0, 1)]
    base = base_of(specs[0])
    pack = Pack(base)
    slots = [Slot(spec, base, load_task(spec.task, spec.data, base), ranks, pack=pack) for spec in specs]
    found = []
    for value in (None, 100.0, float("nan")):
        for parameter in slots[1].seat.trainable if value is not None else ():
            parameter.data.fill_(value)
        found.append(pack.run([slot.share(measure=False) for slot in slots]))
    for other in found[1:]:
        assert other[0].loss == found[0][0].loss
        assert all(torch.equal(a, b) for a, b in zip(other[0].gradients, found[0][0].gradients, strict=True))
    assert found[1][1].loss != found[0][1].loss
    assert found[2][1].loss != found[2][1].loss
    for slot in slots:
        slot.close()


@pytest.mark.parametrize(
    ("model", "leaves", "message"),
    [
        (
            "dry-t5",
            {"adapter__kind": "prompt", "adapter__virtual_tokens": 5},
            "an adapter of virtual tokens cannot share",
        ),
        (
            "dry-t5",
            {"adapter__kind": "bottleneck", "adapter__reduction_factor": 8},
            "two kinds .*: lora and bottleneck$",
        ),
        ("dry-gpt2", {"adapter__target_modules": ["wte", "c_attn"]}, "an adapter on an embedding cannot share a base"),
        (
            "dry-vit",
            {"task": "cifar10", "adapter__target_modules": ["projection", "fc1"]},
            "an adapter on a convolution cannot share a base",
        ),
        ("dry-t5", {"model__activation": "fused"}, "model.activation: 'fused' is not that of the slots beside it"),
        ("dry-bert", {"task": "mnli"}, "heads of two shapes cannot share a base: 2 outputs and 3 outputs"),
        (
            "dry-bert",
            {"task": "mrpc", "adapter__head": "two-layer"},
            "heads of two shapes cannot share a base: 2 outputs and 2 outputs, two layers",
        ),
    ],
)
def test_what_cannot_share_a_base_is_refused_and_leaves_the_others_alone(
    trial: Trial, base_of: Any, ranks: Ranks, model: str, leaves: dict[str, Any], message: str
) -> None:
    first = trial(model, "cifar10" if model == "dry-vit" else "sst2")
    base = base_of(first)
    losses = alone(first, base, ranks).losses[:2]
    pack = Pack(base)
    slot = Slot(first, base, load_task(first.task, first.data, base), ranks, pack=pack)
    second = trial(model, **{"task": "sst2", **leaves})
    with pytest.raises(ValueError, match=message):
        Slot(second, base, load_task(second.task, second.data, base), ranks, pack=pack)
    assert run(slot, 2) == losses
    assert [seat.name for seat in pack.seats] == ["default"]
    slot.close()


def test_with_dropout_slots_leave_what_they_leave_alone_in_distribution(
    trial: Trial, base_of: Any, ranks: Ranks
) -> None:
    """Slots share one stream of dropout, so no trial is the same; over 20 seeds none of its figures leans to a side.

    A pack that dropped nothing would: so does a trial alone without dropout.
    """
    figures: dict[str, list[np.ndarray]] = {"pack": [], "alone": [], "no dropout": []}
    for seed in range(20):
        how = {"seed": seed, "train__learning_rate": 3e-3, "deft__alpha": 2.0, "deft__epsilon": 1e-2}
        specs = [
            trial("relu-t5", task, trial=f"t{place:04}", **how, adapter__lora_dropout=0.3)
            for place, task in enumerate(("sst2", "mrpc"))
        ]
        base = base_of(specs[0])
        figures["pack"].append(np.array([figures_of(left) for left in together(specs, [0, 0], base, ranks)]))
        figures["alone"].append(np.array([figures_of(alone(spec, base, ranks)) for spec in specs]))
        with no_dropout(base):
            bare = [trial("relu-t5", spec.task, trial=spec.trial, **how) for spec in specs]
            figures["no dropout"].append(np.array([figures_of(alone(spec, base, ranks)) for spec in bare]))

    pack, by_itself, without = (np.stack(found) for found in figures.values())
    assert (pack != by_itself).any(), "another stream"
    assert (ttest_rel(pack, by_itself).pvalue > 0.001).all()
    assert (ttest_rel(without, by_itself).pvalue < 0.001).any(axis=1).all(), "each slot's figures would tell"


def figures_of(left: Left) -> list[float]:
    """Mean loss, the length of the adapter's matrices, and density."""
    length = torch.stack([matrix.norm() for matrix in left.adapter.values()]).norm()
    density = left.found.counts.density()
    assert density is not None
    return [sum(left.losses) / len(left.losses), float(length), density]


@contextmanager
def no_dropout(base: Base) -> Iterator[None]:
    """Drop nothing inside."""
    modules = [module for module in base.model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in modules]
    for module in modules:
        module.p = 0.0
    try:
        yield
    finally:
        for module, share in zip(modules, before, strict=True):
            module.p = share
