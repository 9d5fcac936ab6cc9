r"""Time of one training step: FNGD's first and later epochs against torch's AdamW.

All variants run in one process, interleaved step by step (A B C A B C …), so that the noise of the
machine meets them alike; medians and quartiles of the ratios to AdamW's step in the same round, and
beside them the ratio of operations in matrix products and convolutions, as torch counts them.

    python scripts/bench/step_time.py --repeats 20 \
        --output scripts/bench/results/step_time/marian_256_b64.json

budgets.py runs it on the shapes of README.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from workload import VARIANTS, Workload, make_step, write_results

Variant = TypeVar("Variant")


@dataclass
class Options:
    """How often, and where to."""

    repeats: int = field(default=50, metadata={"help": "Timed rounds."})
    warmup: int = field(default=3, metadata={"help": "Rounds before the first timed one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def interleave(
    steps: Mapping[Variant, Callable[[], object]], options: Options
) -> dict[Variant, list[float]]:
    """Times steps in turns.

    Args:
        steps: What is timed, by variant.
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
    """Gives medians, and quartiles of the ratios to the first variant.

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
    """Counts the floating-point operations of a step's matrix products and convolutions.

    Args:
        step: A training step.

    Returns:
        Their number.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def report(steps: Mapping[str, Callable[[], object]], options: Options, workload: Any) -> None:
    """Times steps in turns, prints a table and writes the results.

    Args:
        steps: What is timed, by variant; ratios are to the first.
        options: Number of rounds, and the file.
        workload: Dataclass of shapes, with `threads`.
    """
    table = summarise(interleave(steps, options))
    for name, step in steps.items():
        table[name]["flops"] = operations(step)
    print(f"{'variant':<42}{'step':>10}{'ratio':>8}   quartiles   TFLOP")
    for name, row in table.items():
        print(
            f"{name:<42}{1000 * row['median_seconds']:>7.1f} ms{row['median_ratio']:>8.3f}"
            f"   {row['quartile_low']:.3f}-{row['quartile_high']:.3f}   "
            f"{row['flops'] / 1e12:.4f}"
        )
    write_results(options.output, workload, table)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Workload, Options], description=__doc__)
    workload, options = parser.parse_args_into_dataclasses()
    report({name: make_step(workload, name) for name in VARIANTS}, options, workload)


if __name__ == "__main__":
    main()
