r"""Measure the peak memory of training: FNGD against torch's AdamW.

Each variant trains in a separate process, whose peak is its largest resident set, Python and torch
included. Freed tensors go back to the system at once (glibc would keep some, by chance hundreds of
MiB), so that the peak is what is in use.

    python scripts/bench/memory.py --output scripts/bench/results/memory/marian_256_b64.json

all_shapes.py runs it on shapes of the page. With --savings it measures what activation
checkpointing saves, in both of its modes:

    python scripts/bench/memory.py --savings --length 64 --steps 2 \
        --output scripts/bench/results/checkpointing.json
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from measure import parse, print_table, write_results
from workload import MODES, VARIANTS, Workload, make_step

# malloc takes blocks of so many bytes and more by mmap; the threshold, once set, does not grow.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
CHECKPOINTED = ("adamw", "fngd_adamw first epoch", "fngd_adamw later epochs")


@dataclass
class Options:
    """Number of steps, and the result file."""

    steps: int = field(default=6, metadata={"help": "Training steps of each process."})
    repeats: int = field(default=1, metadata={"help": "Processes of each variant."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    savings: bool = field(
        default=False, metadata={"help": "Measure what activation checkpointing saves."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "Measure this one in the present process (internal)."}
    )


def print_peak() -> None:
    """Print the largest resident set of this process so far, for `peak_of`."""
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def peak_of(arguments: Sequence[str], repeats: int) -> list[float]:
    """Run the present script again, in processes that end with `print_peak`.

    Args:
        arguments: The command line.
        repeats: Number of processes, one after the other.

    Returns:
        Peak memory of each in MiB.
    """
    command, variables = [sys.executable, sys.argv[0], *arguments], {**os.environ, **MALLOC}
    peaks = []
    for _ in range(repeats):
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
        peaks.append(json.loads(run.stdout.splitlines()[-1])["peak_mib"])
    return peaks


def compare(options: Options) -> dict[str, dict[str, Any]]:
    """Measure all variants, and their ratios to AdamW."""
    peaks = {
        name: peak_of([*sys.argv[1:], "--variant", name], options.repeats) for name in VARIANTS
    }
    base = min(peaks["adamw"])
    return {
        name: {"peak_mib": min(found), "ratio": min(found) / base, "all_mib": found}
        for name, found in peaks.items()
    }


def savings(options: Options) -> dict[str, dict[str, Any]]:
    """Measure some variants in each mode of checkpointing."""
    table = {}
    for name in CHECKPOINTED:
        words = [*sys.argv[1:], "--variant", name, "--checkpointing"]
        peaks = {mode: peak_of([*words, mode], options.repeats) for mode in MODES}
        least = {mode: min(found) for mode, found in peaks.items()}
        saved = {mode: least["none"] - least[mode] for mode in MODES[1:]}
        table[name] = {"peak_mib": least, "saved_mib": saved, "all_mib": peaks}
    return table


def main() -> None:
    """Run the benchmark from the command line."""
    workload, options = parse([Workload, Options], __doc__)
    if options.variant:
        step = make_step(workload, options.variant)
        for _ in range(options.steps):
            step()
        print_peak()
        return
    table = savings(options) if options.savings else compare(options)
    print_table({n: row["peak_mib"] for n, row in table.items()} if options.savings else table)
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
