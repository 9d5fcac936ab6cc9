"""Time of one training step: FNGD's first and later epochs against torch's AdamW.

All variants run in one process, interleaved step by step (A B C A B C …), so that the noise of the
machine meets them alike; medians and quartiles of the ratios to AdamW's step in the same round.

    python scripts/bench/step_time.py --repeats 50 --output scripts/bench/results/step_time.json
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser
from workload import VARIANTS, Workload, make_step, write_results


@dataclass
class Options:
    """How often, and where to."""

    repeats: int = field(default=50, metadata={"help": "Timed rounds."})
    warmup: int = field(default=3, metadata={"help": "Rounds before the first timed one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def measure(workload: Workload, options: Options) -> dict[str, list[float]]:
    """Times all variants, interleaved.

    Args:
        workload: Shapes.
        options: Number of rounds.

    Returns:
        Seconds of every timed step, by variant.
    """
    steps = {name: make_step(workload, name) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(options.warmup + options.repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if round_number >= options.warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Gives medians, and quartiles of the ratios to AdamW.

    Args:
        seconds: Result of `measure`.

    Returns:
        Numbers by variant.
    """
    table = {}
    for name, values in seconds.items():
        ratios = [one / base for one, base in zip(values, seconds["adamw"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {
            "median_seconds": statistics.median(values),
            "median_ratio": middle,
            "quartile_low": low,
            "quartile_high": high,
        }
    return table


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Workload, Options], description=__doc__)
    workload, options = parser.parse_args_into_dataclasses()
    table = summarise(measure(workload, options))
    print(f"{'variant':<28}{'step':>10}{'ratio':>8}   quartiles")
    for name, row in table.items():
        print(
            f"{name:<28}{1000 * row['median_seconds']:>7.1f} ms{row['median_ratio']:>8.3f}"
            f"   {row['quartile_low']:.3f}-{row['quartile_high']:.3f}"
        )
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
