"""Execute the runs of a plan one after the other and skip those that have a result."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from comparison import results
from comparison.jobs import Job, final_jobs, search_jobs
from comparison.outcome import choice, timed_jobs
from comparison.plan import Plan, PlanError
from comparison.run import execute


class Campaign:
    """The runs of a plan.

    Args:
        plan: The plan.
        folder: Folder of results.
        work: Folder of settings, messages and models.
        only: Labels to run; default: all.
        max_minutes: No run starts after this many minutes.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        work: Path,
        only: Sequence[str] | None = None,
        max_minutes: float | None = None,
    ) -> None:
        self.plan, self.folder, self.work = plan, folder, work
        self.labels = [label for label in plan.optimizers if not only or label in only]
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.trials = search_jobs(plan)

    def check(self) -> None:
        """Read all earlier results, so that a changed plan is refused before anything runs."""
        for label in self.labels:
            chosen = choice(self.plan, self.folder, label)
            final = final_jobs(self.plan, label, chosen["searched"]) if chosen else []
            for job in [*final, *(timed_jobs(self.plan, self.folder, label) or [])]:
                self._read(job)

    def search(self) -> None:
        """Execute the missing search trials."""
        self._make([self.trials[label] for label in self.labels])

    def final(self, strict: bool) -> None:
        """Execute the missing final runs of the optimizers whose search is complete.

        Args:
            strict: Refuse an incomplete search instead of skipping the optimizer.

        Raises:
            PlanError: If strict, and a search is incomplete.
        """
        jobs = []
        for label in self.labels:
            missing = sum(self._read(job) is None for job in self.trials[label])
            if missing and strict:
                raise PlanError(f"{missing} trials of {label} are missing: run --stage search")
            chosen = choice(self.plan, self.folder, label)
            if chosen:
                jobs.append(final_jobs(self.plan, label, chosen["searched"]))
            elif not missing:
                print(f"{label}: no trial has a finite {self.plan.objective}, so no final runs")
        self._make(jobs)

    def timed(self, strict: bool) -> None:
        """Execute the missing runs of equal time, if the plan has `equal_time`.

        Args:
            strict: Refuse missing final runs instead of skipping the optimizer.

        Raises:
            PlanError: If strict, and the plan has no `equal_time` or a final run is missing.
        """
        if strict and self.plan.equal_time is None:
            raise PlanError("the plan has no equal_time: add it with the label of an optimizer")
        columns = []
        for label in self.labels:
            jobs = timed_jobs(self.plan, self.folder, label)
            if jobs is None and strict:
                both = f"{self.plan.equal_time} or {label}"
                raise PlanError(f"final runs of {both} are missing: run --stage final")
            columns.append(jobs or [])
        self._make(columns)

    def _read(self, job: Job) -> dict[str, Any] | None:
        return results.read(self.folder, job, self.plan.script.name)

    def _make(self, columns: Sequence[Sequence[Job]]) -> None:
        # Optimizers take turns, so that a slow hour of the machine affects all of them.
        jobs = [job for row in zip_longest(*columns) for job in row if job is not None]
        todo = [job for job in jobs if self._read(job) is None]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} runs have a result", flush=True)
        if not todo:
            return
        with _locked(self.work) as lock:
            for number, job in enumerate(todo, start=1):
                if self.end is not None and time.monotonic() > self.end:
                    left = len(todo) - number + 1
                    print(f"time is up, {left} runs left; the same command resumes", flush=True)
                    return
                if self._read(job) is not None:  # another process ran it while this one waited
                    continue
                result = execute(self.plan, job, self.work, lock)
                results.write_run(self.folder, job, result)
                print(f"[{number}/{len(todo)}] {_line(job, result)}", flush=True)


def _line(job: Job, result: dict[str, Any]) -> str:
    values = " ".join(f"{name}={value:g}" for name, value in job.searched.items())
    outcome = result["reason"] or f"{result['objective_name']} {result['objective']:.5g}"
    seconds = result["total_seconds"]
    return f"{job.label} {job.name} {values}: {result['status']}, {outcome}, {seconds:.0f} s"


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[int]:
    """Wait until no other comparison, nor a training process that it left behind, uses the folder.

    The training process inherits the descriptor, so the lock of a killed comparison lasts until its
    last run ends.

    Yields:
        The descriptor.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another run in {work} has not ended", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
