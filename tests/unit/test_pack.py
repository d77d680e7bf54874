"""Slots that share the passes of one base leave what each of them leaves alone.

All slots go into one pass, whatever it costs on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import ks_2samp, levene, pearsonr, ttest_1samp, ttest_ind
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.cost import PassCost
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.loading import load_task
from deft_ray.train.pack import Found, Pack, Share
from deft_ray.train.random_state import Draws, seeded
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, StepResult, step_together
from tests.slots import (
    all_in_one_pass,
    counted_passes,
    counted_slots,
    learnt_apart,
    new_slot,
    run,
    shaken,
    start_worker,
    worst,
)

Trial = Callable[..., TrialSpec]


@pytest.fixture(autouse=True)
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PassCost, "groups", all_in_one_pass)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots of each training pass."""
    return counted_slots(monkeypatch)


@dataclass
class Left:
    """What a trial leaves: the losses of its steps, its adapter, and what its evaluation found."""

    losses: list[float]
    adapter: dict[str, Tensor]
    lambdas: dict[str, float]
    found: Evaluation
    approximation: tuple[str, str | None]


def left_by(slot: Slot, losses: list[float]) -> Left:
    """Evaluate a slot at its end, and copy what it has trained."""
    found = slot.evaluate()
    name = slot.seat.name
    adapter = {
        key.replace(f".{name}.", ".default."): value.detach().clone()
        for key, value in slot.model.named_parameters()
        if name in key.split(".")
    }
    return Left(losses, adapter, slot.lambdas(), found, (slot.kind, slot.warning))


Alone = Callable[[TrialSpec, Base], Left]


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> Alone:
    """Runs a trial by itself, once for all tests."""
    known: dict[tuple[str, torch.dtype], Left] = {}

    def get(spec: TrialSpec, base: Base) -> Left:
        key = spec.model_dump_json(), base.model.dtype
        if key not in known:
            slot = new_slot(spec, base, ranks)
            known[key] = left_by(slot, run(slot))
            assert slot.packed.passes == slot.steps * slot.accumulation
            assert slot.packed.shared == 0
            slot.close()
        return known[key]

    return get


Join = Callable[[Pack, TrialSpec], Slot]


@pytest.fixture
def join(ranks: Ranks) -> Iterator[Join]:
    """Opens slots in a pack; those that are open at the end are closed."""
    opened: list[Slot] = []

    def take(pack: Pack, spec: TrialSpec) -> Slot:
        opened.append(Slot(spec, pack.base, load_task(spec.task, spec.data, pack.base), ranks, pack=pack))
        return opened[-1]

    yield take
    for slot in opened:
        slot.close()


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    """Lay gradients one behind the other, but for what the pass did not use."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])


def together(specs: Sequence[TrialSpec], starts: Sequence[int], base: Base, join: Join) -> list[Left]:
    """Run trials in one pack; each comes after so many passes and goes when it has ended."""
    pack = Pack(base, fused=specs[0].model.activation == "fused")
    left, losses = dict[int, Left](), [list[float]() for _ in specs]
    slots, passes = dict[int, Slot](), 0
    while len(left) < len(specs):
        for place, spec in enumerate(specs):
            if starts[place] <= passes and place not in left and place not in slots:
                slots[place] = join(pack, spec)
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
    assert got.approximation == want.approximation


def check_learnt(got: Left, want: Left, rel: float) -> None:
    """The same, and what has been learnt: a weight's own size says little of that, where it does not begin at zero."""
    check_equal(got, want, rel)
    assert learnt_apart(got.adapter, want.adapter) < 1e-2


def check_near(got: Left, want: Left) -> None:
    """The same of bfloat16, which has 128 numbers from 4 to 8, where these losses lie: to four of them."""
    assert got.losses == pytest.approx(want.losses, rel=2e-2)
    assert learnt_apart(got.adapter, want.adapter) < 0.3
    assert got.lambdas == pytest.approx(want.lambdas, abs=1e-3)
    assert got.found.counts.density() == pytest.approx(want.found.counts.density(), rel=1e-3)


