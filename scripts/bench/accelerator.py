"""An accelerator as the benchmarks see it: its clock, its ceilings, and what a step asks of it."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def facts(device: torch.device) -> dict[str, Any]:
    """Name the device, its driver, the versions of the libraries, and the date."""
    found: dict[str, Any] = {
        "device": f"{platform.machine()} CPU",
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=False)
            driver = said.stdout.strip() or said.stderr.strip()
        except OSError as error:
            driver = str(error)
        found |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "nvidia_smi": driver,
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


@dataclass
class Time:
    """Seconds of a step, and seconds in which Python launched it (all of it on a CPU)."""

    step: float
    launch: float


class Clock:
    """Times steps on a device, by its events where it has them.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, step: Callable[[], object], times: int = 1) -> Time:
        """Time a step, from an idle device to an idle device.

        Args:
            step: The step.
            times: How often it runs, without a pause.

        Returns:
            Seconds of one step.
        """
        self.synchronize()
        begin = time.perf_counter()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        for _ in range(times):
            step()
        launch = total = time.perf_counter() - begin
        if self.device.type == "cuda":
            end.record()
            end.synchronize()
            total = start.elapsed_time(end) / 1000
        return Time(total / times, launch / times)

    def turns(
        self,
        steps: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
        rounds: int,
        seconds: float,
        times: int = 1,
    ) -> dict[str, list[Time]]:
        """Time steps in turns (A B C A B C …), so that the machine's noise affects all alike.

        Args:
            steps: For each variant what prepares its turn, which is not timed, and the step.
            rounds: Number of rounds, at least 2 of which are timed; the first is not.
            seconds: Bound on the time of all rounds.
            times: Steps of a turn.

        Returns:
            Times by variant, the same number for each.
        """
        found: dict[str, list[Time]] = {name: [] for name in steps}
        end = time.perf_counter() + seconds
        for number in range(rounds + 1):
            if number > 2 and time.perf_counter() > end:
                break
            for name, (prepare, step) in steps.items():
                prepare()
                one = self.time(step, times)
                if number:
                    found[name].append(one)
        return found


def summarise(times: Mapping[str, list[Time]], base: str) -> dict[str, dict[str, float]]:
    """Compute medians, and quartiles of the ratios to one variant in the same round.

    Args:
        times: Result of `Clock.turns`.
        base: The variant that ratios are to.

    Returns:
        Numbers by variant.
    """
    table = {}
    for name, values in times.items():
        ratios = [one.step / other.step for one, other in zip(values, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {
            "seconds": statistics.median(one.step for one in values),
            "launch_seconds": statistics.median(one.launch for one in values),
            "ratio": middle,
            "quartile_low": low,
            "quartile_high": high,
            "rounds": len(values),
        }
    return table


class Peak:
    """Peak memory of some work above what was allocated before it.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._of("memory_allocated")

    def _of(self, name: str) -> int:
        return getattr(torch.cuda, name)(self.device) if self.device.type == "cuda" else 0

    def mib(self, work: Callable[[], object], times: int = 1) -> float:
        """Run some work and return its peak in MiB; 0 on a CPU, which does not count it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(times):
            work()
        return (self._of("max_memory_allocated") - self._before) / 2**20


# ---- roofline --------------------------------------------------------------------------------


def ceilings(clock: Clock, size: int, copied: int) -> dict[str, float]:
    """Measure what the device can do at best.

    Args:
        clock: Clock of the device.
        size: Rows and columns of the matrices that are multiplied.
        copied: Bytes that are copied.

    Returns:
        `bytes` a second, read and written, of a copy, and operations a second of a matrix product
        by the name of its dtype.
    """
    found = {}
    source = torch.ones(copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    best = min(clock.time(lambda: target.copy_(source), 5).step for _ in range(4))
    found["bytes"] = 2 * copied / best
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=clock.device).to(dtype)
        out = torch.empty_like(a)
        multiply = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        best = min(clock.time(multiply, 3).step for _ in range(4))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best
    return found


class Demand(TorchDispatchMode):
    """Counts the operations and bytes of a step, and the seconds that ceilings allow for them.

    Every operator reads its inputs and writes its outputs once; views cost nothing.

    Args:
        limits: Result of `ceilings`; without it no seconds are computed.
    """

    def __init__(self, limits: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.limits = limits
        self.operations = self.bytes = self.calls = 0
        self.seconds = 0.0
        self.by_operator: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105,PLW3201
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        size = sum(t.numel() * t.element_size() for t in [*read, *made])
        count = flop_registry.get(func.overloadpacket)
        # torch counts a product without the dtype of its result.
        counted = args[:2] if func._overloadname == "dtype" else args
        operations = count(*counted, **kwargs, out_val=out) if count is not None else 0
        self.operations += operations
        self.bytes += size
        self.calls += 1
        if self.limits is not None:
            dtype = str(read[0].dtype).removeprefix("torch.") if read else ""
            speed = self.limits.get(dtype, self.limits["float32"])
            seconds = max(operations / speed, size / self.limits["bytes"])
            self.seconds += seconds
            self.by_operator[name] += seconds
        return out


def demand(step: Callable[[], object], limits: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Run a step and return what it asks of a device, with its most costly operators."""
    with Demand(limits) as counted:
        step()
    costly = sorted(counted.by_operator.items(), key=lambda item: -item[1])[:8]
    return {
        "operations": counted.operations,
        "bytes": counted.bytes,
        "calls": counted.calls,
        "seconds": counted.seconds,
        "costly": dict(costly),
    }
