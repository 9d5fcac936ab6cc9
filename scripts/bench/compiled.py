r"""Measure the time of a step with and without `torch.compile`: AdamW, and FNGD with its update.

The eager and the compiled step of each optimizer run in turns with the eager step of AdamW, after
everything has been compiled; the results are median seconds and ratios to that step. Optimizers
follow one another, each with an empty cache of graphs: models share the code that is compiled, and
would get in each other's way.

    python scripts/bench/compiled.py --d_model 64 --ffn_dim 128 --layers 2 --vocab_size 200 \
        --batch_size 8 --length 10 --threads 1 --repeats 150 \
        --output scripts/bench/results/compiled.json

The layers are small, so that the cost of a graph shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import measure
import torch
from measure import interleave, parse, print_table, summarise, write_results
from torch._dynamo.utils import counters
from workload import Workload, make_step

OPTIMIZERS = ("adamw", "fngd_adamw later epochs", "fngd_adamw first epoch")


@dataclass
class Options(measure.Options):
    """Number of rounds, the compiler's backend, and the result file."""

    backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})


def compare(name: str, workload: Workload, options: Options) -> dict[str, dict[str, Any]]:
    """Time the eager and the compiled step of one optimizer."""
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
    """Run the benchmark from the command line."""
    workload, options = parse([Workload, Options], __doc__)
    table: dict[str, dict[str, Any]] = {}
    for name in OPTIMIZERS:
        table |= compare(name, workload, options)
    print_table(table)
    write_results(options.output, workload, {"backend": options.backend, "variants": table})


if __name__ == "__main__":
    main()