#: Settings that differ in everything that slots may differ in; two of them have layer scales on the same blocks.
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
        "deft__loss_of": "feature_map",
        "deft__epsilon": 1e-2,
        "train__learning_rate": 3e-3,
        "train__warmup_share": 0.5,
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
        "deft__adaptive": True,
        "deft__lambda_init": 0.4,
        "deft__lambda_noise": 0.1,
        "deft__epsilon": 1e-2,
        "train__max_grad_norm": 0.1,
        "train__schedule": "constant",
        "train__batch_size": 3,
    },
]
#: Which of them are in a pack of so many; those of two have no layer scales, which are float32 in any case.
PLACES = {2: (1, 4), 4: range(4), 8: range(8)}
#: Passes after which each of them comes: none has more than four passes then, so that there is one with all of them.
STARTS = [0, 1, 2, 1, 3, 0, 1, 2]


Check = Callable[..., None]


@pytest.fixture
def check_pack(alone: Alone, join: Join, passes: list[int]) -> Check:
    """Compares trials in one pack with each alone; the base is left as it was, but for the untrained head."""

    def compare(specs: list[TrialSpec], base: Base, *tolerances: Any, check: Any = check_equal) -> None:
        names = body_of(base)
        want = [alone(spec, base) for spec in specs]
        passes.clear()
        got = together(specs, STARTS, base, join)
        assert max(passes) == len(specs)
        assert len(set(passes)) > 1, "they come and go one by one"
        for mine, other in zip(got, want, strict=True):
            check(mine, other, *tolerances)
        assert body_of(base) == names
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert not any("forward" in vars(module) for module in base.model.modules())

    return compare


def body_of(base: Base) -> list[str]:
    """Names of a base's modules, but those of a head."""
    names = [name for name, _ in base.model.named_modules()]
    return names if base.family.text_to_text else [name for name in names if name.split(".")[0] != base.family.head]


@pytest.fixture
def double(base_of: Any) -> Iterator[Callable[[TrialSpec], Base]]:
    """Gives a base in float64, where nothing but a fault is left to see."""
    opened: list[Base] = []

    def get(spec: TrialSpec) -> Base:
        opened.append(base_of(spec))
        opened[0].model.double()
        return opened[0]

    yield get
    opened[0].model.float()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_slot_of_a_pack_leaves_what_it_leaves_alone(
    trial: Trial, double: Any, check_pack: Check, count: int
) -> None:
    """To 1e-9 in float64; layer scales and their charges are float32."""
    specs = [trial("dry-t5", trial=f"t{place:04}", **MIXED[place]) for place in PLACES[count]]
    check_pack(specs, double(specs[0]), 1e-9 if count < 4 else 1e-7)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_pack_in_float32(
    trial: Trial, base_of: Any, check_pack: Check, quantization: str, stage: int, count: int
) -> None:
    how = {"model__quantization": quantization, "train__zero_stage": stage}
    specs = [
        trial("dry-t5", trial=f"t{place:04}", **{"train__learning_rate": 1e-3, **MIXED[place], **how})
        for place in PLACES[count]
    ]
    check_pack(specs, base_of(specs[0]), 1e-4, check=check_learnt)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_pack_in_bfloat16(trial: Trial, base_of: Any, check_pack: Check, quantization: str) -> None:
    how = {"model__quantization": quantization, "model__dtype": "bfloat16", "train__learning_rate": 1e-3}
    specs = [trial("dry-t5", trial=f"t{place:04}", **{**MIXED[place], **how}) for place in (1, 3, 6, 7)]
    check_pack(specs, base_of(specs[0]), check=check_near)


@pytest.mark.parametrize(
    ("all_of_them", "one_of_them"),
    [({}, {"train__gradient_checkpointing": True}), ({"model__activation": "fused"}, {})],
    ids=["checkpointing", "fused"],
)
def test_slots_share_blocks_that_compute_otherwise(
    trial: Trial, double: Any, check_pack: Check, all_of_them: dict[str, Any], one_of_them: dict[str, Any]
) -> None:
    """That one slot's blocks are computed again is nothing to the others; that they are fused, all have to want."""
    specs = [
        trial("dry-t5", trial=f"t{place:04}", **MIXED[place], **all_of_them, **(one_of_them if place == 3 else {}))
        for place in (1, 3, 7)
    ]
    check_pack(specs, double(specs[0]), 1e-7)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("model", ["dry-bert", "dry-roberta", "dry-opt", "dry-gpt2"])
