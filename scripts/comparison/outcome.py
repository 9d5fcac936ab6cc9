"""The results of a plan so far, by optimizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import results
from comparison.jobs import Job, final_jobs, search_jobs
from comparison.plan import Optimizer, Plan
from comparison.search import choose

NONE = "–"


@dataclass
class Outcome:
    """The results of one optimizer so far."""

    optimizer: Optimizer
    trials: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    finals: list[dict[str, Any]] = field(default_factory=list)
    timed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usable(self) -> list[dict[str, Any]]:
        """Final runs with status ok."""
        return [run for run in self.finals if run["status"] == "ok"]

    @property
    def usable_timed(self) -> list[dict[str, Any]]:
        """Runs of equal time with status ok."""
        return [run for run in self.timed if run["status"] == "ok"]

    def numbers(self, name: str, runs: Sequence[Mapping[str, Any]] | None = None) -> list[float]:
        """Collect one number from each run that has it.

        Args:
            name: Key of the result, or name of a test metric.
            runs: Results; default: the usable final runs.

        Returns:
            The numbers.
        """
        some = self.usable if runs is None else runs
        places = ((run, run["test"]) for run in some)
        found = (run.get(name, test.get(name, test.get(f"test_{name}"))) for run, test in places)
        return [value for value in found if value is not None]


def outcomes(plan: Plan, folder: Path) -> list[Outcome]:
    """Return one outcome for each optimizer, in the order of the plan."""
    found = []
    for label, jobs in search_jobs(plan).items():
        chosen = choice(plan, folder, label)
        final = final_jobs(plan, label, chosen["searched"]) if chosen else []
        stages = (jobs, final, timed_jobs(plan, folder, label) or [])
        trials, finals, timed = (_made(plan, folder, stage) for stage in stages)
        found.append(Outcome(plan.optimizers[label], trials, chosen, finals, timed))
    return found


def choice(plan: Plan, folder: Path, label: str) -> Mapping[str, Any] | None:
    """Return the best trial of a complete search.

    Args:
        plan: The plan.
        folder: Folder of results.
        label: The optimizer.

    Returns:
        Its result; None if trials are missing or none is usable. If the plan has no trials: the
        settings of the plan with nothing searched.
    """
    if plan.trials == 0:
        return {"run": None, "searched": {}, "settings": final_jobs(plan, label, {})[0].settings}
    jobs = search_jobs(plan)[label]
    found = _made(plan, folder, jobs)
    return choose(plan, found) if len(found) == len(jobs) else None


def timed_jobs(plan: Plan, folder: Path, label: str) -> list[Job] | None:
    """Return the runs that take as long as the final runs of the plan's `equal_time` optimizer.

    Args:
        plan: The plan.
        folder: Folder of results.
        label: The optimizer.

    Returns:
        A run for each seed; empty if the plan has none for this optimizer; None while the final
        runs that determine the number of steps are incomplete.
    """
    if plan.equal_time in (None, label):
        return []
    mean = {}
    for one in (plan.equal_time, label):
        chosen = choice(plan, folder, one)
        jobs = final_jobs(plan, one, chosen["searched"]) if chosen else []
        runs = _made(plan, folder, jobs)
        if not runs or len(runs) < len(jobs):
            return None
        usable = [run for run in runs if run["status"] == "ok" and run["train_seconds"]]
        if not usable:
            return []
        names = ("train_seconds", "seconds_per_step")
        mean[one] = {name: statistics.mean(run[name] for run in usable) for name in names}
    seconds = mean[plan.equal_time]["train_seconds"]
    steps = max(1, round(seconds / mean[label]["seconds_per_step"]))
    return final_jobs(plan, label, chosen["searched"], steps)


def spread(numbers: Sequence[float]) -> str:
    """Format mean and sample standard deviation, the mean to four digits.

    Args:
        numbers: One for each seed.

    Returns:
        Text; a single number has no deviation.
    """
    if not numbers:
        return NONE
    mean = statistics.mean(numbers)
    digits = 3 if mean == 0 else max(0, 3 - math.floor(math.log10(abs(mean))))
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def difference(name: str, runs: Sequence[Any], others: Sequence[Any]) -> str:
    """Format the mean difference of runs with the same seed, and its standard error.

    Args:
        name: Key of the result.
        runs: Results of one optimizer.
        others: Results of the other.

    Returns:
        Text; a single pair has no error.
    """
    # final-seed1 and timed-seed1 are a pair.
    ours, theirs = (
        {run["run"].split("-")[1]: run[name] for run in some} for some in (runs, others)
    )
    found = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not found:
        return NONE
    if len(found) == 1:
        return f"{found[0]:+.3f}"
    error = statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.mean(found):+.3f} ± {error:.3f}"


def _made(plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    found = (results.read(folder, job, plan.script.name) for job in jobs)
    return [result for result in found if result is not None]
