"""What this machine offers to a sweep, found without importing torch."""

from __future__ import annotations

import ctypes
import glob
import os
from dataclasses import dataclass, replace
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What one machine offers to a sweep.

    Args:
        cpus: Logical processors.
        gpus: GPUs.
        memory_gib: Free memory; 0 where it is not known.
        gpu_memory_gib: Free memory of the GPU that has least; 0 where it is not known.
    """

    cpus: int
    gpus: int
    memory_gib: float = 0.0
    gpu_memory_gib: float = 0.0

    def without_memory(self) -> Machine:
        """The same where the sweep runs on a cluster, whose memory is not known here."""
        return replace(self, memory_gib=0.0, gpu_memory_gib=0.0)


def this_machine() -> Machine:
    """Count this machine's processors and NVIDIA GPUs, and their free memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    else:
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    of_gpus = free_gpu_memory() if gpus else 0
    return Machine(os.cpu_count() or 1, gpus, free_memory() / 2**30, of_gpus / 2**30)


def free_memory() -> int:
    """Bytes that processes could still take here, within a container's limit; 0 where Linux does not tell."""
    return min(read_kib(_MEMORY, "MemAvailable"), _left_to_group())


def read_kib(file: Path, key: str) -> int:
    """Read a line ``key: n kB`` of a file of Linux, in bytes; 0 where there is none."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _left_to_group() -> int:
    """What a container's limit leaves, files that are kept for later not counted; without one more than there is."""
    try:
        limit, used = ((_GROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - int(used) + int(parts.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or no limit
        return 2**62


class _NvmlMemory(ctypes.Structure):
    """``nvmlMemory_t``: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_gpu_memory() -> int:
    """Free bytes of the GPU that has least, as NVIDIA's management library tells; 0 where it does not."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count, found = ctypes.c_uint(), list[int]()
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return 0
        for index in range(count.value):
            device, memory = ctypes.c_void_p(), _NvmlMemory()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                return 0
            if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
                return 0
            found.append(int(memory.free))
    finally:
        nvml.nvmlShutdown()
    return min(found, default=0)
