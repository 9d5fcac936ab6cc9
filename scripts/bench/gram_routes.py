"""Time of one layer's Gram matrix by route and block size, against its weight gradient.

    python scripts/bench/gram_routes.py --output scripts/bench/results/gram_routes.json

`direct` forms blocks of per-sample gradients of the given size; `hadamard` needs none. The unit is
the time of the layer's plain weight gradient in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import step_time
import torch
from step_time import interleave
from transformers import HfArgumentParser
from workload import write_results

from hf_fngd.solve import gram

MIB = 2**20
BLOCKS = (1, 4, 8, 16, 64, 256)


@dataclass
class Layer:
    """One linear layer and its batch."""

    samples: int = field(default=64, metadata={"help": "N."})
    positions: int = field(default=20, metadata={"help": "T."})
    d_in: int = field(default=256, metadata={"help": "Input features."})
    d_out: int = field(default=1024, metadata={"help": "Output features."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


@dataclass
class Options(step_time.Options):
    """How often, and where to."""

    repeats: int = field(default=21, metadata={"help": "Timed rounds."})


def candidates(layer: Layer) -> dict[str, Callable[[], object]]:
    """Builds what is compared.

    Args:
        layer: Shapes.

    Returns:
        Functions by name; `weight gradient` is the unit.
    """
    a = torch.randn(1, layer.samples, layer.positions, layer.d_in)
    g = torch.randn(1, layer.samples, layer.positions, layer.d_out)

    def direct(mib: int) -> object:
        gram._CPU_BLOCK_BYTES = mib * MIB
        return gram.sample_gram(a, g, bias=False, route="direct", memory_bytes=2**40)

    return {
        "weight gradient": lambda: g.flatten(0, 2).t().mm(a.flatten(0, 2)),
        "hadamard": lambda: gram.sample_gram(a, g, bias=False, route="hadamard"),
        **{f"direct {mib} MiB": lambda mib=mib: direct(mib) for mib in BLOCKS},
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Layer, Options], description=__doc__)
    layer, options = parser.parse_args_into_dataclasses()
    torch.set_num_threads(layer.threads)
    functions = candidates(layer)
    seconds = interleave(functions, options)
    unit = statistics.median(seconds["weight gradient"])
    table = {
        name: {"ms": 1000 * statistics.median(s), "ratio": statistics.median(s) / unit}
        for name, s in seconds.items()
    }
    for name, row in table.items():
        print(f"{name:<18}{row['ms']:>8.2f} ms{row['ratio']:>8.2f}")
    write_results(options.output, layer, table)


if __name__ == "__main__":
    main()
