"""What a run leaves behind: metrics.json, predictions.jsonl, pictures and the card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
from transformers import Trainer

from common.facts import card_facts, environment, local_base, optimizer_facts
from common.source import describe
from hf_fngd.hf.callback import unwrap_fngd
from hf_fngd.report.plots import kept_coefficients, plot_coefficients, summary

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LABELS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that people can read.

    Args:
        path: The file.
        content: Builtins.
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a row.

    Args:
        path: The file.
        rows: Builtins.
    """
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def plot_curves(
    path: Path, history: Sequence[dict[str, Any]], title: str, metric: str, loss_label: str
) -> None:
    """Draws training and validation loss, and one metric, against steps.

    Args:
        path: PNG file.
        history: The Trainer's log history.
        title: Title of the figure.
        metric: Name of the metric, as in `LABELS`.
        loss_label: What the loss is.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (left, "loss", "training loss"),
        (left, "eval_loss", "validation loss"),
        (right, f"eval_{metric}", f"validation {LABELS[metric]}"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            marker = "o" if key.startswith("eval") else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    for axes, name in ((left, loss_label), (right, LABELS[metric])):
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_run(
    trainer: Trainer,
    found: dict[str, Any],
    data_args: Any,
    metric: str,
    loss_label: str,
    *modules: ModuleType,
) -> list[Path]:
    """Writes metrics.json and the curves into the output folder.

    Args:
        trainer: A Trainer.
        found: Content of metrics.json; gets `environment`, `optimizer`, `local_base` and
            `train_rows`.
        data_args: Dataclass of data arguments.
        metric: Name of the metric of the curves, as in `LABELS`.
        loss_label: What the loss is.
        *modules: Modules whose version matters, beside the usual ones.

    Returns:
        The files.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found["environment"] = environment(*modules)
    if trainer.train_dataset is not None:
        found["train_rows"] = len(trainer.train_dataset)
    found |= optimizer_facts(trainer) | local_base(found["settings"]["model"])
    optimizer = unwrap_fngd(trainer.optimizer)
    kept = kept_coefficients(optimizer) if optimizer is not None else {}
    if kept:
        found["optimizer"]["coefficients"] = summary(kept)
    write_json(folder / "metrics.json", found)
    written = [folder / "metrics.json"]
    if found.get("history"):
        title = f"{describe(data_args, 'train')}, {found['settings']['training']['optim']}"
        path = folder / "curves.png"
        plot_curves(path, found["history"], title, metric, loss_label)
        written.append(path)
    if kept:
        path = folder / "coefficients.png"
        plot_coefficients(path, kept, found.get("history", []))
        written.append(path)
    return written


def finish(
    trainer: Any, found: dict[str, Any], written: list[Path], metrics: Sequence[str]
) -> None:
    """Writes the card of a training, and says what there is.

    Args:
        trainer: A Trainer with the card's mixin.
        found: Content of metrics.json.
        written: Files so far.
        metrics: As in `print_summary`.
    """
    if trainer.args.do_train:
        folder = Path(trainer.args.output_dir)
        trainer.card_facts = card_facts(found, folder)
        trainer.create_model_card()
        written = [*written, folder / "README.md"]
    print_summary(found, written, metrics)


def print_summary(found: dict[str, Any], written: Sequence[Path], metrics: Sequence[str]) -> None:
    """Prints losses, scores, and where everything is.

    Args:
        found: Content of metrics.json.
        written: Files.
        metrics: Names of the metrics, as in `LABELS`; the first one is the one of the curves.
    """
    history = found.get("history", [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        print(f"\ntraining loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    key = f"eval_{metrics[0]}"
    scores = [_number(metrics[0], entry[key]) for entry in history if key in entry]
    if scores:
        label = LABELS[metrics[0]]
        print(f"validation {label}, evaluation by evaluation: {', '.join(scores)}")
    for split in ("validation", "test"):
        for name in metrics:
            key = f"{'eval' if split == 'validation' else split}_{name}"
            if key in found.get(split, {}):
                signature = found[split].get(f"{name}_signature", "")
                value = _number(name, found[split][key])
                print(f"{split} {LABELS[name]}: {value}   {signature}".rstrip())
    for path in written:
        print(f"written: {path}")


def _number(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "accuracy" else f"{value:.2f}"
