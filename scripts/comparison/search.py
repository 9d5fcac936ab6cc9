"""Search: values of the trials, choice of the best, and a check of the ranges."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comparison.plan import Optimizer, Plan

EDGE = 0.1


def draw(optimizer: Optimizer, trials: int, seed: int) -> list[dict[str, float]]:
    """Draw trials that cover an optimizer's ranges evenly on a log scale.

    The points form a Kronecker sequence (multiples, modulo 1, of the powers of the generalized
    golden ratio) from a random start. More trials continue it, so earlier results stay valid.

    Args:
        optimizer: Label and ranges.
        trials: Number of trials.
        seed: Seed of the start, which also depends on the label.

    Returns:
        For each trial a value for each searched name, to four digits.
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
    """Return the trial with the best objective, the earlier one if two are equal.

    Args:
        plan: The plan, for the direction of the objective.
        trials: Results of one optimizer's trials, in order.

    Returns:
        The best trial; None if no trial has status ok.
    """
    usable = [trial for trial in trials if trial["status"] == "ok"]
    sign = -1 if plan.more_is_better else 1
    return min(usable, key=lambda trial: sign * trial["objective"], default=None)


def at_edge(optimizer: Optimizer, values: Mapping[str, float]) -> list[str]:
    """Describe the chosen values in the outermost tenth of their range (log scale).

    Args:
        optimizer: The optimizer, with its ranges.
        values: The chosen values.

    Returns:
        A sentence for each such value.
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
