"""Multi-objective successive halving against a slow textbook version, and across interruptions."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deft_ray.sweep.order import best, epsilon_net
from deft_ray.sweep.rungs import Arrival, Rungs
from deft_ray.sweep.tuning import asha_lets_on

Row = dict[str, Any]


def row(trial: int, rung: int = 0, score: float = 0.5, density: float = 0.5, **fields: Any) -> Row:
    named = {"task": "rte", "trial": f"t{trial:04d}", "seed": 0, "baseline": False, "rung": rung, "step": 10}
    return {**named, "score": score, "density": density, **fields}


def baseline(rung: int, score: float, seed: int = 0) -> Row:
    return row(9000 + seed, rung, score, 1.0, baseline=True, seed=seed)


# --- the textbook version ---------------------------------------------------------------------------------------------


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def textbook_order(found: list[tuple[float, float, float]]) -> list[int]:
    """Best first, of (score, density, missed): fronts peeled one by one, each spread by an ε-net."""
    left = [index for index, (_, _, missed) in enumerate(found) if missed == 0]
    scores, densities = [found[i][0] for i in left], [found[i][1] for i in left]
    ordered: list[int] = []
    while left:
        front = [i for i in left if not any(dominates(found[j][:2], found[i][:2]) for j in left)]
        left = [i for i in left if i not in front]
        where = {
            i: (
                (found[i][0] - min(scores)) / ((max(scores) - min(scores)) or 1.0),
                (found[i][1] - min(densities)) / ((max(densities) - min(densities)) or 1.0),
            )
            for i in front
        }
        chosen = [max(front, key=lambda i: (found[i][0], -found[i][1], -i))]
        while len(chosen) < len(front):
            rest = [i for i in front if i not in chosen]
            gaps = {i: min(math.dist(where[i], where[j]) for j in chosen) for i in rest}
            widest = max(gaps.values())
            chosen.append(min(i for i in rest if gaps[i] >= widest - 1e-12))
        ordered += chosen
    infeasible = [index for index, (_, _, missed) in enumerate(found) if missed > 0]
    return ordered + sorted(infeasible, key=lambda i: (found[i][2], i))


def arrival(score: float, density: float, missed: float) -> Arrival:
    return Arrival(**row(0, score=score, density=density), missed=missed, goes_on=True)


@pytest.mark.parametrize("seed", range(60))
def test_the_best_are_the_textbooks(seed: int) -> None:
    """However many are wanted; also with ties: few distinct values in every third case."""
    dice = random.Random(seed)
    digits = 1 if seed % 3 == 0 else 6
    found = [
        (
            round(dice.random(), digits),
            round(dice.random(), digits),
            dice.choice([0.0, 0.0, 0.0, round(dice.random(), 2)]),
        )
        for _ in range(dice.randint(1, 40))
    ]
    arrivals, want = [arrival(*one) for one in found], textbook_order(found)
    for count in range(len(found) + 2):
        assert sorted(best(arrivals, count)) == sorted(want[:count])


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("seed", range(10))
def test_decisions_are_the_textbooks_in_any_order_of_arrival(tmp_path: Path, seed: int, factor: float) -> None:
    dice = random.Random(seed)
    rungs = Rungs(factor, 0.05, tmp_path / "rungs.jsonl")
    for number in (0, 1, 2):
        assert rungs.arrive(**baseline(number, 0.6 + 0.1 * number))
    waiting = [(trial, 0) for trial in range(40)]
    there: dict[int, list[tuple[float, float, float]]] = {0: [], 1: [], 2: []}
    while waiting:
        trial, rung = waiting.pop(dice.randrange(len(waiting)))
        score, density = dice.random(), dice.random()
        missed = 0.6 + 0.1 * rung - score - 0.05
        there[rung].append((score, density, missed if missed > 1e-9 else 0.0))
        place = textbook_order(there[rung]).index(len(there[rung]) - 1)
        want = place < max(1, math.floor(len(there[rung]) / factor))
        assert rungs.arrive(**row(trial, rung, score, density)) == want
        if want and rung < 2:
            waiting.append((trial, rung + 1))


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [0, 1, 7, 19, 39])
def test_a_killed_run_decides_as_one_that_was_not(tmp_path: Path, killed_after: int) -> None:
    """Killed after so many arrivals, in the middle of writing the next; the last arrival comes again."""
    dice = random.Random(3)
    rows = [row(n, n % 2, dice.random(), dice.random(), task=dice.choice(["rte", "cola"])) for n in range(40)]
    whole = Rungs(3.0, None, tmp_path / "whole.jsonl")
    want = [whole.arrive(**one) for one in rows]

    cut = tmp_path / "cut.jsonl"
    first = Rungs(3.0, None, cut)
    got = [first.arrive(**one) for one in rows[:killed_after]]
    with cut.open("a") as file:
        file.write('{"task": "rte", "tri')
    second = Rungs(3.0, None, cut)
    if killed_after:
        again = {**rows[killed_after - 1], "score": 0.0}  # measured again after the resume, a little otherwise
        assert second.arrive(**again) == got[-1]
    got += [second.arrive(**one) for one in rows[killed_after:]]

    assert got == want
    assert [json.loads(line) for line in cut.read_text().splitlines()] == [
        json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()
    ]


# --- what counts ------------------------------------------------------------------------------------------------------


def test_the_limit_is_that_of_the_same_rung_and_seed(tmp_path: Path) -> None:
    """At the first rung 0.55 is within 0.02 of the baseline's 0.56, at the second not of its 0.9."""
    rungs = Rungs(2.0, 0.02, tmp_path / "rungs.jsonl")
    for number, score in ((0, 0.56), (1, 0.9)):
        rungs.arrive(**baseline(number, score))
        rungs.arrive(**baseline(number, 0.1, seed=1))
    rungs.arrive(**row(1, 0, 0.70, 0.99))
    rungs.arrive(**row(2, 0, 0.55, 0.10))
    assert rungs.arrive(**row(1, 1, 0.95, 0.99))
    assert not rungs.arrive(**row(2, 1, 0.55, 0.10)), "the density would be the best"
    assert not rungs.arrive(**row(3, 1, 0.80, 0.05))
    missed = [json.loads(line)["missed"] for line in (tmp_path / "rungs.jsonl").read_text().splitlines()]
    assert missed[4:] == [0.0, 0.0, 0.0, pytest.approx(0.33), pytest.approx(0.08)]


