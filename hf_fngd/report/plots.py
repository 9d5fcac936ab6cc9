"""Pictures: loss and objective against steps and seconds, and the coefficients that FNGD keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from hf_fngd.optimizer import FNGD  # noqa: E402

# Lines that can still be told apart, and the share of coefficients beyond each end of the axis.
_MAX_GROUPS = 8
_BEYOND = 0.005


def plot(
    path: Path,
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    objective: str,
    timed: bool = True,
) -> None:
    """Draws training loss and objective: mean over the seeds, and a band from lowest to highest.

    What no run logged has no panels.

    Args:
        path: PNG file.
        series: For each label, results of final runs that ended well.
        objective: Name of the validation objective.
        timed: Whether both are drawn against seconds as well as against steps.
    """
    names = {"loss": "training loss", objective: f"validation: {objective}"}
    drawn = {key: [points(runs, key) for runs in series.values()] for key in names}
    logged = [key for key in names if any(steps.size for steps, _, _ in drawn[key])]
    shown = logged or ["loss"]
    scales = ("step", "seconds of training") if timed else ("step",)
    # A row for each, or all in one row where each has one panel.
    rows, columns = (len(shown), 2) if timed else (1, len(shown))
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for key, part in zip(shown, panels.reshape(len(shown), -1), strict=True):
        for index, (label, (*places, values)) in enumerate(zip(series, drawn[key], strict=True)):
            style = {"color": f"C{index}", "linestyle": ("-", "--")[index // 10 % 2]}
            for axes, place in zip(part, places, strict=False):
                _draw(axes, place, values, label, style)
        for axes, scale in zip(part, scales, strict=True):
            axes.set(xlabel=scale, ylabel=names[key])
            axes.grid(alpha=0.3)
    if logged:
        panels[0, 0].legend()
    _save(figure, path)


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


def layer_groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Puts layers together that have the same role: their paths begin alike but for numbers.

    Where all layers have one role (a ResNet's convolutions) they are told apart by the numbers.

    Args:
        names: Paths of layers.

    Returns:
        Numbers of the layers by group, without the words that all groups begin with; at most eight
        groups unless the first words are more.
    """
    paths = [name.split(".") for name in names]
    plain = [[word for word in path if not word.isdigit()] for path in paths]
    found = _joined(plain)
    return found if len(found) > 2 else _joined(paths)


def _joined(paths: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for words in range(max(map(len, paths), default=0), 0, -1):
        fewer: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            fewer.setdefault(".".join(path[:words]), []).append(number)
        # Names as short as they can be without joining what is few enough already.
        if groups and len(groups) <= _MAX_GROUPS and len(fewer) < len(groups):
            break
        groups = fewer
    split = [group.split(".") for group in groups]
    same = 0
    while min(map(len, split), default=0) > same + 1 and len({one[same] for one in split}) == 1:
        same += 1
    return {".".join(words[same:]): groups[".".join(words)] for words in split}


def kept_coefficients(optimizer: FNGD) -> dict[str, np.ndarray]:
    """Gives the coefficients that the store holds.

    Args:
        optimizer: FNGD, also after the training.

    Returns:
        For each group of layers all γ, flat; nothing where none are kept.
    """
    state = optimizer.coefficients
    if state.store is None:
        return {}
    state.flush()
    table = state.store.values().numpy()
    found = {group: table[:, layers] for group, layers in layer_groups(state.names).items()}
    flat = {group: values[np.isfinite(values)] for group, values in found.items()}
    return {group: values for group, values in flat.items() if values.size}


def summary(coefficients: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Describes coefficients by a few numbers.

    Args:
        coefficients: As `kept_coefficients` gives them.

    Returns:
        For each group `count`, `mean`, `min`, `median` and `max`.
    """
    return {
        group: {
            "count": int(gamma.size),
            "mean": float(gamma.mean(dtype=np.float64)),
            "min": float(gamma.min()),
            "median": float(np.median(gamma)),
            "max": float(gamma.max()),
        }
        for group, gamma in coefficients.items()
    }


def plot_coefficients(
    path: Path, coefficients: Mapping[str, np.ndarray], history: Sequence[Mapping[str, Any]]
) -> None:
    """Draws a histogram of γ for each group of layers, and the reuse rate against steps.

    Args:
        path: PNG file.
        coefficients: As `kept_coefficients` gives them, not empty.
        history: The Trainer's log history; without `fngd/reuse_rate` there is one panel only.
    """
    rates = [(e["step"], e["fngd/reuse_rate"]) for e in history if "fngd/reuse_rate" in e]
    panels = 2 if rates else 1
    figure, axes = pyplot.subplots(
        1, panels, figsize=(5.5 * panels, 4), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    every = np.concatenate(list(coefficients.values()))
    low, high = np.quantile(every, (_BEYOND, 1 - _BEYOND))
    pad = 0.02 * (high - low) or 0.5
    bins = np.linspace(low - pad, high + pad, 61)
    for group, gamma in coefficients.items():
        weights = np.full(gamma.size, 1 / gamma.size)
        left.hist(gamma, bins=bins, weights=weights, histtype="step", label=group or "all")
    left.axvline(1, color="0.6", linewidth=1, linestyle=":")
    left.set(xlabel="γ kept (1: plain gradient)", ylabel="share of the group")
    left.legend(fontsize="small")
    if rates:
        axes[0, 1].plot(*zip(*rates, strict=True), marker="o", markersize=3)
        axes[0, 1].set(xlabel="step", ylabel="reuse rate of the epoch", ylim=(-0.05, 1.05))
    for one in axes[0]:
        one.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(path)
