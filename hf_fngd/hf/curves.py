"""The picture: training loss and validation objective, against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402


def plot(path: Path, series: Mapping[str, Sequence[Mapping[str, Any]]], objective: str) -> None:
    """Draws two rows of two panels: the mean over the seeds, and a band from lowest to highest.

    Args:
        path: PNG file.
        series: For each label, results of final runs that ended well.
        objective: Name of the validation objective.
    """
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    rows = (("loss", "training loss"), (objective, f"validation: {objective}"))
    for (key, name), (left, right) in zip(rows, panels, strict=True):
        for index, (label, runs) in enumerate(series.items()):
            steps, seconds, values = points(runs, key)
            style = {"color": f"C{index}", "linestyle": ("-", "--")[index // 10 % 2]}
            _draw(left, steps, values, label, style)
            _draw(right, seconds, values, label, style)
        left.set(xlabel="step", ylabel=name)
        right.set(xlabel="seconds of training", ylabel=name)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    panels[0, 0].legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(path)


def points(
    runs: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lines up the histories of several seeds.

    Args:
        runs: Results.
        key: What is drawn.

    Returns:
        Steps, mean seconds at these, and values `[runs, steps]`, at the steps that all runs logged.
    """
    logged = [{e["step"]: e[key] for e in run["history"] if key in e} for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, logged))), dtype=int)
    values = np.array([[one[step] for step in steps] for one in logged], dtype=float)
    return steps, np.mean([clock(run, steps) for run in runs], axis=0), values


def clock(run: Mapping[str, Any], steps: np.ndarray) -> np.ndarray:
    """Says when a run had made its steps.

    Args:
        run: A result.
        steps: Numbers of steps.

    Returns:
        Seconds of training; without a time in the logs, in proportion to the steps.
    """
    times = {e["step"]: e["train_seconds"] for e in run["history"] if "train_seconds" in e}
    if not times:
        return steps * (run["seconds_per_step"] or np.nan)
    times.setdefault(0, 0.0)
    known = sorted(times)
    return np.interp(steps, known, [times[step] for step in known])


def _draw(
    axes: Axes, places: np.ndarray, values: np.ndarray, label: str, style: Mapping[str, Any]
) -> None:
    if not places.size:
        return
    marker = "o" if len(places) < 30 else None
    axes.plot(places, values.mean(axis=0), label=label, marker=marker, markersize=3, **style)
    if len(values) > 1:
        axes.fill_between(
            places, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15
        )