def test_slots_with_heads_of_one_shape_share_a_base(
    trial: Trial, base_of: Any, check_pack: Check, model: str, kind: str
) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2, "adapter__kind": kind}
    if kind == "bottleneck":
        how |= {"adapter__reduction_factor": 8}
    reads = [{"adapter__reads": "sum"} if kind == "bottleneck" and place else {} for place in range(3)]
    specs = [
        trial(model, task, trial=f"t{place:04}", seed=place, deft__alpha=float(place), **how, **reads[place])
        for place, task in enumerate(("sst2", "mrpc", "rte"))
    ]
    check_pack(specs, base_of(specs[0]), 1e-4)


@pytest.mark.parametrize("model", ["dry-bert", "dry-gpt2"])
def test_slots_with_heads_of_two_layers_share_a_base(trial: Trial, base_of: Any, check_pack: Check, model: str) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2, "adapter__head": "two-layer"}
    specs = [
        trial(model, task, trial=f"t{place:04}", seed=place, deft__alpha=float(place), **how)
        for place, task in enumerate(("sst2", "mrpc", "rte"))
    ]
    check_pack(specs, base_of(specs[0]), 1e-4)


def test_images_share_a_base(trial: Trial, base_of: Any, check_pack: Check) -> None:
    how = {"train__learning_rate": 1e-3, "deft__epsilon": 1e-2}
    specs = [
        trial("dry-vit", "cifar10", trial=f"t{place:04}", seed=place, deft__alpha=place, **how) for place in (0, 1)
    ]
    check_pack(specs, base_of(specs[0]), 1e-4)


@pytest.mark.parametrize("approximation", ["auto", "tanh", "l0"])
@pytest.mark.parametrize("model", ["relu-t5", "t5"])
def test_a_density_loss_is_that_of_the_trial_alone(
    trial: Trial, base_of: Any, join: Join, model: str, approximation: str
) -> None:
    """Whoever has put what in the activation's place by then: which loss, and what is doubtful about it."""
    spec = trial(model, deft__alpha=1.0, deft__approximation=approximation)
    pack = Pack(base_of(spec))
    slots = [join(pack, spec) for _ in range(3)]
    chosen = "l0" if approximation == "auto" and model == "t5" else approximation.replace("auto", "tanh")
    assert [slot.kind for slot in slots] == [chosen] * 3
    assert [slot.warning is None for slot in slots] == [chosen == "l0" or model == "relu-t5"] * 3


@pytest.mark.parametrize("targets", [["wi_0", "wo"], ["q"], "all-linear"])
def test_a_slot_goes_on_when_the_one_that_came_first_has_left(
    trial: Trial, double: Any, check_pack: Check, targets: Any
) -> None:
    """Also where the base's first layers have no adapter then. An ε of 1e-7 would make 3e-6 of a rounding."""
    how = {"deft__alpha": 2.0, "deft__epsilon": 1e-4, "train__steps": 5}
    first = trial("dry-t5", "sst2", deft__alpha=1.0, train__steps=2)
    second = trial("dry-t5", "mrpc", trial="t0001", adapter__target_modules=targets, **how)
    check_pack([first, second], double(first), 1e-9)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_pass_goes_through_the_base_once_for_all_its_slots(
    trial: Trial, base_of: Any, join: Join, count: int, again: bool
) -> None:
    """Each block computes once in a turn, and once more where the backward pass computes it again."""
    specs = [
        trial("dry-t5", train__gradient_checkpointing=again and place == 0, **leaves)
        for place, leaves in enumerate(MIXED[:count])
    ]
    pack = Pack(base_of(specs[0]))
    slots = [join(pack, spec) for spec in specs]
    with counted_passes(slots[0]) as computed:
        for _ in range(3):
            step_together([(slot, False) for slot in slots])
    assert computed == dict.fromkeys([site.name for site in pack.base.sites], 6 if again else 3)
    assert [slot.packed.passes for slot in slots] == [3] * count


def test_another_slot_moves_no_dropout(trial: Trial, base_of: Any, join: Join) -> None:
    """Building a slot draws from its own seed; those that are there go on with their stream."""
    spec = trial("t5", "sst2", adapter__lora_dropout=0.1)
    pack = Pack(base_of(spec))
    slot = join(pack, spec)
    before, own = torch.get_rng_state(), slot.seat.draws.state["torch"]
    other = join(pack, spec)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(slot.seat.draws.state["torch"], own)
    assert all(torch.equal(a, b) for a, b in zip(slot.seat.trainable, other.seat.trainable, strict=True)), "one seed"


