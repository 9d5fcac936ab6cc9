"""Peak memory of training: FNGD against torch's AdamW, each in a process of its own.

The peak is the largest resident set of the process; what it was before the first step (Python,
torch, the model) is reported beside it. Freed tensors go back to the system at once (glibc would
keep some, by chance hundreds of MiB), so that the peak is what is in use.

    python scripts/bench/memory.py --output scripts/bench/results/memory/marian_256_b64.json

budgets.py runs it on the shapes of README.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser
from workload import VARIANTS, Workload, make_step, write_results

# What malloc gives by mmap, in bytes and more; given, it does not grow.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class Options:
    """How often, and where to."""

    steps: int = field(default=6, metadata={"help": "Training steps of each process."})
    repeats: int = field(default=1, metadata={"help": "Processes of each variant."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    variant: str | None = field(
        default=None, metadata={"help": "Measure this one in the present process (internal)."}
    )


def peak_mib() -> float:
    """Reads the largest resident set of this process so far.

    Returns:
        MiB.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_of(arguments: Sequence[str]) -> float:
    """Runs the present script again, in a process that prints its `peak_mib` as JSON.

    Args:
        arguments: The command line.

    Returns:
        Peak memory in MiB.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    variables = {**os.environ, **MALLOC}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    return json.loads(out.strip().splitlines()[-1])["peak_mib"]


def measure_here(workload: Workload, options: Options) -> None:
    """Trains one variant and prints its memory as JSON.

    Args:
        workload: Shapes.
        options: Number of steps and the variant.
    """
    step = make_step(workload, str(options.variant))
    start = peak_mib()
    for _ in range(options.steps):
        step()
    print(json.dumps({"start_mib": start, "peak_mib": peak_mib()}))


def read_options(description: str | None) -> tuple[Workload, Options]:
    """Reads the command line; with `--variant` measures that one, and ends the process.

    Args:
        description: Text of `--help`.

    Returns:
        Shapes and options.
    """
    parser = HfArgumentParser([Workload, Options], description=description)
    workload, options = parser.parse_args_into_dataclasses()
    if options.variant:
        measure_here(workload, options)
        sys.exit()
    return workload, options


def main() -> None:
    """Runs the benchmark from the command line."""
    workload, options = read_options(__doc__)
    peaks: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, values in peaks.items():
            values.append(peak_of([*sys.argv[1:], "--variant", name]))
    base = min(peaks["adamw"])
    table = {
        name: {"peak_mib": min(values), "ratio": min(values) / base, "all_mib": values}
        for name, values in peaks.items()
    }
    for name, row in table.items():
        print(f"{name:<28}{row['peak_mib']:>8.0f} MiB{row['ratio']:>8.3f}")
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
