"""Results of runs: a single file for each while a comparison runs, one file for all afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.folding import fold, unfold
from comparison.jobs import Job
from comparison.plan import PlanError

FOLDED = "runs.jsonl"
TRAINING_POINTS = 150
EVALUATION_POINTS = 50
_NOISE = ("_runtime", "_per_second")

Runs = dict[tuple[str, str], dict[str, Any]]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Read every run of a study.

    Args:
        folder: Its folder of results.

    Returns:
        Results, sorted by label and name. Among their keys are `label`, `run` (such as `search-01`
        or `final-seed1`), `status`, `reason`, `objective`, `searched`, `settings`, `validation`,
        `test` and, for final runs, `history`.

    Raises:
        PlanError: If a file cannot be read.
    """
    singles = {_key(run): run for run in _singles(folder).values()}
    found = {**_folded(folder), **singles}
    return [found[key] for key in sorted(found)]


def read(folder: Path, job: Job, script: str) -> dict[str, Any] | None:
    """Find the result of a run that was made before.

    Args:
        folder: Folder of all results.
        job: The run.
        script: Name of the training script.

    Returns:
        The result; None if the run is still to be made.

    Raises:
        PlanError: If the result cannot be read, or belongs to other settings.
    """
    path = result_path(folder, job)
    place, remove = str(path), f"delete {path}"
    # The single file first: another process may fold it in between.
    found = _single(path)
    if found is None:
        place = f"{job.label} {job.name} in {folder / FOLDED}"
        remove = f"delete its line in {folder / FOLDED}"
        found = _folded(folder).get((job.label, job.name))
    if found is None:
        return None
    made_with = {"script": found["script"], **found["settings"]}
    wanted = {"script": script, **job.settings}
    for name in sorted({*wanted, *made_with}):
        if wanted.get(name) != made_with.get(name):
            raise PlanError(
                f"{place} was made with {name}={made_with.get(name)!r}, the plan now says "
                f"{wanted.get(name)!r}: {remove} to run it again, or give another --results folder"
            )
    return found


def write_run(folder: Path, job: Job, result: Mapping[str, Any]) -> None:
    """Write the single file of a run.

    Args:
        folder: Folder of all results.
        job: The run.
        result: Its result.
    """
    with _locked(folder):
        write(result_path(folder, job), result)


def fold_runs(folder: Path) -> None:
    """Move the single files of a study into its one file.

    Args:
        folder: Folder of all results.

    Raises:
        PlanError: If a file cannot be read.
    """
    if not (folder / "runs").exists():
        return
    with _locked(folder):
        singles = _singles(folder)
        if singles:
            write_text(folder / FOLDED, fold(read_runs(folder)))
        for path in singles:
            path.unlink()
        for empty in [*(folder / "runs").glob("*"), folder / "runs"]:
            with contextlib.suppress(OSError):  # something else lies there
                empty.rmdir()


def result_path(folder: Path, job: Job) -> Path:
    """Return the path of a run's single file.

    Args:
        folder: Folder of all results.
        job: The run.

    Returns:
        Path of a JSON file.
    """
    return folder / "runs" / job.label / f"{job.name}.json"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, with a line for each key.

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
    """Write a text file atomically.

    Args:
        path: The file.
        text: Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def thin(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep evenly spread entries of a log history, first and last included.

    Args:
        history: The Trainer's log history.

    Returns:
        Entries with `step`, `train_seconds` if it is there, and losses or validation metrics.
    """
    training = _spread([e for e in history if "loss" in e], TRAINING_POINTS)
    evaluations = _spread([e for e in history if "eval_loss" in e], EVALUATION_POINTS)
    return [_kept(e) for e in sorted(training + evaluations, key=lambda e: e["step"])]


def _key(run: Mapping[str, Any]) -> tuple[str, str]:
    return run["label"], run["run"]


def _singles(folder: Path) -> dict[Path, dict[str, Any]]:
    found = {path: _single(path) for path in (folder / "runs").glob("*/*.json")}
    return {path: run for path, run in found.items() if run is not None}


def _single(path: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        usable = _key(run) == (path.parent.name, path.stem)
        usable = usable and isinstance(run["script"], str) and isinstance(run["settings"], dict)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise PlanError(
            f"{path} is not the result of a run: delete it to run it again, or give another "
            "--results folder"
        )
    return run


def _folded(folder: Path) -> Runs:
    path = folder / FOLDED
    try:
        stat = path.stat()
        return _parsed(path, stat.st_ino, stat.st_mtime_ns)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise PlanError(
            f"{path} is not a file of runs: restore it, or give another --results folder"
        ) from None


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, inode: int, changed: int) -> Runs:
    return {_key(run): run for run in unfold(path.read_text(encoding="utf-8"))}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep processes that share the folder from writing and folding at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