def test_the_limit_is_wider_where_the_baseline_has_not_learnt_yet(tmp_path: Path) -> None:
    """The baseline ends at 0.9: at 0.5 it lacks 0.4 of it, at 0.8 still 0.1, at 0.95 nothing."""
    ended = {("rte", 0): 0.9, ("rte", 1): 0.1}
    rungs = Rungs(2.0, 0.02, tmp_path / "rungs.jsonl", baseline_score=lambda task, seed: ended.get((task, seed)))
    for number, score in ((0, 0.5), (1, 0.8), (2, 0.95)):
        rungs.arrive(**baseline(number, score))
        for trial, below in ((1, 0.01), (2, 0.10), (3, 0.50)):
            rungs.arrive(**row(10 * number + trial, number, score - below, 0.5))
    missed = [json.loads(line)["missed"] for line in (tmp_path / "rungs.jsonl").read_text().splitlines()]
    wanted = [[0, 0, 0, 0.08], [0, 0, 0, 0.38], [0, 0, 0.08, 0.48]]
    assert missed == pytest.approx([value for there in wanted for value in there])


def test_baselines_and_other_tasks_are_no_company(tmp_path: Path) -> None:
    rungs = Rungs(2.0, None, tmp_path / "rungs.jsonl")
    assert rungs.arrive(**row(1, 0, 0.9, 0.1))
    assert rungs.arrive(**baseline(0, 0.0)), "never stopped"
    assert rungs.arrive(**row(2, 0, 0.1, 0.9, task="cola"))
    assert not rungs.arrive(**row(3, 0, 0.1, 0.9))


def test_the_net_spreads() -> None:
    line = np.array([[x, 1.0 - x] for x in np.linspace(0.0, 1.0, 9)])
    assert list(epsilon_net(line))[:3] == [0, 8, 4]
    assert sorted(epsilon_net(line)) == list(range(9))
    assert list(epsilon_net(np.zeros((4, 2)))) == [0, 1, 2, 3]


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 4.0])
def test_ray_s_asha_lets_on_who_reaches_the_quantile_of_the_scores_before_it(tmp_path: Path, factor: float) -> None:
    """Whatever the density; after a resume as before it."""
    dice = random.Random(str(factor))
    scores = [round(dice.random(), 2) for _ in range(40)]
    rungs = Rungs(factor, None, tmp_path / "rungs.jsonl", asha_lets_on)
    for number, score in enumerate(scores):
        if number == 20:
            rungs = Rungs(factor, None, tmp_path / "rungs.jsonl", asha_lets_on)
        before = sorted(scores[:number])
        got = rungs.arrive(
            task="t", trial=f"t{number}", seed=0, baseline=False, rung=0, step=1, score=score, density=dice.random()
        )
        assert got == (not before or score >= quantile(before, 1 - 1 / factor)), number


def quantile(values: list[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
