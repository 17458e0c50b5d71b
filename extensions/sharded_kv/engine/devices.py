"""Reads the memory of devices: torch's own counters, and the driver's where nvidia-ml-py is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Usage:
    """Memory of one device, in bytes.

    Attributes:
        allocated: held by tensors of this process.
        process: held by this process; with nvidia-ml-py the CUDA context and other libraries count in, else only what
            torch has reserved.
        used: held by all processes.
        total: size of the device.
    """

    allocated: int
    process: int
    used: int
    total: int


def runtime(device: torch.device) -> Any:
    """torch.cuda, or its like for another kind of device."""
    return getattr(torch, device.type)


def name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA GeForce RTX 4090"."""
    return str(runtime(device).get_device_name(device)) if device.type != "cpu" else "CPU"


@dataclasses.dataclass(frozen=True)
class Allocated:
    """Bytes held by tensors of this process: now, and at most since anybody last reset torch's mark."""

    now: int
    peak: int


def allocated(device: torch.device) -> Allocated:
    """What tensors of this process hold on `device`. Takes some 20 us on a GPU."""
    counters = runtime(device)
    if hasattr(counters, "memory_stats_as_nested_dict"):  # memory_allocated() flattens and sorts all of it, each time
        stats = counters.memory_stats_as_nested_dict(device).get("allocated_bytes", {}).get("all", {})
        return Allocated(int(stats.get("current", 0)), int(stats.get("peak", 0)))
    return Allocated(int(counters.memory_allocated(device)), int(counters.max_memory_allocated(device)))


def free(device: torch.device) -> int:
    """Bytes that tensors may still take on `device`: what no process has, and what torch keeps for them."""
    counters = runtime(device)
    return int(counters.mem_get_info(device)[0] + counters.memory_reserved(device)) - allocated(device).now


def usage(device: torch.device) -> Usage:
    """Read the memory of `device`. Synchronises nothing."""
    free, total = runtime(device).mem_get_info(device)
    held = allocated(device).now
    process = _process_by_driver(device)
    if process is None:
        process = int(runtime(device).memory_reserved(device))
    used = max(total - free, process)
    return Usage(allocated=held, process=max(process, held), used=max(used, held), total=total)


def _process_by_driver(device: torch.device) -> int | None:
    """What the driver says this process holds.

    None where it does not say: without nvidia-ml-py, or in a container, whose process ids are its own.
    """
    if device.type != "cuda":
        return None
    nvml = _nvml()
    if nvml is None:
        return None
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
    return None


@functools.lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no NVIDIA driver, or a driver too old for it: torch's counters do
        return None
    return pynvml
