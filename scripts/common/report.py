"""What a run leaves behind: metrics.json, predictions.jsonl, a plot, and facts for the card."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate
import datasets
import matplotlib
import torch
import transformers
from transformers import Trainer, TrainingArguments

import hf_fngd
from common.source import describe
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.hf.card_text import CardFacts
from hf_fngd.selection import layer_table

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LABELS = {"bleu": "BLEU", "chrf": "chrF", "accuracy": "accuracy"}
ONE_RUN = "The scores are those of one run with one seed."


@dataclass(frozen=True)
class Task:
    """What a script trains for: metrics of its test set, and what its models cannot do."""

    name: str
    metrics: tuple[str, ...]
    limits: tuple[str, ...]


TASKS = {
    task.name: task
    for task in (
        Task(
            "translation",
            ("bleu", "chrf"),
            (ONE_RUN, "The model knows the kind of sentence it was trained on and little else."),
        ),
        Task(
            "image-classification",
            ("accuracy",),
            (ONE_RUN, "The model knows the kind of image it was trained on and little else."),
        ),
    )
}


def environment(*more: ModuleType) -> dict[str, Any]:
    """Describes where and how the run was made.

    Args:
        *more: Modules whose version matters, beside the usual ones.

    Returns:
        Command, versions and device.
    """
    modules = (hf_fngd, torch, transformers, accelerate, datasets, *more)
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


def optimizer_facts(trainer: Trainer) -> dict[str, Any]:
    """Describes an optimizer of hf_fngd.

    Args:
        trainer: A Trainer.

    Returns:
        Method, settings and layers under `optimizer`; nothing for any other optimizer.
    """
    optimizer = unwrap_optimizer(trainer.optimizer)
    if optimizer is None:
        return {}
    facts = {"method": optimizer.method, "config": optimizer.config.to_dict()}
    return {"optimizer": {**facts, "layers": optimizer.selection.rows()}}


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
        found: Content of metrics.json; gets `environment` and `optimizer`.
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
    found |= optimizer_facts(trainer)
    write_json(folder / "metrics.json", found)
    written = [folder / "metrics.json"]
    if found.get("history"):
        title = f"{describe(data_args, 'train')}, {found['settings']['training']['optim']}"
        path = folder / "curves.png"
        plot_curves(path, found["history"], title, metric, loss_label)
        written.append(path)
    return written


def card_facts(found: dict[str, Any], folder: Path) -> CardFacts:
    """Gathers what the model card says from the numbers of a run alone.

    Args:
        found: Content of metrics.json.
        folder: Folder of the model, which names it.

    Returns:
        Facts.
    """
    data, training = found["settings"]["data"], found["settings"]["training"]
    task = TASKS["translation" if "source_lang" in data else "image-classification"]
    optimizer = found.get("optimizer")
    test = found.get("test", {})
    scores = {name: test.get(name, test.get(f"test_{name}")) for name in task.metrics}
    places = SimpleNamespace(**data)
    return CardFacts(
        model_name=folder.resolve().name,
        task=task.name,
        languages=[data[key] for key in ("source_lang", "target_lang") if key in data],
        dataset=describe(places, "train"),
        test_dataset=describe(places, "test"),
        dataset_id=data.get("dataset_id") or data["dataset_name"],
        dataset_config=data["dataset_config_name"],
        base_model=found["settings"]["model"]["model_name_or_path"],
        optimizer=str(training["optim"]),
        settings=optimizer["config"] if optimizer else training,
        layers=layer_table(optimizer["layers"]) if optimizer else "",
        seed=training["seed"],
        curves="curves.png" if found["history"] else None,
        metrics={name: value for name, value in scores.items() if value is not None},
        signatures={n: test[f"{n}_signature"] for n in scores if f"{n}_signature" in test},
        limits=list(task.limits),
        custom_code=found.get("custom_code", False),
        **found["environment"],
    )


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
