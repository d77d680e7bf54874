"""Paths: points that train on from the one before them, at rising α."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.models.base import Base
from deft_ray.results.records import Record
from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan, format_plan
from deft_ray.spec.points import count_points, first_points
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.schedule import Nothing, Schedule
from deft_ray.train.host import Host
from deft_ray.train.loading import load_task
from deft_ray.train.random_state import Draws, seeded
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.searches import made_up, run_into
from tests.slots import run, weights
from tests.tiny import tiny_trial
from tests.unit.test_host import Inbox, Killed, numbers

ALPHA = {"loguniform": [0.01, 10.0]}


def tree(alpha: Any = ALPHA, **search: Any) -> dict[str, Any]:
    return {
        "name": "s",
        "data": {"tasks": ["nano-sentiment", "nano-entailment"]},
        "deft": {"alpha": alpha},
        "train": {"steps": 40},
        "search": {"path": "alpha", "trials": 4, **search},
    }


def spec_of(**search: Any) -> SweepSpec:
    spec, faults = check_tree(tree(**search))
    assert spec is not None, faults
    return spec


# --- points and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "want"),
    [
        (ALPHA, [0.01, 0.1, 1.0, 10.0]),
        ({"uniform": [1.0, 4.0]}, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_alpha_rises_evenly_over_its_range(alpha: Any, want: list[float]) -> None:
    spec = spec_of(alpha=alpha)
    assert [point["deft.alpha"] for point in first_points(spec)] == pytest.approx(want)
    assert all(point["deft.alpha"] in spec.space["deft.alpha"] for point in first_points(spec))
    assert count_points(spec) == 4


def test_a_choice_is_taken_in_order_and_whole() -> None:
    spec, faults = check_tree({**tree({"choice": [1.0, 0.1, 3.0]}), "search": {"path": "alpha"}})
    assert spec is not None, faults
    assert first_points(spec) == [{"deft.alpha": alpha} for alpha in (0.1, 1.0, 3.0)]
    assert count_points(spec) == 3


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        ({"deft": {"alpha": 1.0}}, ("search", "path"), "needs deft.alpha as the only leaf"),
        (
            {"deft": {"alpha": ALPHA, "epsilon": {"choice": [1e-7, 1e-5]}}},
            ("search", "path"),
            "deft.alpha, deft.epsilon",
        ),
        ({"deft": {"alpha": {"uniform": [0.0, 1.0]}}}, ("deft", "alpha"), "must be above 0 on a path"),
        ({"deft": {"alpha": {"randint": [1, 5]}}}, ("deft", "alpha"), "is no range of whole numbers on a path"),
        ({"deft": {"alpha": ALPHA, "alpha_delay": 0.5}}, ("deft", "alpha_delay"), "begin anew at each point"),
        ({"deft": {"alpha": ALPHA, "epsilon_end": 1e-9}}, ("deft", "epsilon_end"), "begin anew at each point"),
        ({"budget": {"stall_trials": 3}}, ("budget", "stall_trials"), "would end a path at its beginning"),
        ({"search": {"path": "beta"}}, ("search", "path"), "alpha"),
        ({"search": {"path": "alpha", "path_share": 0.0}}, ("search", "path_share"), "got 0.0"),
        ({"search": {"path_share": 0.5}}, ("search", "path_share"), "needs search.path: alpha"),
        ({"search": {"path": "alpha", "sampler": "tpe"}}, ("search", "sampler"), "means nothing on a path"),
        ({"search": {"path": "alpha", "scheduler": "mo_asha"}}, ("search", "scheduler"), "means nothing on a path"),
        ({"search": {"path": "alpha", "front_seeds": 3}}, ("search", "front_seeds"), "means nothing on a path"),
        ({"search": {"path": "alpha", "warm_start": ["tasks"]}}, ("search", "warm_start"), "means nothing on a path"),
        (
            {"search": {"path": "alpha", "try_first": [{"deft.alpha": 1.0}]}},
            ("search", "try_first"),
            "means nothing on a path",
        ),
        (
            {"deft": {"alpha": {"choice": [0.1, 1.0]}}, "search": {"path": "alpha", "trials": 5}},
            ("search", "trials"),
            "a path has each of its values once",
        ),
    ],
)
def test_what_a_path_cannot_be(change: dict[str, Any], path: tuple[str, ...], said: str) -> None:
    spec, faults = check_tree({**tree(), **change})
    assert spec is None
    assert [fault[0] for fault in faults] == [path]
    assert said in faults[0][1]


def test_a_path_of_shares_that_do_not_divide_goes_on_where_the_data_ended(tmp_path: Path) -> None:
    done = run_into([], Schedule(spec_of(path_share=0.33), tmp_path, []), fate)
    mine = [t for t in done if t.task == "nano-sentiment" and not t.baseline]
    assert [(t.steps_before, t.train.steps) for t in mine] == [(40, 13), (53, 13), (66, 13), (79, 13)]


def test_the_plan_counts_the_shorter_trials() -> None:
    text = format_plan(build_plan(spec_of(path_share=0.25, seeds=[0, 1]), "out", Machine(2, 0)))
    assert "20 = 4 baselines + 16 on paths of rising α, 40 steps each, on a path 0.25 of that" in text
    assert f"{4 * 40 + 16 * 10} in all" in text
    many = spec_of(path_share=0.25)
    hosts = many.model_copy(update={"resources": many.resources.model_copy(update={"hosts": 8})})
    assert "2 trials at once" in format_plan(build_plan(hosts, "out", Machine(8, 0))), "two tasks, two paths"


# --- the order of trials ----------------------------------------------------------------------------------------------


def fate(trial: TrialSpec) -> Record:
    """The second point of seed 5 diverges."""
    lost = trial.seed == 5 and math.isclose(trial.deft.alpha, 0.1)
    return made_up(trial, 0.9, 0.5, "diverged" if lost else "complete")


def test_each_point_goes_on_from_the_last_one_that_is_complete(tmp_path: Path) -> None:
    done = run_into([], Schedule(spec_of(seeds=[0, 5]), tmp_path, []), fate)
    baselines = {(t.task, t.seed): t.trial for t in done if t.baseline}
    for (task, seed), baseline in baselines.items():
        mine = [t for t in done if (t.task, t.seed) == (task, seed) and not t.baseline]
        assert [t.deft.alpha for t in mine] == pytest.approx([0.01, 0.1, 1.0, 10.0])
        ids = [t.trial for t in mine]
        assert [t.start_from for t in mine] == [baseline, ids[0], ids[0] if seed == 5 else ids[1], ids[2]]
        assert [t.train.steps for t in mine] == [10] * 4
        assert [t.steps_before for t in mine] == [40, 50, 60, 70]
    assert all((t.start_from, t.steps_before, t.train.steps) == ("", 0, 40) for t in done if t.baseline)


def test_a_point_waits_for_the_one_before_it(tmp_path: Path) -> None:
    schedule = Schedule(spec_of(), tmp_path, [])
    running = [schedule.next(), schedule.next()]
    assert schedule.next() is Nothing.YET
    for trial in running:
        assert isinstance(trial, TrialSpec)
        schedule.ended(fate(trial))
    first, second = schedule.next(), schedule.next()
    assert isinstance(first, TrialSpec)
    assert isinstance(second, TrialSpec)
    assert {first.task, second.task} == {"nano-sentiment", "nano-entailment"}
    assert schedule.next() is Nothing.YET, "both paths wait for their first point"
    schedule.ended(fate(second))
    third = schedule.next()
    assert isinstance(third, TrialSpec)
    assert (third.task, third.start_from) == (second.task, second.trial)


@pytest.mark.parametrize("killed_after", [1, 3, 6])
def test_a_killed_path_goes_on_as_if_it_had_not_been(tmp_path: Path, killed_after: int) -> None:
    whole = run_into([], Schedule(spec_of(), tmp_path / "whole", []), fate)
    records: list[Record] = []
    first = run_into(records, Schedule(spec_of(), tmp_path / "cut", []), fate, killed_after)
    rest = run_into(records, Schedule(spec_of(), tmp_path / "cut", records), fate)
    assert first + rest == whole


def test_epochs_are_shortened_as_steps_are(tmp_path: Path) -> None:
    spec, faults = check_tree({**tree(), "train": {"epochs": 2.0}})
    assert spec is not None, faults
    done = run_into([], Schedule(spec, tmp_path, []), fate)
    assert {(t.baseline, t.train.epochs) for t in done} == {(True, 2.0), (False, 0.5)}
    assert sorted({(t.epochs_before, t.steps_before) for t in done}) == [
        (0.0, 0),
        (2.0, 0),
        (2.5, 0),
        (3.0, 0),
        (3.5, 0),
    ]


# --- training on ------------------------------------------------------------------------------------------------------

Trial = Callable[..., TrialSpec]
BaseOf = Callable[[TrialSpec], Base]


@pytest.fixture
def trial(tiny_models: dict[str, Path], tiny_data: Path) -> Trial:
    def make(model: str, task: str = "mrpc", **leaves: Any) -> TrialSpec:
        return tiny_trial(tiny_models[model], model.split("-")[-1], tiny_data, task, **leaves)

    return make


def open_from(spec: TrialSpec, base: Base, ranks: Ranks, start: Path | None = None) -> Slot:
    return Slot(spec, base, load_task(spec.task, spec.data, base), ranks, start)


def drop_alike(slot: Slot) -> None:
    """BERT's dropout, from here on."""
    with seeded(1):
        slot.seat.draws = Draws()


