r"""Time of one training step with and without `torch.compile`: AdamW, and FNGD with AdamW's update.

For each optimizer its eager and its compiled step run in turns with the eager step of AdamW, to
which ratios are given, after everything has been compiled. Optimizers follow one another, each with
an empty cache of graphs: models share the code that is compiled, and would get in each other's way.

    python scripts/bench/compiled.py --d_model 64 --ffn_dim 128 --layers 2 --vocab_size 200 \
        --batch_size 8 --length 10 --threads 1 --repeats 150 \
        --output scripts/bench/results/compiled.json

The layers are small, so that what a graph costs is seen beside them. compiled_before.json comes
from the same command at 1e63e0b, where every selected layer broke the graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import HfArgumentParser
from workload import Workload, make_step, write_results

OPTIMIZERS = ("adamw", "fngd_adamw later epochs", "fngd_adamw first epoch")


@dataclass
class Options:
    """How often, by what, and where to."""

    repeats: int = field(default=50, metadata={"help": "Timed rounds."})
    warmup: int = field(default=3, metadata={"help": "Rounds before the first timed one."})
    backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def measure(name: str, workload: Workload, options: Options) -> dict[str, dict[str, Any]]:
    """Times an optimizer's steps.

    Args:
        name: A name in `OPTIMIZERS`.
        workload: Shapes.
        options: Number of rounds, and the backend.

    Returns:
        Numbers of its eager and its compiled step.
    """
    torch._dynamo.reset()
    counters.clear()
    steps: dict[str, Callable[[], None]] = {
        "base": make_step(workload, "adamw"),
        f"{name}, eager": make_step(workload, name),
        f"{name}, compiled": make_step(workload, name, options.backend),
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for round_number in range(options.warmup + options.repeats):
        for variant, step in steps.items():
            begin = time.perf_counter()
            step()
            if round_number >= options.warmup:
                seconds[variant].append(time.perf_counter() - begin)
    table: dict[str, dict[str, Any]] = {}
    base = seconds.pop("base")
    for variant, values in seconds.items():
        low, middle, high = statistics.quantiles(
            [one / other for one, other in zip(values, base, strict=True)], n=4
        )
        table[variant] = {
            "median_seconds": statistics.median(values),
            "median_ratio": middle,
            "quartile_low": low,
            "quartile_high": high,
        }
    table[f"{name}, compiled"] |= {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    return table


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Workload, Options], description=__doc__)
    workload, options = parser.parse_args_into_dataclasses()
    table: dict[str, dict[str, Any]] = {}
    print(f"{'variant':<36}{'step':>10}{'ratio':>8}   quartiles    graphs, breaks")
    for name in OPTIMIZERS:
        for variant, row in measure(name, workload, options).items():
            table[variant] = row
            print(
                f"{variant:<36}{1000 * row['median_seconds']:>7.1f} ms{row['median_ratio']:>8.3f}"
                f"   {row['quartile_low']:.3f}-{row['quartile_high']:.3f}"
                f"   {row.get('graphs', '')} {row.get('graph_breaks', '')}"
            )
    write_results(options.output, workload, {"backend": options.backend, "variants": table})


if __name__ == "__main__":
    main()
