"""Timing in turns, and result files, for all benchmarks."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

Variant = TypeVar("Variant")


@dataclass
class Options:
    """Number of rounds, and the result file."""

    repeats: int = field(default=50, metadata={"help": "Timed rounds, at least 2."})
    warmup: int = field(default=3, metadata={"help": "Rounds before the first timed one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the description's own lines, and defaults."""


def parse(kinds: Sequence[type], description: str | None) -> tuple[Any, ...]:
    """Read the command line.

    Args:
        kinds: Dataclasses of options.
        description: Text of `--help`.

    Returns:
        An object of each dataclass.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help)
    return parser.parse_args_into_dataclasses()


def interleave(
    steps: Mapping[Variant, Callable[[], object]], options: Options
) -> dict[Variant, list[float]]:
    """Time steps in turns (A B C A B C …), so that the machine's noise affects all alike.

    Args:
        steps: Functions to time, by variant.
        options: Number of rounds.

    Returns:
        Seconds of every timed step, by variant.
    """
    seconds: dict[Variant, list[float]] = {name: [] for name in steps}
    for round_number in range(options.warmup + options.repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if round_number >= options.warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summarise(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Compute medians, and quartiles of the ratios to the first variant in the same round.

    Args:
        seconds: Result of `interleave`.

    Returns:
        Numbers by variant.
    """
    first = next(iter(seconds.values()))
    table = {}
    for name, values in seconds.items():
        ratios = [one / base for one, base in zip(values, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {
            "median_seconds": statistics.median(values),
            "median_ratio": middle,
            "quartile_low": low,
            "quartile_high": high,
        }
    return table


def operations(step: Callable[[], object]) -> int:
    """Count the floating-point operations of a step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def report(steps: Mapping[str, Callable[[], object]], options: Options, workload: Any) -> None:
    """Time steps in turns and count their operations; print a table and write the results.

    Args:
        steps: Functions to time, by variant; ratios are to the first.
        options: Number of rounds, and the file.
        workload: Dataclass of shapes, with `threads`.
    """
    table: dict[str, dict[str, Any]] = summarise(interleave(steps, options))
    for name, step in steps.items():
        table[name]["flops"] = operations(step)
    print_table(table)
    write_results(options.output, workload, table)


def print_table(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row of numbers for each variant, without those that have parts."""
    rows = [
        {"variant": name} | {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        for name, row in table.items()
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g"), flush=True)


def write_results(path: str | None, workload: Any, results: dict[str, Any]) -> None:
    """Write the results of a benchmark, with its shapes and the machine.

    Args:
        path: JSON file; nothing is written without one.
        workload: Dataclass of shapes, with `threads`.
        results: Builtins.
    """
    if path is None:
        return
    text = {
        "workload": asdict(workload),
        "machine": f"{platform.machine()} CPU, {workload.threads} threads",
        "torch": torch.__version__,
        "results": results,
    }
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(text, indent=2) + "\n")
    print(f"written to {file}")
