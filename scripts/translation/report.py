"""What a run leaves behind: metrics.json, predictions.jsonl, a plot, and facts for the card."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import datasets
import matplotlib
import sacrebleu
import torch
import transformers
from transformers import TrainingArguments

import hf_fngd

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def environment() -> dict[str, Any]:
    """Describes where and how the run was made.

    Returns:
        Command, versions and device.
    """
    modules = (hf_fngd, torch, transformers, accelerate, datasets, sacrebleu)
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
        "device": device,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that people can read.

    Args:
        path: The file.
        content: Builtins.
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_predictions(
    path: Path, sources: Sequence[str], references: Sequence[str], predictions: Sequence[str]
) -> None:
    """Writes one JSON object a sentence.

    Args:
        path: The file.
        sources: Source sentences.
        references: Reference translations.
        predictions: Translations.
    """
    with path.open("w", encoding="utf-8") as file:
        for source, reference, prediction in zip(sources, references, predictions, strict=True):
            row = {"source": source, "reference": reference, "prediction": prediction}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def plot_curves(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draws training and validation loss, and BLEU, against steps.

    Args:
        path: PNG file.
        history: The Trainer's log history.
        title: Title of the figure.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (left, "loss", "training loss"),
        (left, "eval_loss", "validation loss"),
        (right, "eval_bleu", "validation BLEU"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            marker = "o" if key.startswith("eval") else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    for axes, name in ((left, "cross-entropy a token"), (right, "BLEU")):
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def settings(model_args: Any, data_args: Any, args: TrainingArguments) -> dict[str, Any]:
    """Gathers what the run was set to.

    Args:
        model_args: Dataclass of model arguments.
        data_args: Dataclass of data arguments.
        args: Training arguments.

    Returns:
        Builtins.
    """
    chosen = (
        "optim",
        "optim_args",
        "optim_target_modules",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "max_grad_norm",
        "label_smoothing_factor",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "fp16",
        "seed",
    )
    training = {name: getattr(args, name) for name in chosen}
    plain = {name: getattr(value, "value", value) for name, value in training.items()}
    return {"model": asdict(model_args), "data": asdict(data_args), "training": plain}


def print_summary(found: dict[str, Any], written: Sequence[Path]) -> None:
    """Prints losses, scores, and where everything is.

    Args:
        found: Content of metrics.json.
        written: Files.
    """
    history = found.get("history", [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        print(f"\ntraining loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    bleus = [entry["eval_bleu"] for entry in history if "eval_bleu" in entry]
    if bleus:
        print("validation BLEU, evaluation by evaluation: " + ", ".join(f"{b:.2f}" for b in bleus))
    if "test" in found:
        for name, label in (("bleu", "BLEU"), ("chrf", "chrF")):
            print(f"test {label}: {found['test'][name]:.2f}   {found['test'][name + '_signature']}")
    for path in written:
        print(f"written: {path}")
