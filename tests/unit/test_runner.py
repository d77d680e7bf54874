"""What the sweep's loop asks for while hosts find out how many trials they take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deft_ray.sweep.runner import _Sweep
from deft_ray.sweep.schedule import Nothing


def sweep_of(slots: int | None, under_way: int) -> Any:
    """A sweep in the middle, as far as it matters here."""
    sweep: Any = _Sweep.__new__(_Sweep)
    sweep.failure = sweep.spent = sweep.stalled = None
    sweep._slots = slots
    sweep._check_budget = lambda: None
    sweep.books = SimpleNamespace(misplaced_reference=list, live=SimpleNamespace(slots=0))
    sweep.schedule = SimpleNamespace(
        under_way=under_way,
        next=lambda *, beside_baselines: "a trial" if beside_baselines else None,
        next_baseline=lambda: "a baseline",
    )
    return sweep


@pytest.mark.parametrize(
    ("slots", "under_way", "answer"),
    [(2, 0, "a trial"), (2, 2, "a trial"), (2, 3, Nothing.YET), (5, 5, "a trial"), (None, 99, "a trial")],
)
def test_one_trial_more_is_asked_for_than_hosts_take(slots: int | None, under_way: int, answer: Any) -> None:
    """So that a sampler knows as many results as it can; where the number was given, Tune keeps it."""
    assert sweep_of(slots, under_way)._next_trial() == answer


def test_a_spent_budget_leaves_baselines_and_nothing_beside_them() -> None:
    sweep = sweep_of(2, 0)
    sweep.spent = "budget.steps = 1 is spent"
    assert sweep._next_trial() == "a baseline"


def test_hosts_that_have_not_told_take_one() -> None:
    sweep = sweep_of(3, 0)
    sweep._look_at_slots({"host-0": 4}, 3)
    assert sweep._slots == sweep.books.live.slots == 4 + 2
    given = sweep_of(None, 0)
    given._look_at_slots({"host-0": 4}, 3)
    assert given._slots is None
