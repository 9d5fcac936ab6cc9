"""The plan file of a comparison, read and checked before anything runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
KNOWN_SCRIPTS = ("run_translation", "run_image_classification")
# Objectives on the validation set, and whether a larger value is better.
OBJECTIVES = {"eval_loss": False, "eval_accuracy": True, "eval_bleu": True, "eval_chrf": True}
# Settings that the comparison chooses for each run.
RESERVED = ("optim", "optim_args", "output_dir", "do_train", "do_eval", "do_predict")
REQUIRED = ("script", "base", "optimizers", "trials", "final_seeds", "objective")
OPTIONAL = ("seed", "search_overrides", "final_metrics", "equal_time", "timed", "paired_with")


class PlanError(ValueError):
    """A plan or an earlier result cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Optimizer:
    """One row of the comparison."""

    label: str
    optim: str
    optim_args: dict[str, Any]
    search: dict[str, tuple[float, float]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A checked plan."""

    path: Path
    script: Path
    base: dict[str, Any]
    optimizers: dict[str, Optimizer]
    trials: int
    seed: int
    search_overrides: dict[str, Any]
    final_seeds: tuple[int, ...]
    objective: str
    final_metrics: tuple[str, ...]
    equal_time: str | None
    timed: bool
    paired_with: str | None

    @property
    def more_is_better(self) -> bool:
        """Whether a larger objective is better."""
        return OBJECTIVES[self.objective]


def shown(path: Path) -> str:
    """Return a path as text, relative to the current folder if it lies inside."""
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(path)


def load_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Args:
        path: JSON file.

    Returns:
        The plan.

    Raises:
        PlanError: If the plan cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text, object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from None
    _check_names("the plan", raw, REQUIRED, OPTIONAL)
    base = _settings("base", raw["base"])
    overrides = _settings("search_overrides", raw.get("search_overrides", {}))
    objective = raw["objective"]
    if objective not in OBJECTIVES:
        raise PlanError(f"unknown objective {objective!r}: choose {', '.join(OBJECTIVES)}")
    optimizers = raw["optimizers"]
    if not (isinstance(optimizers, dict) and optimizers):
        raise PlanError("optimizers is empty: give at least one label with its settings")
    seeds = [_whole("final_seeds", seed, 0) for seed in _list("final_seeds", raw["final_seeds"])]
    if not seeds or len(set(seeds)) < len(seeds):
        raise PlanError(f"final_seeds must be one or more different numbers, not {seeds}")
    metrics = _list("final_metrics", raw.get("final_metrics", []))
    if not all(isinstance(name, str) for name in metrics):
        raise PlanError(f"final_metrics must be a list of names, not {metrics!r}")
    reference, paired_with = raw.get("equal_time"), raw.get("paired_with")
    for name, label in (("equal_time", reference), ("paired_with", paired_with)):
        if label is not None and label not in optimizers:
            raise PlanError(f"{name} {label!r} is not a label: choose {', '.join(optimizers)}")
    timed = raw.get("timed", True)
    if not isinstance(timed, bool):
        raise PlanError(f"timed must be true or false, not {timed!r}")
    if reference is not None and not timed:
        raise PlanError(
            "equal_time needs seconds, and timed=false says that they are not reliable: "
            "remove one of the two"
        )
    trials = _whole("trials", raw["trials"], 0)
    return Plan(
        path=path,
        script=_script(raw["script"]),
        base=base,
        optimizers={
            label: _optimizer(label, entry, trials > 0) for label, entry in optimizers.items()
        },
        trials=trials,
        seed=_whole("seed", raw.get("seed", 0), 0),
        search_overrides=overrides,
        final_seeds=tuple(seeds),
        objective=objective,
        final_metrics=tuple(metrics),
        equal_time=reference,
        timed=timed,
        paired_with=paired_with,
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _check_names(
    where: str, entry: Any, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if not isinstance(entry, dict):
        raise PlanError(f"{where} must be a JSON object, not {entry!r}")
    for name in required:
        if name not in entry:
            raise PlanError(f"{where} has no {name!r}: add it")
    for name in entry:
        if name not in (*required, *optional):
            valid = ", ".join((*required, *optional))
            raise PlanError(f"{where} has an unknown name {name!r}: choose {valid}")


def _settings(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise PlanError(f"{where} must be a JSON object, not {entry!r}")
    for name in entry:
        if name in RESERVED:
            raise PlanError(f"{where} sets {name!r}, which the comparison chooses: remove it")
    return entry


def _list(where: str, entry: Any) -> list[Any]:
    if not isinstance(entry, list):
        raise PlanError(f"{where} must be a list, not {entry!r}")
    return entry


def _whole(where: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{where} must be a whole number of at least {least}, not {value!r}")
    return value


def _script(name: Any) -> Path:
    if name in KNOWN_SCRIPTS:
        path = SCRIPTS / f"{name}.py"
    elif isinstance(name, str) and name.endswith(".py"):
        path = Path(name)
    else:
        known = ", ".join(KNOWN_SCRIPTS)
        raise PlanError(f"unknown script {name!r}: choose {known}, or a path that ends in .py")
    if not path.is_file():
        raise PlanError(f"there is no training script {str(path)!r}: check `script`")
    return path


def _optimizer(label: str, entry: Any, searched: bool) -> Optimizer:
    where = f"optimizers.{label}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", label):
        raise PlanError(f"{where}: name the label with letters, digits, '_', '.' and '-' only")
    required = ("optim", "search") if searched else ("optim",)
    _check_names(where, entry, required, ("optim_args", "settings", "search"))
    fixed, search = entry.get("optim_args", {}), entry.get("search", {})
    settings = _settings(f"{where}.settings", entry.get("settings", {}))
    if not (isinstance(entry["optim"], str) and isinstance(fixed, dict)):
        raise PlanError(f"{where}: optim must be a name, and optim_args a JSON object")
    if searched and not (isinstance(search, dict) and search):
        raise PlanError(f"{where}.search is empty: give learning_rate a range [low, high]")
    if search and not searched:
        raise PlanError(f"{where}.search has no effect with trials=0: remove it, or set trials")
    for name in search:
        for place, values in (("optim_args", fixed), ("settings", settings)):
            if name in values:
                raise PlanError(f"{where}: {name!r} is both in {place} and in search: remove one")
    ranges = {name: _range(f"{where}.search.{name}", pair) for name, pair in search.items()}
    return Optimizer(label, entry["optim"], fixed, ranges, settings)


def _range(where: str, pair: Any) -> tuple[float, float]:
    numbers = isinstance(pair, list) and len(pair) == 2
    if not numbers or not all(
        isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)
        for end in pair
    ):
        raise PlanError(f"{where} must be [low, high], not {pair!r}")
    low, high = map(float, pair)
    if not 0 < low < high:
        raise PlanError(f"{where} must have 0 < low < high (it is log-uniform), not {pair!r}")
    return low, high
