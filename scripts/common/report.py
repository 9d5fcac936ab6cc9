"""Files of a finished run: metrics.json, predictions.jsonl, pictures and the card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tabulate import tabulate
from transformers import Trainer

from common.facts import card_facts, environment, local_base, optimizer_facts
from common.source import describe
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.report.plots import kept_coefficients, plot_coefficients, plot_history, summary
from hf_fngd.report.runs import METRIC_NAMES, format_score


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that people can read.

    Args:
        path: The file.
        content: Builtins.
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a row.

    Args:
        path: The file.
        rows: Builtins.
    """
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_run(
    trainer: Trainer,
    found: dict[str, Any],
    data_args: Any,
    metric: str,
    loss_label: str,
    *modules: ModuleType,
) -> list[Path]:
    """Write metrics.json and the pictures into the output folder.

    Args:
        trainer: A Trainer.
        found: Content of metrics.json; `environment`, `optimizer`, `local_base` and `train_rows`
            are added.
        data_args: Dataclass of data arguments.
        metric: Name of the metric of the curves.
        loss_label: What the loss measures.
        *modules: Modules whose version matters as well.

    Returns:
        The files.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found["environment"] = environment(*modules)
    if trainer.train_dataset is not None:
        found["train_rows"] = len(trainer.train_dataset)
    found |= optimizer_facts(trainer) | local_base(found["settings"]["model"])
    kept = kept_coefficients(unwrap_optimizer(trainer.optimizer))
    if kept:
        found["optimizer"]["coefficients"] = summary(kept)
    write_json(folder / "metrics.json", found)
    written = [folder / "metrics.json"]
    if found.get("history"):
        title = f"{describe(data_args, 'train')}, {found['settings']['training']['optim']}"
        path = folder / "curves.png"
        plot_history(path, found["history"], title, metric, loss_label)
        written.append(path)
    if kept:
        path = folder / "coefficients.png"
        plot_coefficients(path, kept, found.get("history", []))
        written.append(path)
    return written


def finish(
    trainer: Any, found: dict[str, Any], written: list[Path], metrics: Sequence[str]
) -> None:
    """Write the card after a training, and print the summary.

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
    """Print losses, scores, and the paths of all files.

    Args:
        found: Content of metrics.json.
        written: Files.
        metrics: Names of the metrics; the first one is the one of the curves.
    """
    table = _evaluations(found.get("history", []), metrics[0])
    if table:
        print("\n" + tabulate(table, headers="keys", disable_numparse=True, stralign="right"))
    for split, prefix in (("validation", "eval"), ("test", "test")):
        scores = found.get(split, {})
        for name in (one for one in metrics if f"{prefix}_{one}" in scores):
            value = format_score(name, scores[f"{prefix}_{name}"])
            signature = scores.get(f"{name}_signature", "")
            print(f"{split} {METRIC_NAMES.get(name, name)}: {value}   {signature}".rstrip())
    for path in written:
        print(f"written: {path}")


def _evaluations(history: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, str]]:
    """Rows of the summary's table: one for each evaluation, else one for each logged loss."""
    key = f"eval_{metric}"
    evaluated = any("eval_loss" in entry for entry in history)
    rows, loss = [], ""
    for entry in history:
        if "loss" in entry:
            loss = f"{entry['loss']:.3f}"
        if ("eval_loss" if evaluated else "loss") not in entry:
            continue
        row = {"epoch": f"{entry['epoch']:.4g}", "training loss": loss}
        if evaluated:
            row["validation loss"] = f"{entry['eval_loss']:.3f}"
        if key in entry:
            row[METRIC_NAMES.get(metric, metric)] = format_score(metric, entry[key])
        rows.append(row)
    return rows
