"""Which slots share a pass: the cheapest split, against all splits, for costs that are known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from deft_ray.train.cost import TRIED, PassCost, Size, tokens_of


def splits(places: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to split places into groups."""
    if not places:
        yield []
        return
    first, rest = places[0], places[1:]
    for count in range(len(rest) + 1):
        for others in itertools.combinations(rest, count):
            left = [place for place in rest if place not in others]
            for split in splits(left):
                yield [[first, *others], *split]


def seconds_of(split: Sequence[Sequence[int]], sizes: Sequence[Size], fixed: float, each: float) -> float:
    return sum(fixed + each * tokens_of([sizes[place] for place in group]) for group in split)


def taught(fixed: float, each: float, dice: random.Random, noise: float = 0.0) -> PassCost:
    """A cost that has seen passes of such a machine."""
    cost = PassCost()
    for turn in range(2 * TRIED):
        sizes = [Size(8, dice.randint(5, 60), dice.randint(1, 5)) for _ in range(4)]
        groups = cost.groups(sizes)
        assert groups == ([[0, 1, 2, 3]] if turn % 2 else [[0], [1], [2], [3]]), "both are tried first, by turns"
        for group in groups:
            mine = [sizes[place] for place in group]
            cost.add(mine, seconds_of([range(len(mine))], mine, fixed, each) * (1 + noise * dice.random()))
    return cost


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("fixed", "each"), [(1.0, 0.0), (0.0, 1e-3), (0.01, 1e-3), (0.3, 1e-3), (0.1, 1e-3)])
def test_answers_of_one_length_are_split_as_cheaply_as_can_be(seed: int, fixed: float, each: float) -> None:
    dice = random.Random(seed)
    cost = taught(fixed, each, dice)
    sizes = [Size(8, dice.randint(5, 60), 2) for _ in range(6)]
    got = cost.groups(sizes)

    assert sorted(place for group in got for place in group) == list(range(6))
    best = min(seconds_of(split, sizes, fixed, each) for split in splits(range(6)))
    assert seconds_of(got, sizes, fixed, each) == pytest.approx(best, rel=1e-6)


def test_what_tokens_cost_is_found_through_noise() -> None:
    """Passes take up to a fifth longer than they should; one was held up for ten times as long."""
    cost = taught(0.02, 1e-3, random.Random(0), noise=0.2)
    cost.add([Size(8, 30, 2)], 10 * (0.02 + 8 * 32e-3))
    short, long = Size(8, 10, 2), Size(8, 60, 2)
    assert cost.groups([short, long, short, long]) == [[0, 2], [1, 3]]


def test_a_pass_that_costs_whatever_is_in_it_is_shared() -> None:
    cost = taught(1.0, 1e-6, random.Random(0), noise=0.2)
    assert cost.groups([Size(8, 10, 2), Size(8, 60, 2), Size(1, 5, 1)]) == [[0, 1, 2]]


def test_one_slot_is_one_pass_and_none_is_none() -> None:
    cost = PassCost()
    assert cost.groups([Size(8, 10, 2)]) == [[0]]
    assert cost.groups([]) == []


def test_where_no_pass_has_gone_through_nothing_is_known() -> None:
    cost, sizes = PassCost(), [Size(8, 10, 2), Size(8, 60, 2)]
    assert [cost.groups(sizes) for _ in range(4 * TRIED)][2 * TRIED :] == [[[0, 1]]] * 2 * TRIED
