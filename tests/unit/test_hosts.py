"""What a host asks Ray Train for: NCCL between workers that have GPUs, gloo between those that have none."""

from __future__ import annotations

from typing import Any

import pytest

from deft_ray.spec.schema import ModelSection
from deft_ray.sweep import hosts


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "nccl")])
def test_workers_with_gpus_talk_over_nccl(monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str) -> None:
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, loop: Any, **given: Any) -> None:
            asked.update(given, loop=loop)

        def fit(self) -> None:
            asked["fitted"] = True

    monkeypatch.setattr(hosts, "_HostTrainer", Trainer)
    settings = hosts.HostSettings(
        "run", "/s", "/c", ModelSection(), workers=3, cpus=2, gpus=gpus, slots=1, memory_share=1.0, shared_ray=False
    )
    hosts.HostThread(0, settings, dispatcher=None).run()

    assert asked["fitted"]
    assert asked["torch_config"].backend == backend
    scaling = asked["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (3, gpus > 0)
    assert scaling.resources_per_worker == ({"CPU": 2, "GPU": 1} if gpus else {"CPU": 2})
