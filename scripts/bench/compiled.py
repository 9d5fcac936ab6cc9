r"""Time of one training step with and without `torch.compile`: AdamW, and FNGD with AdamW's update.

For each optimizer its eager and its compiled step run in turns with the eager step of AdamW, to
which ratios are given, after everything has been compiled. Optimizers follow one another, each with
an empty cache of graphs: models share the code that is compiled, and would get in each other's way.

    python scripts/bench/compiled.py --d_model 64 --ffn_dim 128 --layers 2 --vocab_size 200 \
        --batch_size 8 --length 10 --threads 1 --repeats 150 \
        --output scripts/bench/results/compiled.json

The layers are small, so that the cost of a graph shows beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import step_time
import torch
from step_time import interleave, summarise
from torch._dynamo.utils import counters
from transformers import HfArgumentParser
from workload import Workload, make_step, write_results

OPTIMIZERS = ("adamw", "fngd_adamw later epochs", "fngd_adamw first epoch")


@dataclass
class Options(step_time.Options):
    """How often, by what, and where to."""

    backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})


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
    table: dict[str, dict[str, Any]] = summarise(interleave(steps, options))
    del table["base"]
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
