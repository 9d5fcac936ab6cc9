"""One JSON file a run: written at once, found again, refused if it belongs to other settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.jobs import Job
from comparison.plan import PlanError

TRAINING_POINTS = {"search": 50, "final": 150}
EVALUATION_POINTS = 50
_NOISE = ("_runtime", "_per_second")


def result_path(folder: Path, job: Job) -> Path:
    """Says where a run's result lies.

    Args:
        folder: Folder of all results.
        job: The run.

    Returns:
        Path of its JSON file.
    """
    return folder / "runs" / job.label / f"{job.name}.json"


def read(folder: Path, job: Job, script: str) -> dict[str, Any] | None:
    """Finds the result of a run that was made before.

    Args:
        folder: Folder of all results.
        job: The run.
        script: Name of the training script.

    Returns:
        The result; None if the run is still to be made.

    Raises:
        PlanError: If the file there cannot be read, or belongs to other settings.
    """
    path = result_path(folder, job)
    if not path.exists():
        return None
    way_out = f"delete {path} to run it again, or give another --results folder"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        made_with = {"script": found["script"], **found["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise PlanError(f"{path} is not the result of a run: {way_out}") from None
    wanted = {"script": script, **job.settings}
    for name in sorted({*wanted, *made_with}):
        if wanted.get(name) != made_with.get(name):
            raise PlanError(
                f"{path} was made with {name}={made_with.get(name)!r}, the plan now says "
                f"{wanted.get(name)!r}: {way_out}"
            )
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, one line a key, so that it is there as a whole or not at all.

    Args:
        path: The file.
        content: Builtins; numbers that are not finite become null.
    """
    lines = [
        f" {json.dumps(name)}: {json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)}"
        for name, value in content.items()
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as a whole or not at all.

    Args:
        path: The file.
        text: Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def thin(history: Sequence[Mapping[str, Any]], final: bool) -> list[dict[str, Any]]:
    """Keeps evenly spread entries of a log history, first and last included.

    Args:
        history: The Trainer's log history.
        final: Whether it is that of a final run, of which more is kept.

    Returns:
        Entries with `step`, `train_seconds` if it is there, and losses or validation metrics.
    """
    most = TRAINING_POINTS["final" if final else "search"]
    training = _spread([e for e in history if "loss" in e], most)
    evaluations = _spread([e for e in history if "eval_loss" in e], EVALUATION_POINTS)
    return [_kept(e) for e in sorted(training + evaluations, key=lambda e: e["step"])]


def _spread(entries: list[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    if len(entries) <= most:
        return entries
    return [entries[i] for i in np.linspace(0, len(entries) - 1, most).round().astype(int)]


def _kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in entry.items()
        if name in ("step", "loss", "train_seconds")
        or (name.startswith("eval_") and not name.endswith(_NOISE))
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
