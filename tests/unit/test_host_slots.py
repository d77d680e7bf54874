"""A host with several slots: each trial leaves what it leaves on a host by itself, whatever becomes of those beside it.

A model without dropout, in float64, where nothing but a fault is left to see; layer scales are float32.
"""

from __future__ import annotations

import importlib
import random
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.cost import PassCost, Size
from deft_ray.train.host import Host, Taken
from deft_ray.train.memory import FirstStep, Holds
from deft_ray.train.pack import Found, Pack, Share
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.slots import start_worker, worst
from tests.tiny import tiny_trial
from tests.unit.test_host import Inbox, Killed, Row, hook_count

Trial = Callable[..., TrialSpec]

#: Trials that differ in their task, loss, adapter, length, evaluations and seed.
MIXED: list[dict[str, Any]] = [
    {"deft__alpha": 0.0, "train__steps": 6, "train__evaluations": 3},
    {"task": "sst2", "deft__alpha": 3.0, "deft__epsilon": 1e-2, "adapter__r": 2, "seed": 1},
    {"deft__alpha": 1.0, "deft__approximation": "sigmoid", "adapter__target_modules": ["q", "v"], "train__steps": 9},
    {"task": "stsb", "deft__alpha": 2.0, "deft__adaptive": True, "deft__epsilon": 1e-4, "train__steps": 5},
    {"task": "squad", "deft__alpha": 1.0, "deft__approximation": "l1", "data__max_target_tokens": 4, "seed": 2},
    {
        "task": "rte",
        "deft__alpha": 5.0,
        "deft__epsilon": 1e-4,
        "train__micro_batch_size": 2,
        "train__learning_rate": 3e-3,
    },
]


@pytest.fixture(scope="module")
def base(tiny_models: dict[str, Path]) -> Base:
    base = load_base(str(tiny_models["dry-t5"]), "t5")
    base.model.double()
    return base


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to reduce, which DeepSpeed would do in float32."""
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    monkeypatch.setattr(engine, "allreduce_gradients", lambda *_args, **_options: None)


@pytest.fixture(autouse=True)
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots in one pass, whatever it costs on this machine."""
    monkeypatch.setattr(PassCost, "groups", lambda _cost, sizes: [list(range(len(sizes)))])


@pytest.fixture
def mixed(tiny_models: dict[str, Path], tiny_data: Path) -> list[TrialSpec]:
    return [
        tiny_trial(
            tiny_models["dry-t5"],
            "t5",
            tiny_data,
            **{"task": "mrpc", "trial": f"t{number:04d}", "train__steps": 4, **leaves},
        )
        for number, leaves in enumerate(MIXED)
    ]


Serve = Callable[..., Inbox]


