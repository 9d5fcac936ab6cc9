"""Pictures of runs: loss and scores by step and second, and the coefficients that FNGD keeps.

All figures are made without pyplot, so drawing changes no backend and opens no window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_fngd import FNGD
from hf_fngd.report.runs import METRIC_NAMES

# Lines that can still be told apart, and the share of coefficients beyond each end of the axis.
_MAX_GROUPS = 8
_BEYOND = 0.005


def plot(
    path: Path,
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    objective: str,
    timed: bool = True,
) -> None:
    """Draw training loss and objective of several runs: the mean over seeds, and their range.

    A quantity that no run logged gets no panel.

    Args:
        path: PNG file.
        series: Finished runs (as `read_run` returns them) by label, one run for each seed.
        objective: Name of the validation objective.
        timed: Whether to draw both against seconds as well as against steps.
    """
    names = {"loss": "training loss", objective: f"validation: {objective}"}
    drawn = {key: [points(runs, key) for runs in series.values()] for key in names}
    logged = [key for key in names if any(steps.size for steps, _, _ in drawn[key])]
    shown = logged or ["loss"]
    scales = ("step", "seconds of training") if timed else ("step",)
    # One row for each quantity, or a single row where each quantity has one panel.
    rows, columns = (len(shown), 2) if timed else (1, len(shown))
    figure, panels = _panels(rows, columns)
    for key, part in zip(shown, panels.reshape(len(shown), -1), strict=True):
        for index, (label, (*places, values)) in enumerate(zip(series, drawn[key], strict=True)):
            style = {"color": f"C{index}", "linestyle": ("-", "--")[index // 10 % 2]}
            for axes, place in zip(part, places, strict=False):
                _draw(axes, place, values, label, style)
        for axes, scale in zip(part, scales, strict=True):
            axes.set(xlabel=scale, ylabel=names[key])
    if logged:
        panels[0, 0].legend()
    _save(figure, path)


def points(
    runs: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Align the histories of several seeds.

    Args:
        runs: Finished runs.
        key: Name of the logged quantity.

    Returns:
        Steps `[S]` that all runs logged, mean seconds `[S]` at these steps, and values
        `[runs, S]`.
    """
    logged = [{e["step"]: e[key] for e in run["history"] if key in e} for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, logged))), dtype=int)
    values = np.array([[one[step] for step in steps] for one in logged], dtype=float)
    return steps, np.mean([clock(run, steps) for run in runs], axis=0), values


def clock(run: Mapping[str, Any], steps: np.ndarray) -> np.ndarray:
    """Return when a run reached its steps.

    Args:
        run: A finished run.
        steps: Numbers of steps `[S]`.

    Returns:
        Seconds of training `[S]`; in proportion to the steps if the history has no times.
    """
    times = {e["step"]: e["train_seconds"] for e in run["history"] if "train_seconds" in e}
    if not times:
        return steps * (run["seconds_per_step"] or np.nan)
    times.setdefault(0, 0.0)
    known = sorted(times)
    return np.interp(steps, known, [times[step] for step in known])


def plot_history(
    path: Path, history: Sequence[Mapping[str, Any]], title: str, metric: str, loss_label: str
) -> None:
    """Draw one run against steps: training and validation loss, and one metric.

    Args:
        path: PNG file.
        history: The Trainer's log history.
        title: Title of the figure.
        metric: Name of the metric.
        loss_label: What the loss measures, such as `cross-entropy a token`.
    """
    name = METRIC_NAMES.get(metric, metric)
    figure, panels = _panels(1, 2, width=5.0)
    left, right = panels[0]
    for axes, key, label in (
        (left, "loss", "training loss"),
        (left, "eval_loss", "validation loss"),
        (right, f"eval_{metric}", f"validation {name}"),
    ):
        logged = [(entry["step"], entry[key]) for entry in history if key in entry]
        if logged:
            marker = "o" if key.startswith("eval") else None
            axes.plot(*zip(*logged, strict=True), label=label, marker=marker, markersize=3)
    for axes, label in ((left, loss_label), (right, name)):
        axes.set(xlabel="step", ylabel=label)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    _save(figure, path)


