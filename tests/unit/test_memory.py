"""Memory of a worker and of a machine: against allocations of a known size, and made-up files of Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.spec import machine
from deft_ray.spec.machine import free_gpu_memory, free_memory, this_machine
from deft_ray.spec.plan import FILLED, MOST_SLOTS, slots_that_fit
from deft_ray.train.memory import DeviceMemory, FirstStep, Holds

CPU = torch.device("cpu")
MIB = 2**20


def test_a_process_knows_what_it_takes_and_has_taken() -> None:
    memory = DeviceMemory(CPU)
    before = memory.used
    block = torch.ones(64 * MIB)  # 256 MiB
    assert memory.used - before == pytest.approx(256 * MIB, rel=0.1)
    del block
    assert memory.used - before < 64 * MIB
    assert memory.peak - before > 230 * MIB, "the peak outlives the block"
    memory.begin_peak()
    assert memory.peak - before < 64 * MIB, "counted anew"


def test_a_worker_takes_its_part_of_what_is_free() -> None:
    whole, part = DeviceMemory(CPU).free, DeviceMemory(CPU, share=0.25).free
    assert part == pytest.approx(whole / 4, rel=0.05)
    assert whole == pytest.approx(this_machine().memory_gib * 2**30, rel=0.05)


def test_on_a_gpu_torchs_allocator_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"memory_allocated": 30, "max_memory_allocated": 70, "memory_reserved": 45}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device.index == 1 else 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 200))
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    memory = DeviceMemory(torch.device("cuda", 1), share=0.5)
    memory.begin_peak()
    assert (memory.used, memory.peak, reset) == (30, 70, [torch.device("cuda", 1)])
    assert memory.free == 100 + 15, "what the allocator holds unused is free; a GPU is not shared"


class _Stepping(DeviceMemory):
    """Memory of a base of 100 and a trial that keeps 20 and whose pass takes 50 for a moment."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.stepped = False

    def begin_peak(self) -> None:
        pass

    used = property(lambda self: 120 if self.stepped else 100)
    peak = property(lambda self: 170 if self.stepped else 100)
    free = property(lambda self: 80 if self.stepped else 1000)


@pytest.mark.parametrize(("longest", "slot"), [(1.0, 70), (2.0, 120), (0.5, 70)])
def test_the_longest_pass_counts_not_the_first(longest: float, slot: int) -> None:
    memory = _Stepping()
    first = FirstStep(memory)
    memory.stepped = True
    assert first.holds(longest) == Holds(base=100, slot=slot, free=1000)


def test_of_several_trials_each_keeps_its_part_and_passes_alone() -> None:
    memory = _Stepping()
    first = FirstStep(memory)
    memory.stepped = True
    assert first.holds(2.0, slots=4) == Holds(base=100, slot=20 // 4 + 2 * 50, free=1000)


@pytest.mark.parametrize("free", [-5.0, 0.0, 1.0, 10.0, 33.0, 1e9])
@pytest.mark.parametrize("slot", [0.0, 0.5, 3.0, 40.0])
def test_slots_that_fit_are_as_many_as_fit(free: float, slot: float) -> None:
    found = slots_that_fit(free, slot)
    assert 1 <= found <= MOST_SLOTS
    assert found == 1 or found * slot <= FILLED * free
    assert found == MOST_SLOTS or (found + 1) * slot > FILLED * free


@pytest.mark.parametrize(
    ("limit", "current", "inactive", "left"),
    [("max", "5000", 0, None), ("9000", "5000", 1500, 5500), ("9000", "9500", 0, 0), (None, None, 0, None)],
)
def test_a_container_may_leave_less_than_the_machine_has(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str | None,
    current: str | None,
    inactive: int,
    left: int | None,
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       8 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    monkeypatch.setattr(machine, "_MEMORY", meminfo)
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert free_memory() == (8 * 1024 if left is None else left)
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "none")
    assert free_memory() == 0


class _Nvml:
    """NVIDIA's library on a machine with these GPUs: free bytes, or None for one that does not answer."""

    def __init__(self, *free: int | None, starts: bool = True) -> None:
        self.free, self.starts, self.ended = free, starts, False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0 if self.starts else 9

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.ended = True
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.free)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:  # noqa: N802
        free = self.free[device.value - 1]
        if free is None:
            return 15
        memory._obj.total, memory._obj.free, memory._obj.used = 2**40, free, 2**40 - free
        return 0


@pytest.mark.parametrize(
    ("nvml", "free"),
    [(_Nvml(70, 50, 60), 50), (_Nvml(), 0), (_Nvml(70, None), 0), (_Nvml(70, starts=False), 0), (None, 0)],
)
def test_of_several_gpus_the_fullest_counts(monkeypatch: pytest.MonkeyPatch, nvml: _Nvml | None, free: int) -> None:
    def load(name: str) -> _Nvml:
        assert name == "libnvidia-ml.so.1"
        if nvml is None:
            raise OSError("no such file")
        return nvml

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert free_gpu_memory() == free
    assert nvml is None or nvml.ended == nvml.starts
