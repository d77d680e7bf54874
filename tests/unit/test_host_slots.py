"""A host with several slots: each trial leaves what it leaves on a host by itself, whatever becomes of those beside it.

A model without dropout, in float64, where nothing but a fault is left to see; layer scales are float32.
"""

from __future__ import annotations

import random
import resource
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from deft_ray.errors import SetupError
from deft_ray.models.base import Base, load_base
from deft_ray.models.bottleneck import BottleneckLayer
from deft_ray.spec.machine import read_kib
from deft_ray.spec.schema import TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.train.cost import EVALUATED, PassCost, Room, Size, tokens_of
from deft_ray.train.course import Run
from deft_ray.train.evaluation import Evaluator
from deft_ray.train.host import Host, Taken
from deft_ray.train.loading import LoadedTasks, load_task
from deft_ray.train.memory import FirstStep, Holds
from deft_ray.train.pack import Found, Pack, Share
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from deft_ray.train.storage import TrialStorage
from tests.slots import all_in_one_pass, counted_slots, learnt_apart, loaded_at_once, start_worker, worst
from tests.tiny import tiny_trial
from tests.unit.test_host import Inbox, Killed, Row, hook_count

Trial = Callable[..., TrialSpec]

#: Trials that differ in their task, loss, adapter, length, evaluations and seed.
MIXED: list[dict[str, Any]] = [
    {"deft__alpha": 0.0, "train__steps": 6, "train__evaluations": 3},
    {
        "task": "sst2",
        "deft__alpha": 3.0,
        "deft__epsilon": 1e-2,
        "adapter__r": 2,
        "train__schedule": "constant",
        "seed": 1,
    },
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
    {
        "task": "qnli",
        "deft__alpha": 2.0,
        "deft__adaptive": True,
        "deft__lambda_init": 0.4,
        "deft__epsilon": 1e-2,
        "train__steps": 7,
        "train__batch_size": 3,
    },
    {
        "task": "cola",
        "deft__alpha": 1.0,
        "deft__epsilon": 1e-2,
        "deft__count_padding": True,
        "train__max_grad_norm": 0.1,
        "adapter__r": 8,
        "seed": 4,
    },
]
#: Passes of each: a step in three parts counts three times.
PASSES = [6, 4, 9, 5, 4, 4 * 3, 7, 4]
#: Which passes are shared by what they have cost on this machine.
BY_COST = PassCost.groups
#: How a host has a task loaded while it trains.
ON_A_THREAD = LoadedTasks.begin


@pytest.fixture(scope="module")
def base(tiny_models: dict[str, Path]) -> Base:
    base = load_base(str(tiny_models["dry-t5"]), "t5")
    base.model.double()
    return base


@pytest.fixture(scope="module")
def single(tiny_models: dict[str, Path]) -> Base:
    """The same in float32."""
    return load_base(str(tiny_models["dry-t5"]), "t5")