def layer_groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Group the layers that have the same role: their paths begin alike, apart from numbers.

    If all layers have one role (the convolutions of a ResNet), the numbers tell them apart.

    Args:
        names: Paths of layers.

    Returns:
        Indices of the layers by group. A group's name leaves out the words that all groups begin
        with. There are at most eight groups, unless the first words already differ more.
    """
    paths = [name.split(".") for name in names]
    plain = [[word for word in path if not word.isdigit()] for path in paths]
    found = _joined(plain)
    return found if len(found) > 2 else _joined(paths)


def kept_coefficients(optimizer: Any) -> dict[str, np.ndarray]:
    """Return the coefficients γ that the optimizer has stored.

    Args:
        optimizer: FNGD, during or after the training; others have none.

    Returns:
        All stored γ of each group of layers, flat; empty if none are stored.
    """
    table = optimizer.coefficients() if isinstance(optimizer, FNGD) else None
    if table is None:
        return {}
    values, groups = table.numpy(), layer_groups(optimizer.layer_names)
    found = {group: values[:, layers] for group, layers in groups.items()}
    flat = {group: gamma[np.isfinite(gamma)] for group, gamma in found.items()}
    return {group: gamma for group, gamma in flat.items() if gamma.size}


def summary(coefficients: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Describe coefficients by a few numbers.

    Args:
        coefficients: From `kept_coefficients`.

    Returns:
        `count`, `mean`, `min`, `median` and `max` of each group.
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
    """Draw a histogram of γ for each group of layers, and the reuse rate.

    A constant reuse rate is a line of text; a rate that varies has a panel.

    Args:
        path: PNG file.
        coefficients: From `kept_coefficients`, not empty.
        history: The Trainer's log history.
    """
    rates = [(e["step"], e["fngd/reuse_rate"]) for e in history if "fngd/reuse_rate" in e]
    varies = len({rate for _, rate in rates}) > 1
    figure, axes = _panels(1, 2 if varies else 1)
    left = axes[0, 0]
    every = np.concatenate(list(coefficients.values()))
    low, high = np.quantile(every, (_BEYOND, 1 - _BEYOND))
    pad = 0.02 * (high - low) or 0.5
    bins = np.linspace(low - pad, high + pad, 61)
    for group, gamma in coefficients.items():
        weights = np.full(gamma.size, 1 / gamma.size)
        left.hist(gamma, bins=bins, weights=weights, histtype="step", label=group or "all layers")
    left.axvline(1, color="0.6", linewidth=1, linestyle=":")
    left.set(
        xlabel="stored coefficient γ (1: plain gradient)",
        ylabel="share of the group's coefficients",
    )
    left.legend(fontsize="small")
    if varies:
        axes[0, 1].plot(*zip(*rates, strict=True), marker="o", markersize=3)
        axes[0, 1].set(
            xlabel="step",
            ylabel="share of the epoch's samples with a stored γ",
            ylim=(-0.05, 1.05),
        )
    elif rates:
        left.set_title(f"{rates[0][1]:.0%} of samples found a stored γ", fontsize="medium")
    _save(figure, path)


def plot_ranks(
    path: Path, names: Sequence[str], ranks: Sequence[int], sides: Sequence[int], label: str
) -> None:
    """Draw the rank of every layer, as a share of the largest that its matrix can have.

    Args:
        path: PNG file.
        names: Paths of the layers.
        ranks: Their ranks.
        sides: The smaller side of each matrix.
        label: What kind of rank it is.
    """
    figure, axes = _panels(1, 1, width=7)
    panel = axes[0, 0]
    for group, layers in layer_groups(names).items():
        shares = [ranks[i] / sides[i] for i in layers]
        panel.plot(layers, shares, "o-", markersize=3, linewidth=1, label=group or "all layers")
    panel.set(xlabel="layer, in the order of the table", ylabel=label, ylim=(0, 1.05))
    panel.legend(fontsize="small")
    _save(figure, path)


def _panels(rows: int, columns: int, width: float = 5.5) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure, panels


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


def _joined(paths: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for words in range(max(map(len, paths), default=0), 0, -1):
        fewer: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            fewer.setdefault(".".join(path[:words]), []).append(number)
        # Shorten the names as long as that joins no groups that are few enough already.
        if groups and len(groups) <= _MAX_GROUPS and len(fewer) < len(groups):
            break
        groups = fewer
    split = [group.split(".") for group in groups]
    same = 0
    while min(map(len, split), default=0) > same + 1 and len({one[same] for one in split}) == 1:
        same += 1
    return {".".join(words[same:]): groups[".".join(words)] for words in split}


def _save(figure: Figure, path: Path) -> None:
    # A picture that is there already is replaced as a whole.
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
