"""Counters behind `optimizer.statistics()` and the `fngd/...` logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_fngd.ranks import gather
from hf_fngd.solve.coefficients import Solution

# Vectors of coefficients that wait for their statistics.
_WAITING = 1024


class Stopwatch:
    """Adds up the time of some work, without stopping a GPU."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timer(self, device: torch.device) -> Iterator[None]:
        """Add the time of the enclosed work on a device."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((start, end))
            self._add_finished()
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        """Return the seconds so far."""
        for _, end in self._events:
            end.synchronize()
        self._add_finished()
        return self._seconds

    def _add_finished(self) -> None:
        # A loop that never asks for the seconds would otherwise pile up events.
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000


class Counters:
    """Numbers since the last report; rows are counted over the epoch."""

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self.nonfinite = 0
        self.fallbacks = 0
        self._of_all_ranks: tuple[int, int] | None = None
        self._gamma: Tensor | None = None  # sum, minimum, maximum
        self._count = 0
        # Coefficients that are not among these yet.
        self._waiting: list[Tensor] = []
        self.start_epoch()

    def start_epoch(self) -> None:
        """Set the counts of the epoch to zero."""
        self.rows_known = 0
        self.rows_seen = 0

    def count_rows(self, known: int, seen: int) -> None:
        """Count the samples of a batch in an epoch that reuses coefficients.

        Args:
            known: Samples with stored coefficients.
            seen: All samples.
        """
        self.rows_known += known
        self.rows_seen += seen

    @property
    def reuse_rate(self) -> float | None:
        """Share of this epoch's samples with stored coefficients; None if none were looked up."""
        return self.rows_known / self.rows_seen if self.rows_seen else None

    def count_solution(self, solution: Solution) -> None:
        """Add one layer's coefficients."""
        self.nonfinite += not solution.finite
        self.fallbacks += solution.fallback
        if solution.finite:
            # Of many layers at once: on a GPU, small operations cost more than their work.
            self._waiting.append(solution.gamma)
            if len(self._waiting) >= _WAITING:
                self._summarise()

    def _summarise(self) -> None:
        if not self._waiting:
            return
        values = torch.cat([gamma.to(self._waiting[0]) for gamma in self._waiting])
        self._waiting.clear()
        low, high = values.aminmax()
        now = torch.stack([values.sum(), low, high])
        if self._gamma is not None:
            last = self._gamma.to(now)
            now = torch.stack([last[0] + now[0], last[1].min(low), last[2].max(high)])
        self._gamma = now
        self._count += values.numel()

    def gather(self) -> None:
        """Add up the counts of all ranks for the next report; they must call it together."""
        parts = gather((self.nonfinite, self.fallbacks))
        if parts is not None:
            self._of_all_ranks = sum(p[0] for p in parts), sum(p[1] for p in parts)

    def report(self) -> dict[str, float]:
        """Return the numbers since the last report, and start the statistics of γ anew.

        Returns:
            Floats by name; γ entries are absent where no coefficients were computed. Counts are
            those of all ranks after `gather`, otherwise this rank's.
        """
        nonfinite, fallbacks = self._of_all_ranks or (self.nonfinite, self.fallbacks)
        self._of_all_ranks = None
        numbers = {
            "gram_seconds": self.clock.seconds(),
            "nonfinite": float(nonfinite),
            "fallbacks": float(fallbacks),
        }
        if self.reuse_rate is not None:
            numbers["reuse_rate"] = self.reuse_rate
        self._summarise()
        if self._gamma is not None:
            total, low, high = self._gamma.tolist()
            numbers |= {
                "gamma_mean": total / self._count,
                "gamma_min": low,
                "gamma_max": high,
            }
            self._gamma, self._count = None, 0
        return numbers
