"""`python -m hf_fngd compare RUN...`: a table and a picture of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from hf_fngd.errors import FNGDError
from hf_fngd.report.plots import plot
from hf_fngd.report.runs import read_run

_METRICS = ("eval_bleu", "eval_accuracy", "eval_chrf", "eval_loss")
_NOISE = ("_runtime", "_per_second")
_NONE = "–"


def main(arguments: Sequence[str]) -> None:
    """Prints the table, and draws losses and validation metric against steps and seconds.

    Args:
        arguments: Words after `compare`.

    Raises:
        FNGDError: If a folder holds no finished run, or no run has the metric.
    """
    options = _parser().parse_args(arguments)
    runs = {label: read_run(folder) for label, folder in _labels(options.runs).items()}
    logged = {name for run in runs.values() for entry in run["history"] for name in entry}
    metric = options.metric or next((one for one in _METRICS if one in logged), _METRICS[-1])
    if options.metric and metric not in logged:
        known = ", ".join(sorted(name for name in logged if _is_metric("eval_", name))) or "none"
        raise FNGDError(f"--metric: no run has logged {metric!r}; logged: {known}")
    rows = [_row(label, run, metric) for label, run in runs.items()]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    notes = _notes(list(runs.values()))
    if notes:
        print("\n" + "\n".join(f"- {note}" for note in notes))
    try:
        plot(options.plot, {label: [run] for label, run in runs.items()}, metric)
    except OSError as error:
        raise FNGDError(f"--plot: cannot write {str(options.plot)!r}: {error.strerror}") from None
    # Not among the lines of the table, which are likely to go into a file.
    print(f"written: {options.plot}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_fngd compare",
        description="Compares finished runs: a Markdown table of settings, losses, scores and "
        "seconds, and a picture of their course. Reads metrics.json of the training scripts, or "
        "the trainer_state.json of any Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="output folder of a run")
    parser.add_argument(
        "--metric", help=f"validation metric; the first of {', '.join(_METRICS)} by default"
    )
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="PNG file")
    return parser


def _labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Names runs by their folders, or by the whole path where two are called the same.

    Returns:
        Folder by label; a folder that is given twice is there once.
    """
    names = [folder.resolve().name for folder in dict.fromkeys(folders)]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, dict.fromkeys(folders), strict=True)
    }


def _row(label: str, run: Mapping[str, Any], metric: str) -> dict[str, str]:
    settings = run["settings"]
    values = [entry[metric] for entry in run["history"] if metric in entry]
    last = run["validation"].get(metric, values[-1] if values else None)
    scores = {n: v for n, v in run["test"].items() if _is_metric("test_", n)}
    return {
        "run": label.replace("|", "\\|"),
        "optimizer": str(settings.get("optim", _NONE)),
        "learning rate": _number(settings.get("learning_rate")),
        "seed": str(settings.get("seed", _NONE)),
        "steps": str(run["steps"]),
        "training loss": _number(run["train_loss"]),
        f"validation: {metric}": _number(last),
        **{name.replace("_", " ", 1): _number(value) for name, value in scores.items()},
        "s / step": _number(run["seconds_per_step"]),
        "training s": _number(run["train_seconds"]),
    }


def _is_metric(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and not name.endswith((*_NOISE, "_signature"))


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = ["Training loss: the last logged one, in the unit of its own run. One run is one seed."]
    places = []
    for run in runs:
        place = {name: run["environment"].get(name) for name in ("device", "versions")}
        if place not in places:
            places.append(place)
    if len(places) > 1:
        notes.append("Made on different machines or versions: the seconds do not compare.")
    if any(run["evaluation_in_seconds"] for run in runs):
        notes.append("The seconds of runs without train_seconds include their evaluations.")
    return notes
