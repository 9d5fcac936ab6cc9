"""Draw the picture of the front page from committed runs: three tasks, the optimizers worth a look.

python scripts/front_picture.py   # writes scripts/bench/results/front.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from comparison.results import read_runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_fngd.report.plots import points

RESULTS = Path(__file__).resolve().parent / "bench" / "results"
PATH = RESULTS / "front.png"
Run = Mapping[str, Any]
STYLES = {
    "muon, averaged weights": ("#e6ab02", 2.4),
    "soap, averaged weights": ("#a6761d", 2.4),
    "muon_soap": ("#1f78b4", 2.4),
    "muon": ("#1b9e77", 2.0),
    "kfac": ("#7570b3", 1.6),
    "adamw": ("#333333", 1.6),
    "plain (SGD)": ("#999999", 1.6),
    "fngd (coefficients of the first epoch)": ("#d7301f", 2.0),
}


class Panel(NamedTuple):
    """One task: the study, its metric and epochs, and its label of each optimizer.

    Without epochs the panel shows the end of each run.
    """

    title: str
    study: str
    metric: str
    name: str
    epochs: int | None
    labels: dict[str, str]


PANELS = (
    Panel(
        "Images from scratch\nResNet-18 (width 8), CIFAR-10",
        "compare_cifar10",
        "eval_accuracy",
        "validation accuracy",
        5,
        {"muon": "muon", "kfac": "kfac", "adamw": "adamw", "plain (SGD)": "sgd"}
        | {"fngd (coefficients of the first epoch)": "fngd"},
    ),
    Panel(
        "Translation from scratch\nMarian (width 128), Multi30K",
        "three_epochs",
        "eval_bleu",
        "validation BLEU",
        3,
        {"muon_soap": "muon_soap", "muon": "muon", "adamw": "adamw"},
    ),
    Panel(
        "Fine-tuning, after 5 epochs\nMarian (Muon, Tatoeba) on Multi30K",
        "finetune_muon_base",
        "eval_bleu",
        "validation BLEU",
        None,
        {"muon, averaged weights": "muon_average", "soap, averaged weights": "soap_average"}
        | {"muon": "muon", "muon_soap": "muon_soap", "adamw": "adamw", "plain (SGD)": "sgd_rms"}
        | {"fngd (coefficients of the first epoch)": "fngd"},
    ),
)


def draw_course(axes: Axes, panel: Panel, runs: Mapping[str, list[Run]]) -> None:
    """Draw the course of the runs: for each optimizer the mean of its seeds, and their range."""
    assert panel.epochs is not None
    for name, mine in runs.items():
        color, width = STYLES[name]
        steps, _, values = points(mine, panel.metric)
        epochs = panel.epochs * steps / steps[-1]
        low, high = values.min(axis=0), values.max(axis=0)
        axes.plot(epochs, values.mean(axis=0), color=color, linewidth=width, label=name)
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", xticks=range(1, panel.epochs + 1))


def draw_ends(axes: Axes, runs: Mapping[str, list[Run]]) -> None:
    """Draw the ends of the runs: for each optimizer its seeds and their mean."""
    for place, (name, mine) in enumerate(runs.items()):
        color, width = STYLES[name]
        ends = [run["objective"] for run in mine]
        axes.plot([place] * len(ends), ends, "o", color=color, alpha=0.5, markersize=5)
        mean = sum(ends) / len(ends)
        axes.hlines(mean, place - 0.3, place + 0.3, color=color, linewidth=width, label=name)
    axes.set_xticks([])
    axes.set_xlabel("optimizer: five seeds and their mean")


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one task."""
    finals = [run for run in read_runs(RESULTS / panel.study) if run["run"].startswith("final")]
    runs = {
        name: [run for run in finals if run["label"] == label]
        for name, label in panel.labels.items()
    }
    if panel.epochs is None:
        draw_ends(axes, runs)
    else:
        draw_course(axes, panel, runs)
    axes.set_title(panel.title, fontsize=10.5)
    axes.set_ylabel(panel.name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> None:
    """Draw all tasks side by side into a PNG file, with one legend."""
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = figure.subplots(1, len(PANELS))
    for one, panel in zip(axes, PANELS, strict=True):
        draw_panel(one, panel)
    lines = {}
    for one in axes:
        lines |= {name: line for line, name in zip(*one.get_legend_handles_labels(), strict=True)}
    names = [name for name in STYLES if name in lines]
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=(len(names) + 1) // 2,
        frameon=False,
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(PATH)
