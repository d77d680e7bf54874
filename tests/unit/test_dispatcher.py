"""The dispatcher without Ray: what it remembers of hosts that have ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deft_ray.sweep.dispatcher import Dispatcher


def test_a_host_s_cause_outlives_its_orderly_end() -> None:
    """A worker says why the model cannot be loaded; then its Train run ends without an error, and says nothing."""

    async def end() -> dict[str, str | None]:
        dispatcher = Dispatcher()
        await dispatcher.host_ended("host-0", "model.name: x cannot be loaded")
        await dispatcher.host_ended("host-0", None)
        await dispatcher.host_ended("host-1", None)
        return await dispatcher.hosts_ended()

    assert asyncio.run(end()) == {"host-0": "model.name: x cannot be loaded", "host-1": None}


def test_what_hosts_take_at_once_is_the_last_that_they_said() -> None:
    async def tell() -> dict[str, int]:
        dispatcher = Dispatcher()
        assert await dispatcher.slots() == {}
        for host, slots in (("host-0", 2), ("host-1", 4), ("host-0", 7)):
            await dispatcher.has_slots(host, slots, None)
        return await dispatcher.slots()

    assert asyncio.run(tell()) == {"host-0": 7, "host-1": 4}


def test_what_a_hosts_memory_held_is_known_in_its_next_life() -> None:
    async def tell() -> list[int | None]:
        dispatcher = Dispatcher()
        known = [await dispatcher.limit("host-0")]
        await dispatcher.has_slots("host-0", 3, 3)
        await dispatcher.release("host-0", "its workers were started anew")
        await dispatcher.has_slots("host-0", 1, None)  # as one begins that finds out what fits
        return [*known, await dispatcher.limit("host-0"), await dispatcher.limit("host-1")]

    assert asyncio.run(tell()) == [None, 3, None]


@pytest.mark.parametrize(
    ("known", "lives"), [(None, [(4, 2), (2, 1)]), (None, [(5, 2)]), (1, [(4, 1)]), (None, [(1, None)])]
)
def test_a_host_that_was_killed_for_lack_of_memory_takes_half_as_many_from_then_on(
    known: int | None, lives: list[tuple[int, int | None]]
) -> None:
    """Lives are trials that it had, and its limit in the next. A single trial says nothing of slots."""

    async def tell() -> None:
        dispatcher, life = Dispatcher(), 0
        for number in range(5):
            await dispatcher.submit(f"t{number}", "spec")
        if known is not None:
            await dispatcher.has_slots("host-0", known, known)
        for trials, limit in lives:
            for _ in range(trials):
                assert await dispatcher.claim("host-0", life, wait=False) != "wait"
            before = await dispatcher.limit("host-0")
            await dispatcher.release("host-1", "worker 0: killed", lacked_memory=True)
            assert await dispatcher.limit("host-0") == before, "another host's fault"
            await dispatcher.release("host-0", "worker 0: killed", lacked_memory=True)
            life = await dispatcher.release("host-0", "its workers were started anew")
            assert await dispatcher.limit("host-0") == limit
            assert (await dispatcher.slots()).get("host-0") == limit, "so many does Tune have on their way"
            if limit is not None:
                await dispatcher.has_slots("host-0", 8, 8)
                assert await dispatcher.limit("host-0") == limit, "the life before may have said so late"

    asyncio.run(tell())


def test_a_host_with_a_trial_leaves_the_next_to_one_without() -> None:
    """Both wait; whoever has fewer is served, and the other once there is one more."""

    async def ask() -> list[Any]:
        dispatcher = Dispatcher()
        await dispatcher.submit("a", "a")
        assert await dispatcher.claim("host-0", 0, wait=True) == ("a", 1, False)
        busy = asyncio.create_task(dispatcher.claim("host-0", 0, wait=True))
        free = asyncio.create_task(dispatcher.claim("host-1", 0, wait=True))
        await asyncio.sleep(0.01)
        await dispatcher.submit("b", "b")
        await asyncio.sleep(0.01)
        first = [task.done() for task in (busy, free)]
        await dispatcher.submit("c", "c")
        return [first, await free, await busy]

    assert asyncio.run(ask()) == [[False, True], ("b", 1, False), ("c", 1, False)]


def test_a_host_that_trains_does_not_wait_for_another_trial() -> None:
    async def ask() -> list[Any]:
        dispatcher = Dispatcher()
        answers = [await dispatcher.claim("host-0", 0, wait=False)]
        await dispatcher.submit("a", "a")
        answers.append(await dispatcher.claim("host-0", 0, wait=False))
        await dispatcher.give_back("a", 1)
        answers.append(await dispatcher.claim("host-1", 0, wait=False))
        await dispatcher.close()
        return [*answers, await dispatcher.claim("host-0", 0, wait=False)]

    assert asyncio.run(ask()) == ["wait", ("a", 1, False), ("a", 1, False), "closed"]
