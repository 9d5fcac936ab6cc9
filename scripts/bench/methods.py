r"""Time and memory of a training step of every method, by ratio to SGD.

Steps of a method differ: some update curvature, most do not. Each kind is timed by itself, all
methods and kinds interleaved round by round in one process, and a method's step is the mean of its
kinds, weighted by how often they occur. Peak memory is the largest resident set of a process of its
own that runs each kind of step.

    python scripts/bench/methods.py --shapes resnet18 --batch_size 128 \
        --output scripts/bench/results/resnet18.json

Where the package `kfac` (kfac-pytorch) can be imported, it is measured beside our KFAC.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass, field

from kinds_of_steps import VARIANTS, Runner
from memory import peak_mib, peak_of
from transformers import HfArgumentParser
from workload import Workload, write_results


@dataclass
class Options:
    """What is measured, how often, and where to."""

    rounds: int = field(default=5, metadata={"help": "Timed rounds."})
    memory_repeats: int = field(default=1, metadata={"help": "Processes of each method; 0: none."})
    methods: list[str] | None = field(
        default=None, metadata={"help": "Labels of the methods; by default all."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(
        default=None, metadata={"help": "Measure memory of this one here (internal)."}
    )


def chosen(options: Options) -> list[str]:
    """Lists the methods to measure.

    Args:
        options: Command line.

    Returns:
        Labels, SGD first.
    """
    known = [
        label
        for label, variant in VARIANTS.items()
        if variant.package is None or importlib.util.find_spec(variant.package)
    ]
    return [label for label in known if not options.methods or label in ("sgd", *options.methods)]


def time_steps(workload: Workload, options: Options) -> dict[str, dict[str, list[float]]]:
    """Times all kinds of steps, interleaved; the first round is not counted.

    Args:
        workload: Model and batch.
        options: Number of rounds.

    Returns:
        Seconds of every timed step, by method and kind.
    """
    runners = {label: Runner(label, workload) for label in chosen(options)}
    seconds: dict[str, dict[str, list[float]]] = {
        label: {kind: [] for kind in VARIANTS[label].kinds} for label in runners
    }
    for round_number in range(options.rounds + 1):
        for label, runner in runners.items():
            for kind in VARIANTS[label].kinds:
                runner.prepare(kind)
                begin = time.perf_counter()
                runner.step()
                taken = time.perf_counter() - begin
                if round_number:
                    seconds[label][kind].append(taken)
        print(f"round {round_number} of {options.rounds}", file=sys.stderr, flush=True)
    return seconds


def summarise(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """Gives medians, and the mean step at the usual periods by ratio to SGD's.

    Args:
        seconds: Result of `time_steps`.

    Returns:
        Numbers by method and schedule.
    """
    table: dict[str, dict] = {}
    sgd = seconds["sgd"]["step"]
    for label, kinds in seconds.items():
        for schedule, shares in VARIANTS[label].schedules.items():
            rounds = [
                sum(shares[kind] * kinds[kind][i] for kind in shares) for i in range(len(sgd))
            ]
            ratios = sorted(one / base for one, base in zip(rounds, sgd, strict=True))
            table[f"{label}, {schedule}" if schedule else label] = {
                "method": label,
                "seconds": statistics.median(rounds),
                "ratio": statistics.median(ratios),
                "lowest_ratio": ratios[0],
                "highest_ratio": ratios[-1],
                "kinds": {kind: statistics.median(kinds[kind]) for kind in shares},
            }
    return table


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Options, Workload], description=__doc__)
    options, workload = parser.parse_args_into_dataclasses()
    if options.only:
        runner = Runner(options.only, workload)
        for kind in VARIANTS[options.only].kinds * 2:
            runner.prepare(kind)
            runner.step()
        print(json.dumps({"peak_mib": peak_mib()}))
        return
    peaks: dict[str, float] = {}
    for label in chosen(options) if options.memory_repeats else ():
        command = [*sys.argv[1:], "--only", label]
        peaks[label] = min(peak_of(command) for _ in range(options.memory_repeats))
    table = summarise(time_steps(workload, options))
    for row in table.values():
        if row["method"] in peaks:
            row["peak_mib"] = peaks[row["method"]]
            row["memory_ratio"] = peaks[row["method"]] / peaks["sgd"]
    for name, row in table.items():
        print(
            f"{name:<34}{1000 * row['seconds']:>9.0f} ms{row['ratio']:>8.2f}"
            f"  ({row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f})"
            f"{row.get('peak_mib', 0):>8.0f} MiB"
        )
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
