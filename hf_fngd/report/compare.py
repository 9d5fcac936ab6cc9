"""`python -m hf_fngd compare RUN...`: a table of finished runs and, on request, a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from hf_fngd import FNGDError
from hf_fngd.errors import suggestion
from hf_fngd.report.plots import plot
from hf_fngd.report.runs import read_run

_METRICS = ("eval_bleu", "eval_accuracy", "eval_chrf", "eval_loss")
_NOISE = ("_runtime", "_per_second", "_signature")
_NONE = "–"


def main(arguments: Sequence[str]) -> None:
    """Print the table, and draw losses and validation metric if `--plot` names a file.

    A folder without a finished run and an unknown metric end the program with exit code 2.

    Args:
        arguments: Words after `compare`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except FNGDError as error:
        parser.error(str(error))


def _compare(options: argparse.Namespace) -> None:
    runs = {label: read_run(folder) for label, folder in _labels(options.runs).items()}
    metric = _metric(options.metric, runs)
    rows = [_row(label, run, metric) for label, run in runs.items()]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    print("\n" + "\n".join(f"- {note}" for note in _notes(list(runs.values()))))
    if options.plot is None:
        return
    try:
        plot(options.plot, {label: [run] for label, run in runs.items()}, metric)
    except OSError as error:
        raise FNGDError(f"--plot: cannot write {str(options.plot)!r}: {error.strerror}") from None
    # On stderr, since the table on stdout often goes into a file.
    print(f"written: {options.plot}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_fngd compare",
        description="Print a Markdown table of finished runs: settings, losses, scores and "
        "seconds. Reads the metrics.json of the training scripts, or the trainer_state.json of "
        "any Trainer.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="output folder of a run")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help=f"validation metric (default: the first logged one of {', '.join(_METRICS)})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="also draw training loss and metric against steps and seconds into this PNG file",
    )
    return parser


def _labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Name each run by its folder, or by the whole path where two folders have the same name."""
    names = [folder.resolve().name for folder in dict.fromkeys(folders)]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, dict.fromkeys(folders), strict=True)
    }


def _metric(wanted: str | None, runs: Mapping[str, Mapping[str, Any]]) -> str:
    logged = {name for run in runs.values() for entry in run["history"] for name in entry}
    if wanted is None:
        return next((one for one in _METRICS if one in logged), _METRICS[-1])
    if wanted not in logged:
        known = sorted(name for name in logged if _is_metric("eval_", name))
        if not known:
            raise FNGDError("--metric: no run has logged a validation metric, so leave it out")
        raise FNGDError(f"--metric: no run has logged {wanted!r}: {suggestion(wanted, known)}")
    return wanted


def _row(label: str, run: Mapping[str, Any], metric: str) -> dict[str, str]:
    settings = run["settings"]
    values = [entry[metric] for entry in run["history"] if metric in entry]
    last = run["validation"].get(metric, values[-1] if values else None)
    scores = {
        name: value
        for name, value in run["test"].items()
        if _is_metric("test_", name) and isinstance(value, int | float)
    }
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
    return name.startswith(prefix) and not name.endswith(_NOISE)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        "The training loss is the last logged one, in the unit of its own run.",
        "Each run has one seed.",
    ]
    places = []
    for run in runs:
        place = {name: run["environment"].get(name) for name in ("device", "versions")}
        if place not in places:
            places.append(place)
    if len(places) > 1:
        notes.append(
            "The seconds cannot be compared: the runs used different machines or versions."
        )
    if any(run["evaluation_in_seconds"] for run in runs):
        notes.append("Without train_seconds in its history, a run's seconds include evaluations.")
    return notes