@pytest.fixture(autouse=True)
def all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is taken in a turn trains in that turn, in one pass with the others."""
    monkeypatch.setattr(PassCost, "groups", all_in_one_pass)
    monkeypatch.setattr(LoadedTasks, "begin", loaded_at_once)


@pytest.fixture(scope="module")
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

    def run(inbox: Inbox, slots: int | None = 1, where: str = "checkpoints", base: Base = base) -> Inbox:
        Host(base, ranks, inbox, str(tmp_path / where), "h0", slots).serve()
        return inbox

    return run


Alone = Callable[..., Inbox]


@pytest.fixture(scope="module")
def alone(base: Base, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Gives what trials send from a host with one slot; each is run once for all tests.

    To be asked before anything is put in the place of what a trial does.
    """
    known: dict[tuple[Any, ...], list[Row]] = {}

    def get(*trials: TrialSpec, stops: dict[str, int] | None = None, base: Base = base) -> Inbox:
        keys = [(trial.model_dump_json(), (stops or {}).get(trial.trial), base.model.dtype) for trial in trials]
        new = [trial for trial, key in zip(trials, keys, strict=True) if key not in known]
        inbox = Inbox(*new, stops=stops)
        Host(base, ranks, inbox, str(tmp_path_factory.mktemp("alone")), "h0").serve()
        known.update({key: inbox.rows_of(trial.trial) for trial, key in zip(trials, keys, strict=True) if trial in new})
        found = Inbox()
        found.sent = [(trial.trial, row) for trial, key in zip(trials, keys, strict=True) for row in known[key]]
        ends = [row for row in found.rows if row["kind"] == "end"]
        assert {row["status"] for row in ends} <= {"complete", "stopped"}, "or there is nothing to compare"
        assert {row["packing"]["shared"] for row in ends} == {0}
        return found

    return get


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots of each training pass."""
    return counted_slots(monkeypatch)


def end_of(inbox: Inbox, trial: TrialSpec) -> Row:
    ends = [row for row in inbox.rows_of(trial.trial) if row["kind"] == "end"]
    assert len(ends) == 1
    return ends[0]


def ended(inbox: Inbox) -> list[str]:
    """Trials in the order of their ends."""
    return [sender for sender, row in inbox.sent if row["kind"] == "end"]


def check_close(row: Row, other: Row, name: str, rel: float) -> None:
    assert (row.get(name) is None) == (other.get(name) is None)
    if other.get(name) is not None:
        assert row[name] == pytest.approx(other[name], rel=rel), name


def check_numbers(row: Row, other: Row, looser: float = 1) -> None:
    """Densities and scores; instead of a correlation of values that hardly differ, these."""
    for name in ("density", "density_encoder", "density_decoder_generated"):
        check_close(row, other, name, rel=1e-6 * looser)
    if other.get("score_metric") == "pearson":
        for said, want in zip(row.get("predictions", {}).values(), other.get("predictions", {}).values(), strict=True):
            assert said == pytest.approx(want, abs=1e-5 * looser)  # as near as its layer scales are, which are float32
    else:
        check_close(row, other, "score", rel=1e-9)


def check_equal(got: Inbox, want: Inbox, trial: TrialSpec, looser: float = 1, weights: bool = True) -> None:
    """Losses, evaluations in between, density, score and the adapter of a trial, on two hosts.

    Args:
        got: What the trial has sent from the one.
        want: And from the other.
        trial: Which.
        looser: Times by which all tolerances are larger than those of float64.
        weights: Whether the adapter's, too.
    """
    mine, alone = got.rows_of(trial.trial), want.rows_of(trial.trial)
    assert [(row["kind"], row.get("step")) for row in mine] == [(row["kind"], row.get("step")) for row in alone]
    for row, other in zip(mine, alone, strict=True):
        for name in ("loss", "task_loss", "density_loss", "learning_rate"):
            check_close(row, other, name, rel=1e-6 * looser)  # rows are summed over ranks in float32
        check_numbers(row, other, looser)
    if weights:
        check_end(end_of(got, trial), end_of(want, trial), looser)


def check_end(end: Row, other: Row, looser: float = 1) -> None:
    """How a trial ended, its layer scales and its adapter: each weight, in float32 all together.

    There AdamW makes whole steps of a weight whose gradient is nothing but rounding.
    """
    assert (end["status"], end.get("steps")) == (other["status"], other.get("steps"))
    assert end.get("lambda_layers", {}) == pytest.approx(other.get("lambda_layers", {}), abs=1e-5 * looser)
    assert (end.get("adapter") is None) == (other.get("adapter") is None)
    if other.get("adapter"):
        assert end["adapter"] != other["adapter"]
        weights = [load_file(Path(each["adapter"]) / "adapter_model.safetensors") for each in (end, other)]
        assert worst(*weights) < (1e-5 if looser == 1 else 0.05), "of a weight without a gradient: whole steps"
        assert looser == 1 or learnt_apart(*weights) < 1e-4 * looser


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_trials_beside_each_other_leave_what_they_leave_alone(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, passes: list[int], slots: int
) -> None:
    want = alone(*mixed)
    passes.clear()
    packed = serve(Inbox(*mixed), slots, "packed")

    for trial in mixed:
        check_equal(packed, want, trial)
    assert max(passes) == slots
    assert sum(passes) == sum(PASSES), "every micro-batch once"


def test_at_the_published_epsilon_they_do_too(mixed: list[TrialSpec], serve: Serve, alone: Alone) -> None:
    """To 5e-4, and a twentieth of what was learnt: slopes are float32, and change by their size within 3e-4."""
    published = {"approximation": "l0", "epsilon": 1e-7, "alpha": 1.0}
    trials = [trial.model_copy(update={"deft": trial.deft.model_copy(update=published)}) for trial in mixed]
    want, packed = alone(*trials), serve(Inbox(*trials), 4, "packed")
    for trial in trials:
        check_equal(packed, want, trial, looser=500)


def test_with_every_other_loss_and_schedule_they_do_too(mixed: list[TrialSpec], serve: Serve, alone: Alone) -> None:
    losses: list[dict[str, Any]] = [
        {"approximation": "tanh", "beta": 3.0, "alpha": 2.0},
        {"approximation": "l2", "alpha": 0.5, "alpha_ramp": 0.5},
        {"epsilon": 1e-1, "epsilon_end": 1e-3, "alpha": 1.0},
        {"epsilon": 1e-2, "alpha": 3.0, "alpha_decoder": 0.1, "alpha_delay": 0.5},
        {"approximation": "tanh", "loss_of": "feature_map", "alpha": 2.0},
    ]
    trials = [
        trial.model_copy(update={"deft": trial.deft.model_copy(update=loss)})
        for trial, loss in zip(mixed[:5], losses, strict=True)
    ]
    want, packed = alone(*trials), serve(Inbox(*trials), 5, "packed")
    for trial in trials:
        check_equal(packed, want, trial)


@pytest.mark.parametrize("evaluated", [1, 2])
def test_trials_that_are_evaluated_share_what_the_others_wait(
    base: Base, ranks: Ranks, mixed: list[TrialSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evaluated: int
) -> None:
    """A turn's pieces, of however many trials, have a step's room together while somebody trains."""
    at_once = [trial.model_copy(update={"train": trial.train.model_copy(update={"steps": 2})}) for trial in mixed]
    long = mixed[2].model_copy(update={"train": mixed[2].train.model_copy(update={"steps": 40})})
    turns, room_of = list[list[tuple[float, float]]](), Host.evaluation_room
    turn = Host._turn

    def new_turn(host: Host) -> None:
        turns.append([])
        turn(host)

    def noted(host: Host) -> Room | None:
        room = room_of(host)
        if room is not None and host._pack is not None:
            whole = host._pack.cost.room()
            assert whole is not None
            turns[-1].append((room.most, whole.most))
        return room

    monkeypatch.setattr(Host, "_turn", new_turn)
    monkeypatch.setattr(Host, "evaluation_room", noted)
    Host(base, ranks, Inbox(long, *at_once[:evaluated]), str(tmp_path), "h0", 3).serve()
    asked = [each for each in turns if each]
    assert asked
    for each in asked:
        assert sum(most for most, _ in each) <= each[0][1] * (1 + 1e-9)
    assert max(map(len, asked)) == evaluated, "that many at once"


def test_it_makes_no_difference_who_shares_a_pass(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are split among passes by chance, at every turn anew."""
    want, dice = alone(*mixed), random.Random(0)
    passes.clear()

    def split(_cost: PassCost, sizes: Sequence[Size]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for place in dice.sample(range(len(sizes)), len(sizes)):
            groups.setdefault(dice.randrange(3), []).append(place)
        return list(groups.values())

    monkeypatch.setattr(PassCost, "groups", split)
    packed = serve(Inbox(*mixed), 4, "packed")
    for trial in mixed:
        check_equal(packed, want, trial)
    assert {1, 2, 3} <= set(passes)


@pytest.mark.parametrize("way", ["one pass", "by cost", "memory for two"])
def test_every_trial_takes_part_in_every_turn(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """From the turn in which it is taken to its last, once in each, however passes are shared.

    But for an evaluation in between, which takes the turns of its batches, and more if they come in pieces.
    """
    turns, begun, now = defaultdict[str, list[int]](list), dict[str, int](), [0]
    taking, turn, losses, opening = Slot.take, Host._turn, Pack._losses, Host._open

    def opened(host: Host, trial: Taken, started: float) -> Run:
        begun[trial.trial.trial] = now[0] + 1
        return opening(host, trial, started)

    def taken(slot: Slot, found: Found) -> Any:
        turns[slot.trial.trial].append(now[0])
        return taking(slot, found)

    def next_turn(host: Host) -> None:
        now[0] += 1
        turn(host)

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if len(shares) > 2:
            raise MemoryError
        return losses(pack, shares, *rest)

    monkeypatch.setattr(Slot, "take", taken)
    monkeypatch.setattr(Host, "_open", opened)
    monkeypatch.setattr(Host, "_turn", next_turn)
    if way == "memory for two":
        monkeypatch.setattr(Pack, "_losses", full)
    elif way == "by cost":
        monkeypatch.setattr(PassCost, "groups", BY_COST)
    serve(Inbox(*mixed), 4)

    batches = -(-14 // 5)
    for trial, count in zip(mixed, PASSES, strict=True):
        mine = turns[trial.trial]
        away = [after - before - 1 for before, after in pairwise(mine) if after != before + 1]
        assert (mine[0], len(mine)) == (begun[trial.trial], count)
        assert len(away) == trial.train.evaluations - 1
        assert all(batches <= turns_away <= 14 for turns_away in away)
    assert len({mine[0] for mine in turns.values()}) > 3, "they came at different turns"


@pytest.mark.parametrize("when", ["others train", "nobody trains any more", "memory holds one", "it cannot be"])
def test_a_task_is_loaded_while_others_train(
    base: Base,
    mixed: list[TrialSpec],
    serve: Serve,
    alone: Alone,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Its trials begin once it is loaded; one that is taken after them, whose task is there, does not wait."""
    long, first, known = mixed[2], mixed[1], mixed[0]
    second = first.model_copy(update={"trial": "second", "seed": 5})
    want, may_end, loaded = alone(long, first, second, known), threading.Event(), threading.Event()
    passes.clear()
    monkeypatch.setattr(LoadedTasks, "begin", ON_A_THREAD)
    taking, losses = Slot.take, Pack._losses

    class Watching(Inbox):
        def send(self, trial: str, row: Row) -> None:
            super().send(trial, row)
            if when == "nobody trains any more" and (trial, row["kind"]) == (long.trial, "end"):
                may_end.set()

    def taken(slot: Slot, found: Found) -> Any:
        if when != "nobody trains any more" and (slot.trial, slot.done) == (long, 4):
            may_end.set()
            assert loaded.wait(60), "it would have to be loaded within five steps"
        return taking(slot, found)

    def slowly(task: str, data: Any, by: Base, *rest: Any) -> EncodedTask:
        if task != first.task:
            return load_task(task, data, by, *rest)
        assert by.tokenizer is not base.tokenizer, "that one may be in use"
        assert may_end.wait(60), "the others wait for it"
        try:
            if when == "it cannot be":
                raise SetupError("data.dir: no rows of sst2")
            return load_task(task, data, by, *rest)
        finally:
            loaded.set()

    def narrow(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if when == "memory holds one" and len(shares) > 1:
            raise MemoryError
        return losses(pack, shares, *rest)

    monkeypatch.setattr(Slot, "take", taken)
    monkeypatch.setattr(Pack, "_losses", narrow)
    monkeypatch.setattr("deft_ray.train.loading.load_task", slowly)
    packed = serve(Watching(long, first, second, known), 4, "packed")

    order, fails = [sender for sender, _ in packed.sent], when == "it cannot be"
    assert order.index(known.trial) < min(order.index(first.trial), order.index(second.trial))
    for trial in (long, known) if fails else (long, known, first, second):
        check_equal(packed, want, trial)
    if fails:
        for trial in (first, second):
            assert end_of(packed, trial)["status"] == "failed"
            assert "data.dir: no rows of sst2" in end_of(packed, trial)["cause"]
    elif when == "others train":
        assert max(passes) >= 3
    elif when == "memory holds one":
        assert passes.count(2) == 1
    else:
        assert order.index(first.trial) > max(place for place, trial in enumerate(order) if trial == long.trial)


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


def test_the_slot_of_a_stopped_trial_takes_the_next_one_at_once(
    mixed: list[TrialSpec], serve: Serve, passes: list[int]
) -> None:
    train = mixed[0].train.model_copy(update={"steps": 6, "evaluations": 1})
    four = [mixed[0].model_copy(update={"trial": f"s{number}", "train": train}) for number in range(4)]
    inbox = serve(Inbox(*four, stops={"s0": 2}), 3)
    assert [end_of(inbox, trial)["status"] for trial in four] == ["stopped", *["complete"] * 3]
    assert passes == [3] * 6 + [1] * 2


def test_an_evaluation_leaves_room_for_a_step_of_the_others_after_each_batch(
    mixed: list[TrialSpec], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no batch has more than EVALUATED times the tokens of the step before it, as costs are not known so far."""
    told: list[tuple[str, int]] = []
    rows: list[int] = []
    run, predicting = Pack.run, Evaluator._predict_part

    def stepping(pack: Pack, shares: Sequence[Share]) -> list[Found]:
        told.append(("step", tokens_of([share.size for share in shares])))
        return run(pack, shares)

    def predict(evaluator: Evaluator, examples: list[Example], *given: Any) -> Any:
        longest = max(len(example.input_ids) for example in evaluator.data.validation)
        told.append(("batch", (longest + 2 * max(map(len, evaluator.data.candidates))) * len(examples)))
        rows.append(len(examples))
        return predicting(evaluator, examples, *given)

    monkeypatch.setattr(Pack, "run", stepping)
    monkeypatch.setattr(Evaluator, "_predict_part", predict)
    long, evaluated = (
        mixed[0].model_copy(update={"trial": name, "train": mixed[0].train.model_copy(update=train)})
        for name, train in (
            ("long", {"steps": 12, "evaluations": 1, "batch_size": 1}),
            ("evaluated", {"steps": 3, "evaluations": 1, "eval_batch_size": 14}),
        )
    )
    serve(Inbox(evaluated, long), 2)

    first = next(place for place, (what, _) in enumerate(told) if what == "batch")
    count = next(place for place in range(len(rows)) if sum(rows[:place]) == 14)
    during = told[first : first + 2 * count - 1]
    assert count >= 3, "a step of the other has one row"
    assert [what for what, _ in during] == ["batch", "step"] * (count - 1) + ["batch"]
    for place in range(count):
        (_, before), (_, tokens) = told[first + 2 * place - 1 : first + 2 * place + 1]
        assert tokens <= EVALUATED * before
        assert place == count - 1 or tokens * (rows[place] + 1) > EVALUATED * before * rows[place], "no room for more"


@pytest.mark.parametrize("seed", range(5))
def test_trials_that_are_stopped_leave_the_others_as_they_are(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, passes: list[int], seed: int
) -> None:
    """Half of them, each after a step that chance picks."""
    dice = random.Random(seed)
    stops = {trial.trial: dice.randint(1, 3) for trial in dice.sample(mixed, len(mixed) // 2)}
    want = alone(*mixed, stops=stops)
    packed = serve(Inbox(*mixed, stops=stops), 4, "packed")

    for trial in mixed:
        check_equal(packed, want, trial)
        stopped = end_of(packed, trial)
        assert stopped["status"] == ("stopped" if trial.trial in stops else "complete")
        assert stopped["steps"] == stops.get(trial.trial, trial.train.steps)
    assert max(passes) == 4


@pytest.mark.parametrize(
    ("train", "status", "cause"),
    [
        ({"learning_rate": 1e30, "warmup_share": 0.0}, "diverged", "not finite"),
        ({"max_time_s": 1e-6}, "failed", "train.max_time_s: 1e-06 s are over after step 1 of 4"),
    ],
)
def test_a_trial_that_diverges_or_is_out_of_time_ends_alone(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, train: dict[str, float], status: str, cause: str
) -> None:
    """The others have the very rows of a host without it."""
    wild = mixed[1].model_copy(update={"trial": "wild", "train": mixed[1].train.model_copy(update=train)})
    others = [mixed[0], mixed[2], mixed[5]]
    want = alone(*others)
    beside = serve(Inbox(others[0], wild, *others[1:]), 4, "beside")

    assert end_of(beside, wild)["status"] == status
    assert cause in end_of(beside, wild)["cause"]
    for trial in others:
        check_equal(beside, want, trial)


@pytest.mark.parametrize("where", ["share", "take", "pass", "evaluation", "answer", "save", "publish_adapter"])
def test_a_trial_that_raises_ends_alone(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the shared pass, after it, in it, in its evaluation or in an answer there, or where it is stored."""
    others, guilty_one = [mixed[0], mixed[2], mixed[3]], mixed[4 if where == "answer" else 1]
    want = alone(*others)
    bad, error = guilty_one.trial, RuntimeError("device-side assert")
    if where == "save":
        often = guilty_one.train.model_copy(update={"checkpoint_every_s": 0.0})
        guilty_one = guilty_one.model_copy(update={"train": often})

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

    def writing(*_: Any) -> Generator[None, None, None]:
        yield
        raise error

    def storing(storage: TrialStorage, *given: Any) -> Any:
        if Path(storage.adapter_uri).parent.name == bad:
            raise error
        return stored(storage, *given)

    if where in ("save", "publish_adapter"):
        stored = getattr(TrialStorage, where)
        monkeypatch.setattr(TrialStorage, where, storing)
    monkeypatch.setattr(Slot, "share", sharing)
    monkeypatch.setattr(Slot, "take", taking)
    monkeypatch.setattr(Slot, "evaluation", evaluating)
    if where == "answer":
        monkeypatch.setattr("deft_ray.train.evaluation.generate_in_pieces", writing)
    assert Pack.run is run
    beside = serve(Inbox(others[0], guilty_one, *others[1:]), 4, "beside")

    ended = end_of(beside, guilty_one)
    assert ended["status"] == "failed"
    assert ("index out of range" if where == "pass" else "device-side assert") in ended["cause"]
    for trial in others:
        check_equal(beside, want, trial)


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the first steps of trials that have the base to themselves say this of memory, the last one again."""

    def make(*found: Holds) -> None:
        measured = iter(found)
        monkeypatch.setattr(FirstStep, "holds", lambda _first, _longest, _slots: next(measured, found[-1]))
        monkeypatch.setattr(PassCost, "slots_worth", lambda _cost, most: most)

    return make


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_host_takes_as_many_as_its_first_step_says(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, passes: list[int], holds: Callable[..., None], most: int
) -> None:
    want = alone(*mixed)
    passes.clear()
    holds(Holds(base=100, slot=10, free=12 * most))
    packed = serve(Inbox(*mixed), None, "packed")

    for trial in mixed:
        check_equal(packed, want, trial)
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["torch", "cuda", "cublas", "python"],
)
def test_out_of_memory_makes_passes_smaller_and_loses_nothing(
    mixed: list[TrialSpec],
    serve: Serve,
    alone: Alone,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """Memory holds two slots: a pass of four is tried with three, then two; from then on two at most."""
    want = alone(*mixed)
    passes.clear()
    losses = Pack._losses

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if len(shares) > 2:
            raise error
        return losses(pack, shares, *rest)

    monkeypatch.setattr(Pack, "_losses", full)
    packed = serve(Inbox(*mixed), 4, "packed")

    for trial in mixed:
        check_equal(packed, want, trial)
    assert passes[:4] == [4, 3, 2, 2]
    assert max(passes[2:]) == 2
    assert (packed.slots, packed.limits) == ([2], [2]), "the sweep is told"
    warnings = [end_of(packed, trial)["warning"] for trial in mixed]
    assert all("memory does not hold more slots: 2 at once from then on" in str(text) for text in warnings)


def test_memory_that_linux_refuses_makes_passes_smaller(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error is made up: of a slot's GiB in a pass the process may have two and a half, and torch asks Linux."""
    want, losses, gib = alone(*mixed), Pack._losses, 2**30
    passes.clear()

    def large(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        activations = torch.empty(len(shares) * gib, dtype=torch.uint8)  # pages that nobody writes to take nothing
        found = losses(pack, shares, *rest)
        assert len(activations)
        return found

    monkeypatch.setattr(Pack, "_losses", large)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (read_kib(Path("/proc/self/status"), "VmSize") + 5 * gib // 2, before[1]))
    try:
        packed = serve(Inbox(*mixed), 4, "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

    assert passes[:4] == [4, 3, 2, 2]
    assert (packed.slots, packed.limits) == ([2], [2])
    for trial in mixed:
        check_equal(packed, want, trial)


def test_a_host_knows_what_its_last_life_found_of_memory(
    base: Base, ranks: Ranks, mixed: list[TrialSpec], tmp_path: Path, alone: Alone, passes: list[int]
) -> None:
    want = alone(*mixed)
    passes.clear()
    inbox = Inbox(*mixed)
    Host(base, ranks, inbox, str(tmp_path), "h0", 4, limit=2).serve()
    assert max(passes) == 2
    assert inbox.slots == [], "the sweep knows it"
    for trial in mixed:
        check_equal(inbox, want, trial)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("held", [True, False], ids=["beside others", "by itself"])
def test_a_trial_whose_adapter_memory_does_not_hold_beside_others_waits_for_the_base(
    mixed: list[TrialSpec],
    serve: Serve,
    alone: Alone,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    held: bool,
) -> None:
    """The third adapter asks for memory that is not there when three of its layers are done: the others train on."""
    adapter = {} if kind == "lora" else {"kind": "bottleneck", "target_modules": "all-linear"}
    trials = [trial.model_copy(update={"adapter": trial.adapter.model_copy(update=adapter)}) for trial in mixed[:5]]
    third = trials[2]
    want = alone(*trials)
    passes.clear()
    where, method = {
        "lora": (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"),
        "bottleneck": (BottleneckLayer, "add"),
    }[kind]
    done, layers = getattr(where, method), list[str]()

    def full(layer: BaseTunerLayer, name: str, *given: Any, **options: Any) -> Any:
        if inbox.followed[-1] == third.trial and (name == "slot-2" or not held):
            layers.append(name)
            if len(layers) == 4 or "slot-2" not in layers[-1:]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return done(layer, name, *given, **options)

    monkeypatch.setattr(where, method, full)
    inbox = Inbox(*trials)
    serve(inbox, 3, "packed")

    assert layers[:4] == ["slot-2"] * 4
    for trial in trials:
        if held or trial is not third:
            check_equal(inbox, want, trial, weights=kind == "lora")  # a fresh bottleneck has slopes of rounding
    assert inbox.followed[2:4] == [third.trial] * 2, "no other was taken before it"
    assert end_of(inbox, third)["status"] == ("complete" if held else "failed")
    assert inbox.limits == [2], "the sweep is told"
    if held:
        assert end_of(inbox, third)["packing"]["shared"] == 0
    else:
        assert "OutOfMemoryError" in end_of(inbox, third)["cause"]
    assert max(passes) == 2


@pytest.mark.parametrize("saves", [True, False], ids=["checkpoints", "none"])
@pytest.mark.parametrize("where", ["moments", "evaluation"])
def test_a_trial_that_lacks_memory_outside_a_pass_goes_on_by_itself(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, monkeypatch: pytest.MonkeyPatch, where: str, saves: bool
) -> None:
    """Its optimizer asks for its moments in the first step, its evaluation for logits; who is beside it trains on."""
    every = {"checkpoint_every_s": 0.0} if saves else {}
    trials = [trial.model_copy(update={"train": trial.train.model_copy(update=every)}) for trial in mixed[:5]]
    first = trials[0]
    want, asked = alone(*trials), list[int]()
    cls, method, turn = {
        "moments": (torch.optim.AdamW, "_init_group", 1),
        "evaluation": (Evaluator, "_predict_part", 2),
    }[where]
    done = getattr(cls, method)

    def full(self: Any, *given: Any, **options: Any) -> Any:
        asked.append(len(given))
        if len(asked) == turn:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return done(self, *given, **options)

    monkeypatch.setattr(cls, method, full)
    packed = serve(Inbox(*trials), 3, "packed")

    assert (packed.slots, packed.limits) == ([2], [2])
    assert packed.followed.count(first.trial) == 2
    assert packed.followed.index(trials[3].trial) == 4, "it goes before those that have not begun"
    for trial in trials[1:]:
        check_equal(packed, want, trial)
    check_numbers(end_of(packed, first), end_of(want, first))
    check_end(end_of(packed, first), end_of(want, first))
    for name in ("loss", "score"):
        mine, other = (
            {row["step"]: row[name] for row in inbox.rows_of(first.trial) if name in row and row["kind"] != "end"}
            for inbox in (packed, want)
        )
        assert mine == pytest.approx(other, rel=1e-6)


def test_a_trial_that_memory_does_not_hold_alone_fails(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Pack._losses

    def full(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if any(share.batch.rows > 3 for share in shares):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(pack, shares, *rest)

    small = mixed[5]
    want = alone(small)
    monkeypatch.setattr(Pack, "_losses", full)
    packed = serve(Inbox(mixed[0], small), 2, "packed")
    assert end_of(packed, mixed[0])["status"] == "failed"
    assert "OutOfMemoryError" in end_of(packed, mixed[0])["cause"]
    check_equal(packed, want, small)


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
    assert len(left) == 2, "beside the others, and by itself"
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
    mixed: list[TrialSpec],
    base: Base,
    single: Base,
    serve: Serve,
    alone: Alone,
    passes: list[int],
    lonely: dict[str, dict[str, Any]],
    place: int,
) -> None:
    on, looser = (single, 100) if "train" in lonely else (base, 1)  # DeepSpeed shares out nothing of float64
    others = [mixed[0], mixed[1], mixed[2]]
    ((section, leaves),) = lonely.items()
    changed = mixed[0].model_copy(
        update={"trial": "lonely", section: getattr(mixed[0], section).model_copy(update=leaves)}
    )
    trials = [*others[:place], changed, *others[place:]]
    want = alone(*trials, base=on)
    passes.clear()
    packed = serve(Inbox(*trials), 3, "packed", on)

    for trial in trials:
        check_equal(packed, want, trial, looser)
    assert ended(packed).index("lonely") == place, "nobody is taken before it, and nobody beside it"
    assert max(passes) == (3 if place == 0 else 2)


def test_heads_of_other_shapes_wait_for_the_base(
    tiny_models: dict[str, Path], tiny_data: Path, serve: Serve, alone: Alone, passes: list[int]
) -> None:
    """Two classes, three, one value: whoever has the head of those before them is taken beside them."""
    bert = load_base(str(tiny_models["dry-bert"]), "bert")
    bert.model.double()
    how = {"deft__alpha": 1.0, "deft__epsilon": 1e-2}
    trials = [
        tiny_trial(tiny_models["dry-bert"], "bert", tiny_data, task, trial=f"b{place}", **how)
        for place, task in enumerate(("sst2", "mrpc", "mnli", "stsb", "rte", "qnli"))
    ]
    want = alone(*trials, base=bert)
    passes.clear()
    packed = serve(Inbox(*trials), 3, "packed", bert)

    for trial in trials:
        check_equal(packed, want, trial)
    assert passes == [2] * 4 + [1] * 4 + [1] * 4 + [2] * 4
    assert ended(packed)[2:] == ["b2", "b3", "b4", "b5"]


def test_a_suspect_has_the_host_to_itself(mixed: list[TrialSpec], serve: Serve, passes: list[int]) -> None:
    """As one of those that lost their host again and again may be the cause."""
    suspect = Taken(mixed[1], attempt=3, apart=True)
    inbox = serve(Inbox(mixed[0], suspect, mixed[2], mixed[5]), 4)
    assert ended(inbox)[:2] == [mixed[0].trial, mixed[1].trial]
    assert passes[: 6 + 4] == [1] * 10
    assert max(passes) == 2


@pytest.mark.parametrize("kill_at", [5, 9, 14])
def test_killed_in_the_middle_of_a_pack_every_trial_ends_as_undisturbed(
    mixed: list[TrialSpec], serve: Serve, alone: Alone, kill_at: int
) -> None:
    """With its losses, scores, layer scales and adapter; the last of the four has layer scales."""
    saving = [
        trial.model_copy(update={"train": trial.train.model_copy(update={"checkpoint_every_s": 0.0})})
        for trial in mixed[:4]
    ]
    calm = alone(*saving)
    killed = Inbox(*saving, kill_at=kill_at)
    with pytest.raises(Killed):
        serve(killed, 4, "killed")
    left = [trial for trial in saving if not any(row["kind"] == "end" for row in killed.rows_of(trial.trial))]
    again = serve(Inbox(*left), 4, "killed")

    assert len(left) >= 2
    assert saving[3] in left
    for trial in left:
        first, second = end_of(again, trial), end_of(calm, trial)
        check_numbers(first, second)
        check_end(first, second)
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


#: Slots of two workers' hosts, one after the other. In "late" tasks are loaded while others train, on worker 1 slowly;
#: in the last one worker 1's memory holds passes of two.
HOSTS = {"one": 1, "two": 2, "four": 4, "eight": 8, "late": 4, "short": 4}
#: Who is served by the last.
SHORT = ("plain", "parts", "question", "scaled")


def work(rank: int, folder: Path, trials: list[TrialSpec]) -> None:
    """One of two workers of these hosts. Reductions are in float32, so this is too."""
    ranks = start_worker(rank, 2, folder)
    base = load_base(trials[0].model.name, "t5", quantization=trials[0].model.quantization)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(PassCost, "groups", all_in_one_pass)
    passes, share, losses = counted_slots(monkeypatch), Slot.share, Pack._losses

    def torn(slot: Slot, measure: bool) -> Share:
        if slot.trial.trial == "torn" and slot.done == 1 and not ranks.leads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return share(slot, measure)

    def short(pack: Pack, shares: Sequence[Share], *rest: Any) -> Any:
        if len(shares) > 2 and not ranks.leads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(pack, shares, *rest)

    def late(*given: Any) -> EncodedTask:
        time.sleep(0.3 * rank)
        return load_task(*given)

    monkeypatch.setattr(Slot, "share", torn)
    for name, slots in HOSTS.items():
        monkeypatch.setattr(LoadedTasks, "begin", ON_A_THREAD if name == "late" else loaded_at_once)
        monkeypatch.setattr("deft_ray.train.loading.load_task", late if name == "late" else load_task)
        if name == "short":
            monkeypatch.setattr(Pack, "_losses", short)
        passes.clear()
        served = [trial for trial in trials if name != "short" or trial.trial in SHORT]
        inbox = Inbox(*served, stops={"stopped": 2})
        Host(base, ranks, inbox, str(folder / name), "h0", slots).serve()
        assert set(inbox.followed) == {trial.trial for trial in served}
        assert ranks.leads or not inbox.sent
        torch.save((inbox.sent, inbox.slots, passes), folder / f"{name}-{rank}.pt")
    monkeypatch.undo()


@pytest.fixture(scope="module", params=["none", "nf4"])
def two_workers(
    request: pytest.FixtureRequest, mixed: list[TrialSpec], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[TrialSpec], Path]:
    """Trials, and the folder with what two workers have seen of them.

    Among them some that are stopped, diverge, cannot start, cannot share the base, and fail on one worker only.
    """

    def changed(trial: TrialSpec, name: str, **sections: dict[str, Any]) -> TrialSpec:
        train = {"learning_rate": 1e-3, **sections.pop("train", {})}
        deft = {"epsilon": 1e-2, **sections.pop("deft", {})}
        return trial.model_copy(
            update={
                "trial": name,
                "model": trial.model.model_copy(update={"quantization": request.param}),
                "train": trial.train.model_copy(update=train),
                "deft": trial.deft.model_copy(update=deft),
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
        changed(mixed[4], "question", train={"zero_stage": 2}),
        changed(mixed[3], "scaled"),
        changed(mixed[6], "scaled too", train={"batch_size": 4, "zero_stage": 2}),
        changed(mixed[2], "narrow", train={"steps": 4}),
        changed(mixed[7], "wide", train={"batch_size": 4}, deft={"epsilon": 1e-1}),
        changed(mixed[2], "sharded", train={"zero_stage": 3}),
    ]
    folder = tmp_path_factory.mktemp("workers")
    spawn(work, args=(folder, trials), nprocs=2)
    return trials, folder


def seen(folder: Path, name: str) -> tuple[Inbox, tuple[list[int], list[int]]]:
    """What a host of two workers has sent, and the passes of each of them."""
    inbox = Inbox()
    inbox.sent, inbox.slots, leading = torch.load(folder / f"{name}-0.pt", weights_only=False)
    return inbox, (leading, torch.load(folder / f"{name}-1.pt", weights_only=False)[2])


@pytest.mark.parametrize(("name", "slots"), [("two", 2), ("four", 4), ("eight", 8), ("late", None)])
def test_two_workers_with_slots_leave_what_they_leave_with_one(
    two_workers: tuple[list[TrialSpec], Path], name: str, slots: int | None
) -> None:
    trials, folder = two_workers
    one, passes_of_one = seen(folder, "one")
    several, passes = seen(folder, name)
    assert {max(each) for each in passes_of_one} == {1}
    assert slots is None or {max(each) for each in passes} == {slots}

    for trial in trials:
        if trial.trial not in ("wild", "torn"):  # the latter, for want of memory, begins again by itself
            check_equal(several, one, trial, looser=100)
    assert {trial.trial: end_of(several, trial)["status"] for trial in trials} == {
        **dict.fromkeys(
            ("plain", "parts", "question", "scaled", "scaled too", "narrow", "wide", "sharded"), "complete"
        ),
        "stopped": "stopped",
        "wild": "diverged",
        "lost": "failed",
        "torn": "failed",
    }
    assert "worker 1: OutOfMemoryError" in "".join(row.get("cause", "") for row in several.rows_of("torn"))


def test_memory_that_one_of_two_workers_lacks_makes_passes_smaller_on_both(
    two_workers: tuple[list[TrialSpec], Path],
) -> None:
    """The one has passed all four by then, the other tries three, then two; from then on two at most on both."""
    trials, folder = two_workers
    one, _ = seen(folder, "one")
    found, (leading, following) = seen(folder, "short")
    assert leading[0] == 4
    assert following[:4] == [4, 3, 2, 2]
    assert leading[1:] == following[4:]
    assert max(leading[1:]) == 2
    assert found.slots == [2], "and the sweep is told"
    for trial in trials:
        if trial.trial in SHORT:
            check_equal(found, one, trial, looser=100)
            end = end_of(found, trial)
            assert end["status"] == "complete"
            assert "memory does not hold more slots: 2 at once from then on" in end["warning"]


def lack_memory(rank: int, folder: Path, trials: list[TrialSpec]) -> None:
    """One of two workers; the second has no memory for the first evaluation, while two other trials are there."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("deft_ray.train.ranks.AGREE_TIMEOUT", timedelta(seconds=2))
    monkeypatch.setattr(PassCost, "groups", all_in_one_pass)
    monkeypatch.setattr(LoadedTasks, "begin", loaded_at_once)
    predict = Evaluator._predict_part

    def full(*given: Any, **options: Any) -> Any:
        if rank:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(*given, **options)

    monkeypatch.setattr(Evaluator, "_predict_part", full)
    ranks, inbox = start_worker(rank, 2, folder), Inbox(*trials)
    host = Host(load_base(trials[0].model.name, "t5"), ranks, inbox, str(folder), "h0", 3)
    with pytest.raises(RuntimeError, match="CUDA out of memory" if rank else "gloo/"):
        host.serve()
    torch.save((inbox.sent, inbox.slots, inbox.limits, inbox.followed), folder / f"{rank}.pt")
    monkeypatch.undo()


def test_memory_that_one_of_two_workers_lacks_for_an_evaluation_costs_the_host_and_no_trial(
    mixed: list[TrialSpec], single: Base, ranks: Ranks, passes: list[int], tmp_path: Path
) -> None:
    """The workers cannot go on together; in the host's next life there are two slots, and nobody has failed."""
    trials = mixed[:3]
    spawn(lack_memory, args=(tmp_path, trials), nprocs=2)
    leading, following = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert following == ([], [2], [2], [trial.trial for trial in trials]), "the sweep is told by the one that knows"
    assert {row["kind"] for _, row in leading[0]} == {"train"}
    assert leading[1:3] == ([], [])

    again = Inbox(*trials)
    Host(single, ranks, again, str(tmp_path / "again"), "h0", 3, limit=following[2][0]).serve()
    assert [end_of(again, trial)["status"] for trial in trials] == ["complete"] * 3
    assert max(passes) == 2
