"""What a finished run left in its folder: settings, history and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_fngd import FNGDError

# How people write the metrics; every other one is shown under its own name.
METRIC_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "Accuracy",
    "perplexity": "Perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
_PERCENT = ("bleu", "chrf", "rouge")
# What the Trainer itself adds to the metrics of an evaluation.
_NO_SCORE = re.compile(r"loss|epoch|train_seconds|.*(runtime|_per_second|_time)|.*mem_.*")
# The training loss of the last quarter of a run falls by this share, or more, and the validation
# loss by less than this part of that fall: the run overfits.
_LAST_PART, _LEAST_FALL, _LEAST_GAIN = 0.25, 0.05, 0.1


def read_run(folder: Path) -> dict[str, Any]:
    """Read the metrics.json of a training script, or else the trainer_state.json of any Trainer.

    Args:
        folder: Output folder of the run.

    Returns:
        `settings` (of the training, as far as known), `environment`, `history`, and the entries of
        `numbers`.

    Raises:
        FNGDError: If neither file has the history of a training.
    """
    if not folder.is_dir():
        raise FNGDError(f"there is no folder {str(folder)!r}: give the --output_dir of a run")
    metrics = _read(folder / "metrics.json")
    if not _is_history(metrics.get("history")):
        history = _read(folder / "trainer_state.json").get("log_history")
        if not isinstance(history, list) or not _is_history(history):
            raise FNGDError(
                f"{str(folder)!r} is no finished run: it has no metrics.json and no "
                "trainer_state.json with a history of training; give the --output_dir of a "
                "finished run"
            )
        timed = [entry for entry in history if "train_runtime" in entry]
        metrics = {"history": history, "train": timed[-1] if timed else {}}
    return {
        "settings": metrics.get("settings", {}).get("training", {}),
        "environment": metrics.get("environment", {}),
        "history": metrics["history"],
        **numbers(metrics),
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the numbers of a run.

    Args:
        metrics: Content of metrics.json.

    Returns:
        `steps`, `train_loss` (the last one logged), `train_seconds`, `seconds_per_step`,
        `evaluation_in_seconds` (whether the seconds include evaluations), `validation`, `test`.
    """
    history = metrics.get("history", [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    steps = max((entry["step"] for entry in history), default=0)
    timed = [entry for entry in history if "train_seconds" in entry]
    if timed:
        seconds, timed_steps = timed[-1]["train_seconds"], timed[-1]["step"]
    else:
        seconds, timed_steps = metrics.get("train", {}).get("train_runtime"), steps
    return {
        "steps": steps,
        "train_loss": losses[-1] if losses else None,
        "train_seconds": seconds,
        "seconds_per_step": seconds / timed_steps if seconds and timed_steps else None,
        "evaluation_in_seconds": not timed,
        "validation": metrics.get("validation", {}),
        "test": metrics.get("test", {}),
    }


def scores(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Select the scores among the metrics of an evaluation.

    Args:
        metrics: Metrics that `Trainer.evaluate` or `Trainer.predict` returned, and others.
        prefix: `eval` or `test`.

    Returns:
        Every number by the name of its metric, without the prefix; no loss and no seconds.
    """
    named = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, int | float) and not _NO_SCORE.fullmatch(name)
    }


def format_score(name: str, value: float) -> str:
    """Write a score: two decimals for a percentage or a number of at least 1, else four.

    Args:
        name: Name of the metric.
        value: Its value.

    Returns:
        The number as text.
    """
    return f"{value:.2f}" if name.startswith(_PERCENT) or abs(value) >= 1 else f"{value:.4f}"


def overfitting(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Find the part of a training in which only the training loss fell.

    The part begins at an evaluation, holds at least two later ones and a quarter of all steps, and
    lasts to the end. In it the training loss falls by at least 5 %, and the best later validation
    loss is below the first one by less than a tenth of that fall, or not at all. The training loss
    at an evaluation is the mean of the losses logged since the evaluation before, so that single
    batches do not decide.

    Args:
        history: The Trainer's log history.

    Returns:
        A sentence on the longest such part, or None if there is none.
    """
    validation = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    training = {}
    for before, step in pairwise(sorted({0, *validation})):
        logged = [e["loss"] for e in history if "loss" in e and before < e["step"] <= step]
        if logged:
            training[step] = fmean(logged)
    steps = list(training)
    for index, start in enumerate(steps[:-2]):
        end, best = steps[-1], min(validation[step] for step in steps[index + 1 :])
        fall = training[start] - training[end]
        if (
            end - start >= _LAST_PART * end
            and fall >= _LEAST_FALL * training[start]
            and validation[start] - best < _LEAST_GAIN * fall
        ):
            change = "rose" if validation[end] > validation[start] else "hardly fell"
            return (
                f"The model began to overfit: from step {start} to step {end} the training loss "
                f"fell from {training[start]:.3g} to {training[end]:.3g}, while the validation "
                f"loss {change}, from {validation[start]:.3g} to {validation[end]:.3g}."
            )
    return None


def _is_history(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(entry, dict) and "step" in entry for entry in value)
        # A run shorter than logging_steps has no loss in its history, but its last entry.
        and any({"loss", "eval_loss", "train_runtime"} & entry.keys() for entry in value)
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FNGDError(f"cannot read {str(path)!r} ({error}): leave the run out") from None
    return found if isinstance(found, dict) else {}