@pytest.mark.parametrize("leaves", [{"adapter__kind": "prefix"}, {"adapter__target_modules": ["nowhere"]}], ids=str)
def test_a_slot_that_cannot_be_opened_moves_no_dropout(
    trial: Trial, base_of: Any, join: Join, leaves: dict[str, Any]
) -> None:
    spec, refused = trial("t5", "sst2"), trial("t5", "sst2", trial="t0001", seed=7, **leaves)
    pack = Pack(base_of(spec))
    slot = join(pack, spec)
    before, own = torch.get_rng_state(), slot.seat.draws.state["torch"]
    with pytest.raises(ValueError, match=r"virtual tokens|nowhere"):
        join(pack, refused)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(slot.seat.draws.state["torch"], own)


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


def test_a_pass_that_fails_leaves_nothing_of_itself(trial: Trial, base_of: Any, join: Join) -> None:
    """A bottleneck that reads the residual stream has noted it by then, and with it all that lies before."""
    specs = [
        trial("dry-t5", trial=f"t{place:04}", adapter__kind="bottleneck", adapter__reads="sum") for place in range(2)
    ]
    base = base_of(specs[0])
    pack = Pack(base)
    slots = [join(pack, spec) for spec in specs]
    streams = [site.block.get_submodule(site.output).stream for site in base.sites]
    hook = base.sites[1].block.get_submodule(base.sites[1].output).base_layer.register_forward_hook(out_of_memory)
    for beside in (slots, slots[:1]):
        with pytest.raises(RuntimeError, match="out of memory"):
            pack.run([slot.share(measure=False) for slot in beside])
        assert [stream.take() for stream in streams] == [None] * 4
    hook.remove()


#: Slots of other ranks and targets, one with layer scales.
UNLIKE: list[dict[str, Any]] = [
    {"task": "sst2", "deft__alpha": 2.0, "deft__epsilon": 1e-2, "adapter__r": 2},
    {
        "task": "mrpc",
        "deft__alpha": 1.0,
        "deft__approximation": "sigmoid",
        "deft__beta": 5.0,
        "adapter__target_modules": ["q", "v", "wo"],
        "seed": 1,
    },
    {"task": "stsb", "deft__alpha": 3.0, "deft__epsilon": 1e-2, "deft__adaptive": True, "adapter__r": 8, "seed": 2},
]


@pytest.fixture
def unlike(trial: Trial, base_of: Any, join: Join, quantization: str) -> list[Slot]:
    """Three slots in one pack, whose every parameter has a gradient."""
    specs = [
        trial("dry-t5", trial=f"t{place:04}", model__quantization=quantization, **leaves)
        for place, leaves in enumerate(UNLIKE)
    ]
    pack = Pack(base_of(specs[0]))
    slots = [join(pack, spec) for spec in specs]
    shaken(slots[0])
    return slots


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("changed", range(3))
def test_what_happens_in_one_slot_is_nothing_to_another(unlike: list[Slot], changed: int) -> None:
    """Bit for bit: with another's adapter of large numbers, or of none, a slot has the same loss and gradients."""
    pack, parameters = unlike[0].pack, unlike[changed].seat.parameters
    found = []
    for value in (None, 100.0, float("nan")):
        for parameter in parameters if value is not None else ():
            parameter.data.fill_(value)
        found.append(pack.run([slot.share(measure=False) for slot in unlike]))
    first = found[0]
    for other in found[1:]:
        for place in {0, 1, 2} - {changed}:
            assert other[place].loss == first[place].loss
            assert torch.equal(flat(other[place].gradients), flat(first[place].gradients))
    assert found[1][changed].loss != first[changed].loss
    assert found[2][changed].loss != found[2][changed].loss, "no number"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("counted", range(3))
def test_the_loss_of_one_slot_has_no_gradient_in_another(unlike: list[Slot], counted: int) -> None:
    together = check_no_crossing(unlike, counted)
    for beside in together:
        assert flat(beside.gradients).count_nonzero() > 0.9 * len(flat(beside.gradients))


