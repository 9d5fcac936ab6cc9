"""Peak memory of training: FNGD against torch's AdamW, each in a process of its own.

The peak is the largest resident set of the process; what it was before the first step (Python,
torch, the model) is reported beside it. Freed tensors go back to the system at once (glibc would
keep some, by chance hundreds of MiB), so that the peak is what is in use.

    python scripts/bench/memory.py --output scripts/bench/results/memory.json
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


def peak_of(variant: str, arguments: Sequence[str]) -> float:
    """Trains one variant in a process of its own.

    Args:
        variant: A name in `VARIANTS`.
        arguments: The command line beside it.

    Returns:
        Its peak memory in MiB.
    """
    command = [sys.executable, __file__, *arguments, "--variant", variant]
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


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Workload, Options], description=__doc__)
    workload, options = parser.parse_args_into_dataclasses()
    if options.variant:
        measure_here(workload, options)
        return
    peaks: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, values in peaks.items():
            values.append(peak_of(name, sys.argv[1:]))
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
