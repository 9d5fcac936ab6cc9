"""What a finished run left behind, read back: its settings, its course and its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fngd.errors import FNGDError


def read_run(folder: Path) -> dict[str, Any]:
    """Reads metrics.json of a training script, or else the trainer_state.json of any Trainer.

    Args:
        folder: Output folder of the run.

    Returns:
        `settings` (of the training, as far as known), `environment`, `history`, and what `numbers`
        gives.

    Raises:
        FNGDError: If neither file tells of a training.
    """
    if not folder.is_dir():
        raise FNGDError(f"there is no folder {str(folder)!r}: give the --output_dir of a run")
    metrics = _read(folder / "metrics.json")
    if not _is_history(metrics.get("history")):
        history = _read(folder / "trainer_state.json").get("log_history")
        if not isinstance(history, list) or not _is_history(history):
            raise FNGDError(
                f"{str(folder)!r} is no finished run: it has no metrics.json and no "
                "trainer_state.json with a history of training; give the --output_dir of one that "
                "has ended"
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
    """Gathers the numbers of a run.

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


def _is_history(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(entry, dict) and "step" in entry for entry in value)
        # A run shorter than logging_steps has logged no loss, but what it ended with.
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
