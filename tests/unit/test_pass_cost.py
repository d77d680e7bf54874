"""Which slots share a pass: the cheapest split, against all splits, for costs that are known."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence

import pytest

from deft_ray.train.cost import EVALUATED, PROBED, RETRIED, TRIED, WORTH, PassCost, Room, Size, tokens_of


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
    cost.groups(sizes)
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


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize(("fixed", "each"), [(1.0, 0.0), (0.0, 1e-3), (0.02, 1e-3), (0.3, 1e-3), (2.0, 1e-3)])
def test_slots_are_as_few_as_cost_hardly_more_than_the_most(fixed: float, each: float, most: int) -> None:
    cost, size = taught(fixed, each, random.Random(1)), Size(8, 30, 3)
    mine = {count: fixed / count + each * 8 * 33 for count in range(1, most + 1)}
    found = cost.slots_worth(most)
    # batches of other lengths taught it, so its idea of a slot's tokens is another: a slot more or less
    worth = [count for count in mine if mine[count] <= (1 + WORTH) * mine[most]]
    assert abs(found - worth[0]) <= 1
    assert 1 <= found <= most
    assert cost.alone_s(size) == pytest.approx(fixed + each * 8 * 33, rel=1e-6)


def test_two_slots_are_had_before_anything_is_known() -> None:
    cost = PassCost()
    assert [cost.slots_worth(most) for most in (1, 2, 8)] == [1, 2, 2]
    assert cost.alone_s(Size(8, 30, 3)) is None


def test_where_sharing_saves_nothing_one_slot_is_enough_and_where_it_saves_most_nearly_all_are_had() -> None:
    """A seventh of a pass is within a fifth of an eighth."""
    assert taught(0.0, 1e-3, random.Random(0), noise=0.02).slots_worth(8) == 1
    assert [taught(1.0, 0.0, random.Random(0), noise=0.02).slots_worth(most) for most in (4, 8)] == [4, 7]


def test_where_one_slot_was_enough_two_are_tried_again_later() -> None:
    """The first passes told that a pass costs nothing but its tokens; on this machine it costs a second, whatever."""
    cost, size = taught(0.0, 1e-3, random.Random(0), noise=0.02), Size(8, 30, 2)
    for _ in range(RETRIED):
        assert cost.slots_worth(8) == 1
        turn(cost, [size], 1.0, 0.0)
    assert cost.slots_worth(8) == 2
    assert cost.alone_s(size) is None
    for _ in range(2 * TRIED + 1):
        turn(cost, [size, size], 1.0, 0.0)
    assert cost.slots_worth(8) == 7
    assert cost.alone_s(size) == pytest.approx(1.0)


def test_what_was_learnt_stays_while_others_are_there_now_and_then() -> None:
    cost, size = taught(1.0, 0.0, random.Random(0)), Size(8, 30, 2)
    for _ in range(3):
        for _ in range(RETRIED - 1):
            turn(cost, [size], 1.0, 0.0)
        turn(cost, [size, size], 1.0, 0.0)
    assert cost.slots_worth(8) == 7


def turn(cost: PassCost, sizes: Sequence[Size], fixed: float, each: float) -> list[list[int]]:
    cost.begin_turn()
    groups = cost.groups(sizes)
    for group in groups:
        mine = [sizes[place] for place in group]
        cost.add(mine, fixed + each * tokens_of(mine))
    return groups


@pytest.mark.parametrize(("fixed", "each"), [(1.0, 1e-3), (0.02, 1e-3), (0.0, 1e-3)])
def test_an_evaluation_gets_the_tokens_of_so_much_training_as_a_turn_takes_and_more_than_half_again(
    fixed: float, each: float
) -> None:
    cost, sizes = PassCost(), [Size(8, 30, 2), Size(4, 60, 2)]
    assert cost.room() is None
    turn(cost, sizes, fixed, each)
    assert room_of(cost).tokens() == int(EVALUATED * (8 * 32 + 4 * 62)), (
        "of two passes; what a token costs is not known yet"
    )
    for _ in range(4 * TRIED):
        groups = turn(cost, sizes, fixed, each)
    turn_s, room = seconds_of(groups, sizes, fixed, each), room_of(cost)
    assert (fixed + each * room.tokens()) / EVALUATED == pytest.approx(turn_s, abs=each)
    for tokens in (4, 400):
        passes = room.passes(tokens)
        spent, more = ((count * (fixed + each * tokens)) / EVALUATED for count in (passes, passes + 1))
        assert spent <= turn_s * (1 + 1e-9) < more or passes == 1
    turn(cost, sizes[:1], fixed, each)
    assert (fixed + each * room_of(cost).tokens()) / EVALUATED == pytest.approx(fixed + each * 8 * 32, abs=each)
    cost.begin_turn()
    assert (fixed + each * room_of(cost).tokens()) / EVALUATED == pytest.approx(fixed + each * 8 * 32, abs=each), (
        "none passed"
    )


def test_an_evaluation_has_no_limit_where_tokens_cost_nothing() -> None:
    cost, sizes = PassCost(), [Size(8, 30, 2), Size(4, 60, 2)]
    for _ in range(4 * TRIED):
        turn(cost, sizes, 1.0, 0.0)
    assert (room_of(cost).tokens(), room_of(cost).passes(10**9)) == (sys.maxsize, 1)


def room_of(cost: PassCost) -> Room:
    room = cost.room()
    assert room is not None
    return room


def test_now_and_then_each_slot_passes_alone() -> None:
    cost, sizes = PassCost(), [Size(8, 30, 2), Size(8, 20, 2), Size(8, 25, 2)]
    split = [turn(cost, sizes, 1.0, 1e-4) for _ in range(3 * PROBED + 2 * TRIED)]
    probed = [number for number, groups in enumerate(split, start=1) if len(groups) > 1 and number > 2 * TRIED]
    assert probed == [PROBED, 2 * PROBED, 3 * PROBED]
    assert [split[number - 1] for number in probed] == [[[1], [0, 2]], [[2], [0, 1]], [[0], [1, 2]]]


def test_what_passes_cost_now_counts_not_what_they_cost_once() -> None:
    """The machine has something else to do: at first every pass has a second more."""
    cost, sizes = PassCost(), [Size(8, 30, 2), Size(8, 20, 2)]
    for _ in range(PROBED):
        turn(cost, sizes, 1.0, 1e-3)
    for _ in range(8 * PROBED):
        turn(cost, sizes, 0.01, 1e-3)
    assert cost.alone_s(Size(8, 30, 2)) == pytest.approx(0.01 + 8 * 32e-3, rel=0.05)


def test_first_passes_of_a_host_do_not_count() -> None:
    """As everything is slow that is done for the first time: passes of its first trial, before there was a second."""
    cost, size = PassCost(), Size(8, 30, 2)
    for _ in range(5):
        cost.groups([size])
        cost.add([size], 10.0)
    assert cost.tokens_alone == tokens_of([size])
    for _ in range(2 * TRIED + 1):
        turn(cost, [size, Size(8, 20, 2)], 0.01, 1e-3)
    assert cost.alone_s(size) == pytest.approx(0.01 + 8 * 32e-3, rel=1e-6)