@pytest.mark.parametrize("counted", [0, 3, 6, 7])
def test_the_loss_of_one_of_eight_slots_has_no_gradient_in_another(
    trial: Trial, base_of: Any, join: Join, counted: int
) -> None:
    """Of mixed tasks, ranks, targets, losses and layer scales."""
    specs = [trial("dry-t5", trial=f"t{place:04}", **leaves) for place, leaves in enumerate(MIXED)]
    pack = Pack(base_of(specs[0]))
    slots = [join(pack, spec) for spec in specs]
    shaken(slots[0])
    check_no_crossing(slots, counted)


@pytest.mark.parametrize(
    ("model", "tasks", "leaves"),
    [
        ("dry-t5", ("sst2", "squad"), {"adapter__kind": "bottleneck", "adapter__reduction_factor": 8}),
        ("dry-bert", ("sst2", "mrpc"), {}),
        ("dry-roberta", ("rte", "qnli"), {"adapter__kind": "bottleneck", "adapter__reads": "sum"}),
        ("dry-gpt2", ("mnli", "mnli"), {"adapter__head": "two-layer"}),
        ("dry-vit", ("cifar10", "cifar10"), {}),
    ],
)
def test_nor_has_that_of_heads_and_bottlenecks(
    trial: Trial, base_of: Any, join: Join, model: str, tasks: tuple[str, str], leaves: dict[str, Any]
) -> None:
    specs = [trial(model, task, trial=task, seed=seed, deft__alpha=2.0, **leaves) for seed, task in enumerate(tasks)]
    pack = Pack(base_of(specs[0]))
    slots = [join(pack, spec) for spec in specs]
    shaken(slots[0])
    for counted in range(2):
        check_no_crossing(slots, counted)


def check_no_crossing(slots: list[Slot], counted: int) -> list[Found]:
    """Exactly zero where only one slot's losses count, which has the gradient that it has beside the others'."""

    def muted(share: Share) -> Share:
        return replace(
            share, scale=0.0, penalty=replace(share.penalty, weights=dict.fromkeys(share.penalty.weights, 0.0))
        )

    pack = slots[0].pack
    together = pack.run([slot.share(measure=False) for slot in slots])
    shares = [slot.share(measure=False) for slot in slots]
    found = pack.run([share if place == counted else muted(share) for place, share in enumerate(shares)])
    for place, (mine, beside) in enumerate(zip(found, together, strict=True)):
        assert flat(beside.gradients).count_nonzero() > 0
        assert torch.equal(flat(mine.gradients), flat(beside.gradients) * (place == counted))
    return together


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
    trial: Trial, base_of: Any, join: Join, alone: Alone, model: str, leaves: dict[str, Any], message: str
) -> None:
    first = trial(model, "cifar10" if model == "dry-vit" else "sst2")
    base = base_of(first)
    losses = alone(first, base).losses[:2]
    pack = Pack(base)
    slot = join(pack, first)
    with pytest.raises(ValueError, match=message):
        join(pack, trial(model, **{"task": "sst2", **leaves}))
    assert run(slot, 2) == losses
    assert [seat.name for seat in pack.seats] == ["default"]


#: Streams of dropout, and steps in each.
STREAMS, STEPS = 24, 3
#: Which of two trials the slots of a pack train; of three slots and more two train the same one.
TWINS = (0, 1, 1, 0, 1, 0, 0, 1)


@dataclass
class Dropped:
    """Figures of trials with dropout, (streams, slots, 3): see :func:`figures_of`; ``without`` is of one stream."""

    alone: list[np.ndarray]
    without: list[np.ndarray]
    packed: np.ndarray
    passes: set[int]


def two_trials(trial: Trial, quantization: str) -> list[TrialSpec]:
    how = {"train__learning_rate": 3e-3, "deft__alpha": 2.0, "adapter__lora_dropout": 0.3, "train__batch_size": 4}
    how |= {"train__steps": STEPS, "model__quantization": quantization}
    return [trial("relu-t5", "sst2", adapter__r=2, **how), trial("relu-t5", "mrpc", **how)]


