r"""Where the routes of a Gram matrix cross: time of a linear layer's K against its weight gradient.

    python scripts/bench/route_crossover.py --output scripts/bench/results/route_crossover.json \
        --plot scripts/bench/results/route_crossover.png

Square layers of several widths and samples of several lengths; at each both routes in both
precisions run in turns with the plain weight gradient, whose time is the unit. The plot marks the
last length at which `gram_route=auto` takes the Hadamard route.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import torch
from step_time import Options, interleave, summarise
from transformers import HfArgumentParser
from workload import write_results

from hf_fngd.solve.gram import choose_route, sample_gram

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DTYPES = {"": torch.float32, ", bfloat16": torch.bfloat16}


@dataclass
class Layers:
    """Linear layers and their batch."""

    samples: int = field(default=32, metadata={"help": "N."})
    positions: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128], metadata={"help": "Values of T."}
    )
    widths: list[int] = field(
        default_factory=lambda: [256, 512, 1024], metadata={"help": "Input and output features."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    plot: str | None = field(default=None, metadata={"help": "PNG file."})


def candidates(n: int, t: int, d: int) -> dict[str, Callable[[], object]]:
    """Builds what is compared.

    Args:
        n: Samples.
        t: Positions of each.
        d: Input and output features.

    Returns:
        Functions by name; the first is the unit.
    """
    a, g = torch.randn(1, n, t, d), torch.randn(1, n, t, d)
    found: dict[str, Callable[[], object]] = {
        "weight gradient": lambda: g.flatten(0, 2).t().mm(a.flatten(0, 2))
    }
    for suffix, dtype in DTYPES.items():
        for route in ("direct", "hadamard"):
            # The change of precision is part of the cost.
            found[route + suffix] = lambda route=route, dtype=dtype: sample_gram(
                a.to(dtype), g.to(dtype), bias=False, route=route
            )
    return found


def draw(rows: list[dict[str, Any]], widths: list[int], file: str) -> None:
    """Plots time against length, a panel a width.

    Args:
        rows: Measurements.
        widths: Panels.
        file: PNG file.
    """
    figure, axes = plt.subplots(1, len(widths), figsize=(4.2 * len(widths), 3.6), squeeze=False)
    for axis, width in zip(axes[0], widths, strict=True):
        part = [row for row in rows if row["width"] == width]
        lengths = [row["positions"] for row in part]
        for name in part[0]["ratios"]:
            axis.plot(lengths, [row["ratios"][name] for row in part], "o-", label=name)
        chosen = [row["positions"] for row in part if row["auto"] == "hadamard"]
        if chosen:
            axis.axvline(max(chosen), color="gray", linestyle=":", label="auto: hadamard up to")
        axis.set(xlabel="positions a sample", title=f"d {width}", xscale="log", yscale="log")
        axis.set_xticks(lengths, map(str, lengths))
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0, 0].set_ylabel("in weight gradients")
    axes[0, -1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Layers, Options], description=__doc__)
    layers, options = parser.parse_args_into_dataclasses()
    torch.set_num_threads(layers.threads)
    rows: list[dict[str, Any]] = []
    for d in layers.widths:
        for t in layers.positions:
            table = summarise(interleave(candidates(layers.samples, t, d), options))
            ratios = {name: row["median_ratio"] for name, row in list(table.items())[1:]}
            auto = choose_route(layers.samples, t, d, d)
            rows.append({"width": d, "positions": t, "auto": auto, "ratios": ratios})
            print(rows[-1], flush=True)
    if layers.plot:
        draw(rows, layers.widths, layers.plot)
    write_results(options.output, layers, {"measurements": rows})


if __name__ == "__main__":
    main()
