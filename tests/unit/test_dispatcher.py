"""The dispatcher without Ray: what it remembers of hosts that have ended."""

from __future__ import annotations

import asyncio

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
