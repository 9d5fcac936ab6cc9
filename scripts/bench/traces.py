"""Summaries of torch's profiler: which kernels fill a step, and what launching them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_ROWS = 15
_WIDTH = 80


def profile_steps(step: Callable[[], object], device: torch.device, times: int) -> dict[str, Any]:
    """Profile a step.

    Args:
        step: The step.
        device: Where it runs.
        times: How often it runs.

    Returns:
        For one step: `device_seconds` of its kernels, which is less than the step's time where
        launching them is the bottleneck, and `kernels`, their number. `top_kernels` and
        `top_operators` (self time on the CPU) are tables in milliseconds, `runtime` lists what CUDA
        was asked to do, synchronisation among it.
    """
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities) as profiler:
        for _ in range(times):
            step()
        if on_device:
            torch.cuda.synchronize(device)
    events = list(profiler.key_averages())
    # What the optimizers note down about themselves covers their kernels once more.
    kernels = [
        e
        for e in events
        if e.device_type == DeviceType.CUDA
        and not getattr(e, "is_user_annotation", False)
        and not e.key.startswith("Optimizer.")
    ]
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    runtime = [e for e in on_cpu if e.key.startswith("cuda")]
    host = "self_cpu_time_total"
    return {
        "device_seconds": sum(e.self_device_time_total for e in kernels) / times / 1e6,
        "kernels": sum(e.count for e in kernels) / times,
        "profiled_cpu_seconds": sum(getattr(e, host) for e in on_cpu) / times / 1e6,
        "top_kernels": _table(kernels, "self_device_time_total", times),
        "top_operators": _table(set(on_cpu) - set(runtime), host, times),
        "runtime": _table(runtime, host, times),
    }


def _table(events: Iterable[Any], key: str, times: int) -> str:
    found = sorted(events, key=lambda event: -getattr(event, key))[:_ROWS]
    rows = [
        (event.key[:_WIDTH], event.count / times, getattr(event, key) / times / 1000)
        for event in found
    ]
    return tabulate(rows, headers=("name", "times", "ms"), tablefmt="plain", floatfmt=".3f")