KINDS = {
    "lora": {},
    "bottleneck": {},
    "prefix": {"adapter__virtual_tokens": 4},
    "prompt": {"adapter__virtual_tokens": 4},
}


@pytest.mark.parametrize("model", ["dry-t5", "bert"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_with_the_weights_and_the_data_where_it_ended(
    trial: Trial, base_of: BaseOf, ranks: Ranks, tmp_path: Path, model: str, kind: str, stage: int
) -> None:
    """The first step of the second trial has the loss of the next step of the first one."""
    leaves = {"adapter__kind": kind, "train__zero_stage": stage, "train__steps": 4, **KINDS[kind]}
    spec = trial(model, deft__alpha=0.0, **leaves)
    base = base_of(spec)
    first = open_from(spec, base, ranks)
    run(first)
    with first.whole():
        first.save_adapter(tmp_path)
        ended = weights(first.model)
    counts = first.evaluate().counts.rows
    drop_alike(first)
    wanted = first.step().task_loss
    first.close()

    onward = trial(model, deft__alpha=1.0, start_from="t0000", steps_before=4, **{**leaves, "train__steps": 2})
    second = open_from(onward, base, ranks, tmp_path)
    with second.whole():
        found = weights(second.model)
        assert found.keys() == ended.keys()
        assert all(torch.equal(found[name], value) for name, value in ended.items())
    assert torch.equal(second.evaluate().counts.rows, counts)
    drop_alike(second)
    assert second.step().task_loss == pytest.approx(wanted, rel=1e-6)
    second.close()


def test_layer_scales_go_on_too(trial: Trial, base_of: BaseOf, ranks: Ranks, tmp_path: Path) -> None:
    spec = trial("dry-t5", deft__adaptive=True, deft__alpha=1.0, train__steps=3)
    base = base_of(spec)
    first = open_from(spec, base, ranks)
    run(first)
    first.save_adapter(tmp_path)
    ended = first.lambdas()
    first.close()
    second = open_from(spec.model_copy(update={"seed": 9}), base, ranks, tmp_path)
    assert second.lambdas() == pytest.approx(ended)
    second.close()


def test_an_adapter_of_another_size_is_refused(trial: Trial, base_of: BaseOf, ranks: Ranks, tmp_path: Path) -> None:
    spec = trial("bert")
    base = base_of(spec)
    first = open_from(spec, base, ranks)
    first.save_adapter(tmp_path)
    first.close()
    with pytest.raises(ValueError, match=r"is no adapter of this kind: (lacks|has)"):
        open_from(trial("bert", adapter__kind="bottleneck"), base, ranks, tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"adapter|size"):
        open_from(trial("bert", adapter__r=2), base, ranks, tmp_path)
    open_from(spec, base, ranks).close()  # the base is as it was


def test_a_host_goes_on_from_what_another_trial_left(
    trial: Trial, base_of: BaseOf, ranks: Ranks, tmp_path: Path
) -> None:
    """Killed in the middle it goes on from its own checkpoint, and ends as the undisturbed one."""
    leaves = {"train__steps": 4, "train__checkpoint_every_s": 0.0, "deft__alpha": 1.0}
    before = trial("bert", trial="t0000", **{**leaves, "deft__alpha": 0.0})
    base = base_of(before)

    def serve(inbox: Inbox) -> list[dict[str, Any]]:
        Host(base, ranks, inbox, str(tmp_path), "h0").serve()
        return inbox.rows

    serve(Inbox(before))
    onward = {"start_from": "t0000", "steps_before": 4, **leaves}
    calm = serve(Inbox(trial("bert", trial="t0001", **onward)))
    with pytest.raises(Killed):
        serve(Inbox(trial("bert", trial="t0002", **onward), kill_at=3))
    rows = serve(Inbox(trial("bert", trial="t0002", **onward)))
    assert rows[-1]["status"] == "complete"
    assert numbers(rows[-1]) == numbers(calm[-1])
    fresh = serve(Inbox(trial("bert", trial="t0003", **leaves)))
    assert numbers(fresh[-1]) != numbers(calm[-1])
    lost = serve(Inbox(trial("bert", trial="t0004", **{**onward, "start_from": "t0099"})))
    assert lost[-1]["status"] == "failed"
    assert "t0099" in lost[-1]["cause"]
