"""Execute one run in its own process and turn its outcome into a result."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison.jobs import Job
from comparison.plan import Plan
from comparison.results import thin
from hf_fngd.report.runs import numbers


def execute(plan: Plan, job: Job, work: Path, lock: int) -> dict[str, Any]:
    """Run the training script of a job.

    Args:
        plan: The plan.
        job: The run.
        work: Folder for settings, messages and models.
        lock: Descriptor that the process inherits, so that it stays locked until the process ends.

    Returns:
        The result; its `status` is ok, diverged or failed.
    """
    folder = work / job.label / job.name
    output = folder / "out"
    # Output of a killed run must not be taken for this one's.
    shutil.rmtree(output, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(json.dumps({**job.settings, "output_dir": str(output)}, indent=2) + "\n")
    begin = time.perf_counter()
    with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as err:
        process = subprocess.run(
            [sys.executable, str(plan.script), str(file)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=(lock,),
            check=False,
        )
    total = time.perf_counter() - begin
    metrics, reason = _metrics(output / "metrics.json", process.returncode, folder / "stderr.txt")
    result = {
        "label": job.label,
        "run": job.name,
        "status": "ok",
        "reason": reason,
        "objective_name": plan.objective,
        "objective": None,
        "searched": job.searched,
        "script": plan.script.name,
        "settings": job.settings,
        "environment": _environment(metrics),
        **numbers(metrics),
        **({"misaligned": metrics["misaligned"]} if metrics.get("misaligned") else {}),
        "total_seconds": total,
        **({"history": thin(metrics.get("history", []))} if job.final else {}),
    }
    if reason:
        result["status"] = "failed"
    else:
        _judge(result, metrics, plan, job)
    if not job.final:
        shutil.rmtree(output, ignore_errors=True)
    return result


def _metrics(path: Path, code: int, stderr: Path) -> tuple[dict[str, Any], str | None]:
    if code != 0:
        lines = stderr.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        if code < 0:
            last = f"ended by {signal.Signals(-code).name}; last message: {last}"
        return {}, last[:300]
    try:
        return json.loads(path.read_text(encoding="utf-8")), None
    except (OSError, ValueError):
        return {}, f"the script ended without an error but wrote no readable {path}"


def _judge(result: dict[str, Any], metrics: Mapping[str, Any], plan: Plan, job: Job) -> None:
    history = metrics.get("history", [])
    values = [entry[plan.objective] for entry in history if plan.objective in entry]
    objective = metrics.get("validation", {}).get(plan.objective, values[-1] if values else None)
    losses = [entry[n] for entry in history for n in ("loss", "eval_loss") if n in entry]
    test = metrics.get("test", {})
    missing = [n for n in plan.final_metrics if job.final and not {n, f"test_{n}"} & test.keys()]
    if not all(_is_finite(value) for value in losses):
        result.update(status="diverged", reason="NaN or infinite loss")
    elif objective is None:
        result.update(status="failed", reason=f"metrics.json has no {plan.objective}")
    elif not _is_finite(objective):
        result.update(status="diverged", reason=f"{plan.objective} is {objective}")
    elif missing:
        known = ", ".join(test) or "none"
        result.update(
            status="failed",
            reason=f"metrics.json has no test metric {missing[0]!r}; it has {known}",
        )
    else:
        result["objective"] = objective


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _environment(metrics: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    told = metrics.get("environment", {})
    return {**own, **{name: told[name] for name in ("versions", "device") if name in told}}