@pytest.fixture
def serve(base: Base, ranks: Ranks, tmp_path: Path) -> Serve:
    """Serve trials on a host of so many slots; checkpoints of calls with the same ``where`` lie in one folder."""

    def run(inbox: Inbox, slots: int | None = 1, where: str = "checkpoints") -> Inbox:
        Host(base, ranks, inbox, str(tmp_path / where), "h0", slots).serve()
        return inbox

    return run


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots of each training pass."""
    found: list[int] = []
    run = Pack.run

    def counted(pack: Pack, shares: Sequence[Share]) -> list[Found]:
        found.append(len(shares))
        return run(pack, shares)

    monkeypatch.setattr(Pack, "run", counted)
    return found


def end_of(inbox: Inbox, trial: TrialSpec) -> Row:
    ends = [row for row in inbox.rows_of(trial.trial) if row["kind"] == "end"]
    assert len(ends) == 1
    return ends[0]


def check_close(row: Row, other: Row, name: str, rel: float) -> None:
    assert (row.get(name) is None) == (other.get(name) is None)
    if other.get(name) is not None:
        assert row[name] == pytest.approx(other[name], rel=rel), name


def check_numbers(row: Row, other: Row) -> None:
    """Densities and scores; instead of a correlation of values that hardly differ, these."""
    for name in ("density", "density_encoder", "density_decoder_generated"):
        check_close(row, other, name, rel=1e-6)
    if other.get("score_metric") == "pearson":
        for said, want in zip(row.get("predictions", {}).values(), other.get("predictions", {}).values(), strict=True):
            assert said == pytest.approx(want, abs=1e-5)  # as near as its layer scales are, which are float32
    else:
        check_close(row, other, "score", rel=1e-9)


def check_equal(got: Inbox, want: Inbox, trial: TrialSpec) -> None:
    """Losses, evaluations in between, density, score and the adapter of a trial, on two hosts."""
    mine, alone = got.rows_of(trial.trial), want.rows_of(trial.trial)
    assert [(row["kind"], row.get("step")) for row in mine] == [(row["kind"], row.get("step")) for row in alone]
    for row, other in zip(mine, alone, strict=True):
        for name in ("loss", "task_loss", "density_loss", "learning_rate"):
            check_close(row, other, name, rel=1e-6)  # rows are summed over ranks in float32
        check_numbers(row, other)
    first, second = end_of(got, trial), end_of(want, trial)
    assert first["status"] == second["status"]
    assert first.get("lambda_layers", {}) == pytest.approx(second.get("lambda_layers", {}), abs=1e-5)
    if second.get("adapter"):
        weights = [load_file(Path(end["adapter"]) / "adapter_model.safetensors") for end in (first, second)]
        assert weights[0].keys() == weights[1].keys()
        assert worst(*weights) < 1e-5


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_trials_beside_each_other_leave_what_they_leave_alone(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], slots: int
) -> None:
    alone = serve(Inbox(*mixed), where="alone")
    assert set(passes) == {1}
    passes.clear()
    packed = serve(Inbox(*mixed), slots, "packed")

    for trial in mixed:
        check_equal(packed, alone, trial)
    assert max(passes) == min(slots, len(mixed))
    assert sum(passes) == 6 + 4 + 9 + 5 + 4 + 4 * 3, "every micro-batch once"


def test_it_makes_no_difference_who_shares_a_pass(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are split among passes by chance, at every turn anew."""
    alone, dice = serve(Inbox(*mixed), where="alone"), random.Random(0)
    passes.clear()

    def split(_cost: PassCost, sizes: Sequence[Size]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for place in dice.sample(range(len(sizes)), len(sizes)):
            groups.setdefault(dice.randrange(3), []).append(place)
        return list(groups.values())

    monkeypatch.setattr(PassCost, "groups", split)
    packed = serve(Inbox(*mixed), 4, "packed")
    for trial in mixed:
        check_equal(packed, alone, trial)
    assert {1, 2, 3} <= set(passes)


def test_a_freed_slot_takes_the_next_trial_at_once(mixed: list[TrialSpec], serve: Serve, passes: list[int]) -> None:
    """Nine trials of one step, evaluated in a single batch, in three slots: no pass has a seat empty but the last."""
    short = [
        mixed[0].model_copy(
            update={
                "trial": f"s{number}",
                "train": mixed[0].train.model_copy(update={"steps": 2 + number % 3, "evaluations": 1}),
                "data": mixed[0].data.model_copy(update={"validation_examples": 4}),
            }
        )
        for number in range(9)
    ]
    inbox = serve(Inbox(*short), 3)
    assert inbox.followed == [trial.trial for trial in short], "in their order"
    assert all(end_of(inbox, trial)["status"] == "complete" for trial in short)
    assert sum(passes) == sum(2 + number % 3 for number in range(9))
    # a trial of two to four steps is evaluated in one turn: three in four train, and at the end there are no more
    assert sum(passes[:-4]) / len(passes[:-4]) >= 0.75 * 3


def test_an_evaluation_leaves_room_for_a_step_of_the_others_after_each_batch(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    run = Pack.run

    def stepping(pack: Pack, shares: Sequence[Share]) -> list[Found]:
        told.append("step")
        return run(pack, shares)

    monkeypatch.setattr(Pack, "run", stepping)
    predict = "deft_ray.train.evaluation.Evaluator._predict"
    evaluator = __import__("deft_ray.train.evaluation", fromlist=["Evaluator"]).Evaluator
    predicting = evaluator._predict
    monkeypatch.setattr(predict, lambda *given: (told.append("batch"), predicting(*given))[1])
    long = mixed[2].model_copy(update={"train": mixed[2].train.model_copy(update={"steps": 12})})
    evaluated = mixed[0].model_copy(update={"train": mixed[0].train.model_copy(update={"steps": 3, "evaluations": 1})})
    serve(Inbox(evaluated, long), 2)

    first = told.index("batch")
    during = told[first : first + 2 * told.count("batch")]
    batches = -(-14 // 5)
    assert during[: 2 * batches - 1] == ["batch", "step"] * (batches - 1) + ["batch"]


@pytest.mark.parametrize("seed", range(5))
def test_trials_that_are_stopped_leave_the_others_as_they_are(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], seed: int
) -> None:
    """Half of them, each after a step that chance picks."""
    dice = random.Random(seed)
    stops = {trial.trial: dice.randint(1, 3) for trial in dice.sample(mixed, len(mixed) // 2)}
    alone = serve(Inbox(*mixed, stops=stops), where="alone")
    packed = serve(Inbox(*mixed, stops=stops), 4, "packed")

    for trial in mixed:
        check_equal(packed, alone, trial)
        stopped = end_of(packed, trial)
        assert stopped["status"] == ("stopped" if trial.trial in stops else "complete")
        assert stopped["steps"] == stops.get(trial.trial, trial.train.steps)
    assert max(passes) == 4


def test_a_trial_that_diverges_ends_alone(mixed: list[TrialSpec], serve: Serve) -> None:
    """Its losses are no numbers from its second step on; the others have the very rows of a host without it."""
    wild = mixed[1].model_copy(
        update={
            "trial": "wild",
            "train": mixed[1].train.model_copy(update={"learning_rate": 1e30, "warmup_share": 0.0}),
        }
    )
    others = [mixed[0], mixed[2], mixed[5]]
    without = serve(Inbox(*others), 4, "without")
    beside = serve(Inbox(others[0], wild, *others[1:]), 4, "beside")

    assert end_of(beside, wild)["status"] == "diverged"
    assert "not finite" in end_of(beside, wild)["cause"]
    for trial in others:
        check_equal(beside, without, trial)


@pytest.mark.parametrize("where", ["share", "take", "pass", "evaluation"])
def test_a_trial_that_raises_ends_alone(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the shared pass, after it, in it, or in its evaluation."""
    others = [mixed[0], mixed[2], mixed[3]]
    without = serve(Inbox(*others), 4, "without")
    bad, error = "t0001", RuntimeError("device-side assert")

    def guilty(slot: Slot) -> bool:
        return slot.trial.trial == bad and slot.done == 2

    share, take, run, evaluation = Slot.share, Slot.take, Pack.run, Slot.evaluation

    def sharing(slot: Slot, measure: bool) -> Share:
        if where == "share" and guilty(slot):
            raise error
        mine = share(slot, measure)
        if where == "pass" and guilty(slot):
            mine.batch.inputs["input_ids"][0, 0] = 10**6
        return mine

    def taking(slot: Slot, found: Found) -> Any:
        if where == "take" and guilty(slot):
            raise error
        return take(slot, found)

    def evaluating(slot: Slot, *given: Any, **options: Any) -> Any:
        found = evaluation(slot, *given, **options)
        if where == "evaluation" and slot.trial.trial == bad:
            next(found)
            found.throw(error)
        return found

    monkeypatch.setattr(Slot, "share", sharing)
    monkeypatch.setattr(Slot, "take", taking)
    monkeypatch.setattr(Slot, "evaluation", evaluating)
    assert Pack.run is run
    beside = serve(Inbox(others[0], mixed[1], *others[1:]), 4, "beside")

    ended = end_of(beside, mixed[1])
    assert ended["status"] == "failed"
    assert ("index out of range" if where == "pass" else "device-side assert") in ended["cause"]
    for trial in others:
        check_equal(beside, without, trial)


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the first steps of trials that have the base to themselves say this of memory, the last one again."""

    def make(*found: Holds) -> None:
        measured = iter(found)
        monkeypatch.setattr(FirstStep, "holds", lambda _first, _longest, _slots: next(measured, found[-1]))
        monkeypatch.setattr(PassCost, "slots_worth", lambda _cost, most: most)

    return make


@pytest.mark.parametrize("most", [1, 3, 6])
def test_a_host_takes_as_many_as_its_first_step_says(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], holds: Callable[..., None], most: int
) -> None:
    alone = serve(Inbox(*mixed), where="alone")
    passes.clear()
    holds(Holds(base=100, slot=10, free=12 * most))
    packed = serve(Inbox(*mixed), None, "packed")

    for trial in mixed:
        check_equal(packed, alone, trial)
    assert passes[0] == 1, "the first step is measured by itself"
    assert passes[1] == most
    assert max(passes) == most
    assert packed.slots == ([] if most == 1 else [most]), "and the sweep is told"
    last = end_of(packed, mixed[2])
    assert last["packing"]["slots"] == most
    assert last["packing"]["passes"] == 9
    assert last["host_memory_gib"] == {"base": 100 / 2**30, "slot": 10 / 2**30, "free": most * 12 / 2**30}


def test_a_larger_trial_leaves_room_for_fewer(mixed: list[TrialSpec], serve: Serve, holds: Callable[..., None]) -> None:
    """Measured again whenever a trial has the base to itself; the largest slot counts from then on."""
    holds(Holds(100, 10, 36), Holds(100, 5, 72), Holds(100, 18, 40))
    inbox = Inbox(mixed[0], *["wait"] * 20, mixed[1], *["wait"] * 20, mixed[2])
    serve(inbox, None)
    assert inbox.followed == [trial.trial for trial in mixed[:3]]
    assert inbox.slots == [3, 2]


def test_memory_is_measured_with_the_trial_s_longest_pass(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def holds(_first: FirstStep, longest: float, slots: int) -> Holds:
        assert slots == 1
        seen.append(longest)
        return Holds(100, 10, 1000)

    monkeypatch.setattr(FirstStep, "holds", holds)
    monkeypatch.setattr(PassCost, "slots_worth", lambda _cost, _most: 1)
    padded = mixed[1].model_copy(
        update={"data": mixed[1].data.model_copy(update={"padding": "max_length"}), "trial": "padded"}
    )
    serve(Inbox(mixed[0]), None, "shorter")
    serve(Inbox(padded), None, "padded")
    assert 1.0 < seen[0] < 3.0, "batches hold examples of unlike lengths"
    assert seen[1:] == [1.0], "all are of one length"


@pytest.mark.parametrize("shared", [False, True])
def test_with_a_number_of_slots_memory_is_measured_where_their_first_passes_went_alone(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Once: whoever comes later may share them."""
    seen: list[int] = []

    def holds(_first: FirstStep, _longest: float, slots: int) -> Holds:
        seen.append(slots)
        return Holds(100, 10, 1000)

    monkeypatch.setattr(FirstStep, "holds", holds)
    if not shared:
        monkeypatch.setattr(PassCost, "groups", lambda _cost, sizes: [[place] for place in range(len(sizes))])
    found = serve(Inbox(*mixed[:3], *["wait"] * 40, *mixed[3:5]), 3, "three")
    assert seen == ([] if shared else [3])
    measured = {} if shared else {name: n / 2**30 for name, n in vars(Holds(100, 10, 1000)).items()}
    assert end_of(found, mixed[0])["host_memory_gib"] == measured


def test_what_of_its_passes_a_trial_shared_is_in_its_record(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pass of two that takes three seconds, where either alone would take two: one and a half each."""
    brought: list[Sequence[Size]] = []

    def together(_cost: PassCost, sizes: Sequence[Size]) -> list[list[int]]:
        brought.append(sizes)
        return [list(range(len(sizes)))]

    monkeypatch.setattr(PassCost, "groups", together)
    times = iter(range(0, 10**6, 3))
    monkeypatch.setattr("deft_ray.train.pack._clock", lambda: float(next(times)))
    monkeypatch.setattr(PassCost, "alone_s", lambda _cost, _size: 2.0)
    plain = [
        mixed[place].model_copy(
            update={"train": mixed[place].train.model_copy(update={"evaluations": 1, "steps": steps})}
        )
        for place, steps in ((0, 6), (4, 9))
    ]
    inbox = serve(Inbox(*plain), 2)
    short, long = (end_of(inbox, trial)["packing"] for trial in plain)
    shared = [sizes for sizes in brought if len(sizes) == 2]
    own = [sum(sizes[place].rows * (sizes[place].source + sizes[place].target) for sizes in shared) for place in (0, 1)]
    longest = [max(size.source for size in sizes) + max(size.target for size in sizes) for sizes in shared]
    all_in = [sum(s[place].rows * length for s, length in zip(shared, longest, strict=True)) for place in (0, 1)]
    for found, passes, mine, whole in zip((short, long), (6, 9), own, all_in, strict=True):
        assert found == {
            "slots": 2, "passes": passes, "shared": 6, "part_s": 9.0, "alone_s": 12.0, "tokens": mine,
            "padding": whole - mine,
        }  # fmt: skip
    assert short["padding"] + long["padding"] > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["gpu", "cpu"])
def test_out_of_memory_makes_passes_smaller_and_loses_nothing(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Memory holds two slots: a pass of four is tried with three, then two; from then on two at most."""
    alone = serve(Inbox(*mixed), where="alone")
    passes.clear()
    losses = Pack._losses

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if len(shares) > 2:
            raise error
        return losses(pack, shares, *rest)

    monkeypatch.setattr(Pack, "_losses", full)
    packed = serve(Inbox(*mixed), 4, "packed")

    for trial in mixed:
        check_equal(packed, alone, trial)
    assert passes[:4] == [4, 3, 2, 2]
    assert max(passes[2:]) == 2
    warnings = [end_of(packed, trial)["warning"] for trial in mixed]
    assert all("memory held no pass of 3 slots: 2 at once from then on" in str(text) for text in warnings)


def test_a_trial_that_memory_does_not_hold_alone_fails(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Pack._losses

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if any(share.batch.rows > 3 for share in shares):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(pack, shares, *rest)

    small = mixed[5]
    alone = serve(Inbox(small), where="alone")
    monkeypatch.setattr(Pack, "_losses", full)
    packed = serve(Inbox(mixed[0], small), 2, "packed")
    assert end_of(packed, mixed[0])["status"] == "failed"
    assert "OutOfMemoryError" in end_of(packed, mixed[0])["cause"]
    check_equal(packed, alone, small)


def test_a_pass_that_memory_did_not_hold_is_let_go_before_the_next(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, left = Pack._losses, list[weakref.ref[torch.Tensor]]()
    monkeypatch.setattr(PassCost, "groups", lambda _cost, sizes: [[place] for place in range(len(sizes))])

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        assert not any(tensor() is not None for tensor in left)
        if shares[0].batch.rows == 5:
            activations = torch.zeros(3)
            left.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(pack, shares, *rest)

    monkeypatch.setattr(Pack, "_losses", full)
    large = mixed[0].model_copy(update={"train": mixed[0].train.model_copy(update={"batch_size": 5})})
    inbox = serve(Inbox(large, mixed[1], mixed[2]), 3)
    assert len(left) == 1
    assert [end_of(inbox, trial)["status"] for trial in (large, *mixed[1:3])] == ["failed", "complete", "complete"]


@pytest.mark.parametrize("together", [True, False])
def test_a_gpu_that_computes_no_more_ends_the_host(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Of several slots in the pass none is blamed; a slot by itself is, and the others are to begin again."""

    def broken(_pack: Pack, _shares: Sequence[Share], *_rest: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Pack, "_losses", broken)
    inbox = Inbox(*mixed[: 3 if together else 1])
    with pytest.raises(torch.AcceleratorError):
        serve(inbox, 3)
    ends = [(sender, row["status"], row["alone"]) for sender, row in inbox.sent]
    assert ends == ([] if together else [(mixed[0].trial, "failed", True)])


@pytest.mark.parametrize(
    "lonely",
    [
        {"adapter": {"kind": "prefix", "virtual_tokens": 3}},
        {"adapter": {"kind": "prompt", "virtual_tokens": 3}},
        {"adapter": {"kind": "bottleneck", "reduction_factor": 4}},
        {"train": {"zero_stage": 3}},
        {"adapter": {"target_modules": ["shared", "q"]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 2])
def test_what_cannot_share_a_base_waits_for_it_and_has_it_alone(
    mixed: list[TrialSpec], serve: Serve, passes: list[int], lonely: dict[str, dict[str, Any]], place: int
) -> None:
    others = [mixed[0], mixed[1], mixed[2]]
    ((section, leaves),) = lonely.items()
    changed = mixed[0].model_copy(
        update={"trial": "lonely", section: getattr(mixed[0], section).model_copy(update=leaves)}
    )
    trials = [*others[:place], changed, *others[place:]]
    alone = serve(Inbox(*trials), where="alone")
    passes.clear()
    packed = serve(Inbox(*trials), 3, "packed")

    for trial in trials:
        check_equal(packed, alone, trial)
    sequence = [sender for sender, row in packed.sent if row["kind"] == "end"]
    assert sequence.index("lonely") == place, "nobody is taken before it, and nobody beside it"
    assert max(passes) == (3 if place == 0 else 2)


def test_a_suspect_has_the_host_to_itself(mixed: list[TrialSpec], serve: Serve, passes: list[int]) -> None:
    """As one of those that lost their host again and again may be the cause."""
    suspect = Taken(mixed[1], attempt=3, apart=True)
    inbox = serve(Inbox(mixed[0], suspect, mixed[2], mixed[5]), 4)
    assert [sender for sender, row in inbox.sent if row["kind"] == "end"][:2] == [mixed[0].trial, mixed[1].trial]
    assert passes[: 6 + 4] == [1] * 10
    assert max(passes) == 2


@pytest.mark.parametrize("kill_at", [5, 9, 14])
def test_killed_in_the_middle_of_a_pack_every_trial_ends_as_undisturbed(
    mixed: list[TrialSpec], serve: Serve, kill_at: int
) -> None:
    saving = [
        trial.model_copy(update={"train": trial.train.model_copy(update={"checkpoint_every_s": 0.0})})
        for trial in mixed[:4]
    ]
    calm = serve(Inbox(*saving), where="calm")
    killed = Inbox(*saving, kill_at=kill_at)
    with pytest.raises(Killed):
        serve(killed, 4, "killed")
    left = [trial for trial in saving if not any(row["kind"] == "end" for row in killed.rows_of(trial.trial))]
    again = serve(Inbox(*left), 4, "killed")

    assert len(left) >= 2
    for trial in left:
        first, second = end_of(again, trial), end_of(calm, trial)
        assert first["steps"] == second["steps"]
        check_numbers(first, second)
        losses = {row["step"]: row["loss"] for row in killed.rows_of(trial.trial) if row["kind"] == "train"}
        losses |= {row["step"]: row["loss"] for row in again.rows_of(trial.trial) if row["kind"] == "train"}
        want = {row["step"]: row["loss"] for row in calm.rows_of(trial.trial) if row["kind"] == "train"}
        assert losses == pytest.approx(want, rel=1e-6)
    taken_up = {row["step"] for row in again.rows_of(saving[2].trial) if row["kind"] == "train"}
    assert min(taken_up) > 1, "it went on from its checkpoint"


def test_full_slots_leave_nothing_on_the_base(base: Base, mixed: list[TrialSpec], serve: Serve) -> None:
    names, before = {name for name, _ in base.model.named_modules()}, hook_count(base)
    serve(Inbox(*mixed), 4)

    assert hook_count(base) == before
    assert {name for name, _ in base.model.named_modules()} == names
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())


def work(rank: int, folder: Path, trials: list[TrialSpec]) -> None:
    """One of two workers of a host: with one slot, then with three. Reductions are in float32, so this is too."""
    ranks = start_worker(rank, 2, folder)
    base = load_base(trials[0].model.name, "t5", quantization=trials[0].model.quantization)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(PassCost, "groups", lambda _cost, sizes: [list(range(len(sizes)))])
    passes: list[int] = []
    run = Pack.run
    monkeypatch.setattr(Pack, "run", lambda pack, shares: (passes.append(len(shares)), run(pack, shares))[1])
    share = Slot.share

    def torn(slot: Slot, measure: bool) -> Share:
        if slot.trial.trial == "torn" and slot.done == 1 and not ranks.leads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return share(slot, measure)

    monkeypatch.setattr(Slot, "share", torn)
    for slots in (1, 3):
        passes.clear()
        inbox = Inbox(*trials, stops={trials[1].trial: 2})
        Host(base, ranks, inbox, str(folder / f"{slots}"), "h0", slots).serve()
        assert max(passes) == slots
        assert set(inbox.followed) == {trial.trial for trial in trials}
        if ranks.leads:
            torch.save(inbox.sent, folder / f"{slots}.pt")
        else:
            assert not inbox.sent
    monkeypatch.undo()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_workers_with_three_slots_leave_what_they_leave_with_one(
    mixed: list[TrialSpec], tmp_path: Path, quantization: str
) -> None:
    """Among them some that are stopped, diverge, cannot start, cannot share the base, and fail on one worker only."""

    def changed(trial: TrialSpec, name: str, **sections: dict[str, Any]) -> TrialSpec:
        train = {"learning_rate": 1e-3, **sections.pop("train", {})}
        return trial.model_copy(
            update={
                "trial": name,
                "model": trial.model.model_copy(update={"quantization": quantization}),
                "train": trial.train.model_copy(update=train),
                "deft": trial.deft.model_copy(update={"epsilon": 1e-2}),
                **{section: getattr(trial, section).model_copy(update=leaves) for section, leaves in sections.items()},
            }
        )

    trials = [
        changed(mixed[0], "plain"),
        changed(mixed[1], "stopped", train={"zero_stage": 2}),
        changed(mixed[5], "parts", train={"batch_size": 8, "micro_batch_size": 2, "zero_stage": 1}),
        changed(mixed[1], "wild", train={"learning_rate": 1e30, "warmup_share": 0.0}),
        changed(mixed[1], "lost", data={"dir": "/nowhere"}),
        changed(mixed[1], "torn"),
        changed(mixed[2], "sharded", train={"zero_stage": 3}),
        changed(mixed[4], "question"),
    ]
    spawn(work, args=(tmp_path, trials), nprocs=2)
    one, three = (torch.load(tmp_path / f"{slots}.pt", weights_only=False) for slots in (1, 3))

    for trial in trials:
        got, want = ([row for sender, row in sent if sender == trial.trial] for sent in (three, one))
        assert [(row["kind"], row.get("step"), row.get("status")) for row in got] == [
            (row["kind"], row.get("step"), row.get("status")) for row in want
        ]
        if trial.trial == "wild":
            continue
        for row, other in zip(got, want, strict=True):
            for name in ("loss", "density_loss", "density"):
                check_close(row, other, name, rel=1e-4)
    statuses = {sender: row["status"] for sender, row in three if row["kind"] == "end"}
    assert statuses == {
        **dict.fromkeys(("plain", "parts", "sharded", "question"), "complete"),
        "stopped": "stopped",
        "wild": "diverged",
        "lost": "failed",
        "torn": "failed",
    }
    assert "worker 1: OutOfMemoryError" in next(
        row["cause"] for sender, row in three if sender == "torn" and "cause" in row
    )
