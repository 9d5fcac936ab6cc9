"""Which values are tried, which trial is the best, and whether its range was wide enough."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comparison.plan import Optimizer, Plan

EDGE = 0.1


def draw(optimizer: Optimizer, trials: int, seed: int) -> list[dict[str, float]]:
    """Spreads trials evenly over an optimizer's ranges, on a log scale.

    A Kronecker sequence (multiples, modulo 1, of the powers of the generalized golden ratio) from a
    random start. More trials continue it, so the runs made before stay valid.

    Args:
        optimizer: Label and ranges.
        trials: Number of points.
        seed: Seed of the start, which also depends on the label.

    Returns:
        A value for each searched name, to four digits, for each trial.
    """
    names = sorted(optimizer.search)
    ratio = 2.0
    for _ in range(60):  # the root above 1 of x^(d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(names) + 1))
    steps = ratio ** -np.arange(1, len(names) + 1)
    start = np.random.default_rng([seed, zlib.crc32(optimizer.label.encode())]).random(len(names))
    points = (start + np.outer(np.arange(1, trials + 1), steps)) % 1
    drawn = []
    for point in points:
        values = {}
        for name, place in zip(names, point, strict=True):
            low, high = optimizer.search[name]
            value = math.exp(math.log(low) + place * math.log(high / low))
            values[name] = min(max(float(f"{value:.4g}"), low), high)
        drawn.append(values)
    return drawn


def choose(plan: Plan, trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Picks the trial with the best objective, the earlier one of two equals.

    Args:
        plan: Says which way the objective is better.
        trials: Results of one optimizer's trials, in order.

    Returns:
        The best; None if no trial ended with a finite objective.
    """
    usable = [trial for trial in trials if trial["status"] == "ok"]
    sign = -1 if plan.more_is_better else 1
    return min(usable, key=lambda trial: sign * trial["objective"], default=None)


def at_edge(optimizer: Optimizer, values: Mapping[str, float]) -> list[str]:
    """Names the chosen values that lie in the outermost tenth of their range, on a log scale.

    Args:
        optimizer: Its ranges.
        values: The chosen values.

    Returns:
        A sentence for each such value: the best value may lie beyond.
    """
    found = []
    for name, (low, high) in optimizer.search.items():
        place = math.log(values[name] / low) / math.log(high / low)
        if not EDGE <= place <= 1 - EDGE:
            end = "lower" if place < EDGE else "upper"
            found.append(
                f"{name}={values[name]:g} is at the {end} edge of its range [{low:g}, {high:g}]: "
                "the best value may lie beyond"
            )
    return found
