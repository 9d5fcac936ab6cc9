"""Tables of what was measured on a GPU, from the results of bench/gpu.py and gpu_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.tabled import Columns, load, shape, table

RESULT, RUNS = "gpu/gpu.json", "gpu/runs.json"
# Heads of columns, and the kinds of steps in the results.
STEPS = {
    "`fngd_adamw`, later": "fngd_adamw later",
    "`fngd`, later": "fngd later, update_scale=none",
    "with `update_scale=rms`": "fngd later",
    "`fngd_adamw`, first": "fngd_adamw first",
}
RULES = {
    "torch's AdamW, fused": "adamw",
    "`adamw`": "rule adamw",
    "torch's SGD": "torch sgd",
    "`sgd`": "sgd",
    "`sgd`, `update_scale=rms`": "sgd rms",
    "torch's Muon": "torch muon",
    "`muon`": "rule muon",
}


def _machine(found: dict[str, Any]) -> str:
    facts = found["machine"]
    return (
        f"\n\nMachine: {facts['device']}, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, bf16 autocast, {facts['date'][:10]}."
    )


def _operations(part: dict[str, Any]) -> float | str:
    if "work" not in part:
        return "not counted"
    first, adamw = (part["work"][kind]["operations"] for kind in ("fngd_adamw first", "adamw"))
    return first / adamw


def gpu_costs() -> str:
    """Make the table of step times and memory."""
    found = load(RESULT)
    shapes = [
        {**part, "workload": found["workloads"][name.split()[1]]}
        for name, part in found["results"].items()
        if name.startswith("shape ") and "times" in part
    ]

    def time(part: Any, kind: str) -> float:
        return part["times"][kind]["ratio"]

    columns: Columns = {
        "": lambda r: shape({"workload": {**r["workload"], "bf16": False}}),
        "AdamW": lambda r: f"{1000 * r['times']['adamw']['seconds']:.1f} ms",
        "launching": lambda r: (
            r["times"]["adamw"]["launch_seconds"] / r["times"]["adamw"]["seconds"]
        ),
        **{head: lambda r, kind=kind: time(r, kind) for head, kind in STEPS.items()},
        "its operations": _operations,
        "memory": lambda r: r["memory"]["fngd_adamw later"]["ratio"],
        "of `fngd`": lambda r: r["memory"]["fngd later"]["ratio"],
    }
    return table(shapes, columns) + _machine(found)


def gpu_methods() -> str:
    """Make the table of the other methods."""
    results = load(RESULT)["results"]
    names = [name for name, part in results.items() if "to_adamw" in part]
    columns: Columns = {
        "method": lambda name: f"`{name.removeprefix('method ')}`",
        "step": lambda name: f"{1000 * results[name]['seconds']:.1f} ms",
        "to AdamW": lambda name: results[name]["to_adamw"],
        "to a later epoch of FNGD": lambda name: results[name]["to_fngd_later"],
    }
    return table(names, columns)


def gpu_rules() -> str:
    """Make the table of the update rules alone."""
    results = load(RESULT)["results"]["rules"]
    columns: Columns = {
        "optimizer.step()": str,
        "time": lambda head: f"{1000 * results[RULES[head]]['seconds']:.2f} ms",
        "to torch's fused AdamW": lambda head: results[RULES[head]]["ratio"],
    }
    return table(RULES, columns)


GPU_TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make for make in (gpu_costs, gpu_methods, gpu_rules)
}
