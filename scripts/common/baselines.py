"""Runs of the same command with another optimizer, with which a card compares its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Settings of the optimizer: runs that differ only in these can be compared.
OPTIMIZER = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def baselines(
    found: Mapping[str, Any],
    folder: Path,
    scores: Callable[[Mapping[str, Any]], tuple[str, dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Find the runs that differ from a run only in the optimizer, in the folders beside its own.

    Args:
        found: Content of the run's metrics.json.
        folder: Its folder.
        scores: Function that returns the split on which a run was scored, and its scores.

    Returns:
        Scores on the same split, by the settings of the optimizer that differ.
    """
    part, _ = scores(found)
    others = {}
    for path in sorted(folder.resolve().parent.glob("*/metrics.json")):
        if path.parent == folder.resolve():
            continue
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            its_part, its_scores = scores(other)
            same = its_part == part and _task(other) == _task(found)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same and its_scores:
            others[_described(other, found)] = its_scores
    return others


def _task(found: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    settings = found["settings"]
    training = {n: value for n, value in settings["training"].items() if n not in OPTIMIZER}
    # An argument that an earlier version did not have is None.
    model = {name: value for name, value in settings["model"].items() if value is not None}
    return model, settings["data"], training


def _described(found: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    mine, theirs = found["settings"]["training"], reference["settings"]["training"]
    parts = [f"`--optim {mine['optim']}`"]
    for name in OPTIMIZER[1:]:
        if mine[name] != theirs[name] and mine[name] not in (None, ""):
            parts.append(f"{name} {mine[name]}")
    return ", ".join(parts)