def dropped_by(specs: Sequence[TrialSpec], base: Base, ranks: Ranks, places: Sequence[int], folder: Path) -> Dropped:
    """Train two trials by themselves in some streams, without dropout, and a pack of them in as many other streams."""
    alone, without = [], []
    for place, spec in enumerate(specs):
        slot = new_slot(spec, base, ranks)
        alone.append(figures_of([slot], range(STREAMS), folder / f"alone-{place}")[:, 0])
        slot.model.eval()
        without.append(figures_of([slot], [0], folder / f"alone-{place}")[0, 0])
        slot.close()
    pack = Pack(base)
    slots = [
        Slot(specs[which], base, load_task(specs[which].task, specs[which].data, base), ranks, pack=pack)
        for which in places
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PassCost, "groups", all_in_one_pass)
        passes = counted_slots(monkeypatch)
        packed = figures_of(slots, range(STREAMS, 2 * STREAMS), folder / "packed")
    for slot in slots:
        slot.close()
    return Dropped(alone, without, packed, set(passes))


def check_dropped(found: Dropped, places: Sequence[int]) -> None:
    """Mean, spread and distribution of each slot's figures; slots of the same trial would tell if they dropped alike.

    A pack that dropped nothing would tell too: so does a trial alone without dropout.
    """
    assert found.passes == {len(places)}
    for place, which in enumerate(places):
        packed, alone = found.packed[:, place], found.alone[which]
        for test in (ttest_ind, ks_2samp, levene):
            assert (test(packed, alone).pvalue > 1e-4).all(), (test.__name__, place)
        assert (ttest_1samp(alone, found.without[which]).pvalue < 1e-6).any(), "each slot's figures would tell"
    for one, other in combinations(range(len(places)), 2):
        if places[one] == places[other]:
            for figure in range(3):
                assert pearsonr(found.packed[:, one, figure], found.packed[:, other, figure]).pvalue > 1e-4


@pytest.mark.parametrize(("quantization", "count"), [("none", 2), ("none", 4), ("nf4", 4), ("none", 8)])
def test_with_dropout_slots_leave_what_they_leave_alone_in_distribution(
    trial: Trial, base_of: Any, ranks: Ranks, tmp_path: Path, quantization: str, count: int
) -> None:
    """Over 24 seeds of dropout, all other chance being the same."""
    specs = two_trials(trial, quantization)
    check_dropped(dropped_by(specs, base_of(specs[0]), ranks, TWINS[:count], tmp_path), TWINS[:count])


def drop_on_two_workers(rank: int, folder: Path, specs: list[TrialSpec], places: Sequence[int]) -> None:
    """One of two workers; the first leaves what both found."""
    ranks = start_worker(rank, 2, folder)
    found = dropped_by(specs, load_base(specs[0].model.name, "t5"), ranks, places, folder)
    if ranks.leads:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_with_dropout_on_two_workers_too(trial: Trial, tmp_path: Path) -> None:
    spawn(drop_on_two_workers, args=(tmp_path, two_trials(trial, "none"), TWINS[:4]), nprocs=2)
    check_dropped(torch.load(tmp_path / "found.pt", weights_only=False), TWINS[:4])


def figures_of(slots: list[Slot], streams: Sequence[int], folder: Path) -> np.ndarray:
    """Train slots together from where they stand, once in each stream of dropout.

    Args:
        slots: In one pack.
        streams: Seeds.
        folder: For what they begin with; of all workers.

    Returns:
        Mean loss, mean smooth density and the length of the adapter's matrices, (streams, slots, 3).
    """
    begun = [folder / str(place) for place in range(len(slots))]
    for slot, there in zip(slots, begun, strict=True):
        there.mkdir(parents=True, exist_ok=True)
        slot.save(there)
    return np.array([_figures_in(stream, slots, begun) for stream in streams])


def _figures_in(stream: int, slots: list[Slot], begun: list[Path]) -> list[list[float]]:
    ranks = slots[0].ranks
    for slot, there in zip(slots, begun, strict=True):
        slot.load(there)
        with seeded(stream * ranks.world + ranks.rank):
            slot.seat.draws = Draws()
    steps = [step_together([(slot, True) for slot in slots]) for _ in range(STEPS)]
    figures = []
    for slot, mine in zip(slots, zip(*steps, strict=True), strict=True):
        found = [(result.task_loss, result.density_loss) for result in mine if isinstance(result, StepResult)]
        means = ranks.total(torch.tensor(found, dtype=torch.float64)).mean(dim=0)
        length = torch.cat([parameter.detach().reshape(-1) for parameter in slot.seat.trainable]).norm()
        figures.append([*means.tolist(), float(length)])
    return figures
