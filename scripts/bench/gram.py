r"""Measure the time of a linear layer's Gram matrix by route, against its plain weight gradient.

Each size runs both routes in turns with the weight gradient, whose time is the unit: the `direct`
route, which forms per-sample gradients, and the `hadamard` route, which multiplies positions. The
result is the ratios of each size, and the route that FNGD takes there (`auto`). The plot marks the
last length at which that is `hadamard`.

    python scripts/bench/gram.py --repeats 10 \
        --output scripts/bench/results/route_crossover.json \
        --plot scripts/bench/results/route_crossover.png

With --blocks the direct route runs with blocks of each of these sizes instead:

    python scripts/bench/gram.py --samples 64 --positions 20 --widths 256 --expansion 4 \
        --blocks 1 4 8 16 64 256 --repeats 21 --output scripts/bench/results/gram_routes.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import Options, interleave, parse, summarise, write_results

from hf_fngd.solve.gram import choose_route, sample_gram


@dataclass
class Layers:
    """Linear layers and their batch."""

    samples: int = field(default=32, metadata={"help": "Samples N of a batch."})
    positions: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128],
        metadata={"help": "Positions T of each sample."},
    )
    widths: list[int] = field(
        default_factory=lambda: [256, 512, 1024], metadata={"help": "Input features."}
    )
    expansion: int = field(default=1, metadata={"help": "Output features for an input feature."})
    blocks: list[int] | None = field(
        default=None, metadata={"help": "Sizes of the direct route's blocks in MiB."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    plot: str | None = field(default=None, metadata={"help": "PNG file."})


def candidates(layers: Layers, t: int, d_in: int, d_out: int) -> dict[str, Callable[[], object]]:
    """Return the functions to time for one size, by name; the first is the unit."""
    a = torch.randn(1, layers.samples, t, d_in)
    g = torch.randn(1, layers.samples, t, d_out)

    def form(dtype: torch.dtype = torch.float32, **options: Any) -> object:
        # The change of precision is part of the cost.
        return sample_gram(a.to(dtype), g.to(dtype), bias=False, **options)

    found: dict[str, Callable[[], object]] = {
        "weight gradient": lambda: g.flatten(0, 2).t().mm(a.flatten(0, 2))
    }
    if layers.blocks:
        found["hadamard"] = partial(form, route="hadamard")
        for mib in layers.blocks:
            found[f"direct {mib} MiB"] = partial(form, route="direct", block_bytes=mib * 2**20)
        return found
    for suffix, dtype in {"": torch.float32, ", bfloat16": torch.bfloat16}.items():
        for route in ("direct", "hadamard"):
            found[route + suffix] = partial(form, dtype, route=route)
    return found


def draw(rows: list[dict[str, Any]], widths: list[int], file: str) -> None:
    """Plot time against length, with a panel for each width."""
    figure = Figure(figsize=(4.2 * len(widths), 3.6))
    axes = figure.subplots(1, len(widths), squeeze=False)
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
    """Run the benchmark from the command line."""
    layers, options = parse([Layers, Options], __doc__)
    torch.set_num_threads(layers.threads)
    rows: list[dict[str, Any]] = []
    for d in layers.widths:
        for t in layers.positions:
            d_out = layers.expansion * d
            table = summarise(interleave(candidates(layers, t, d, d_out), options))
            ratios = {name: row["median_ratio"] for name, row in list(table.items())[1:]}
            auto = choose_route(layers.samples, t, d, d_out)
            rows.append({"width": d, "positions": t, "auto": auto, "ratios": ratios})
            print(rows[-1], flush=True)
    if layers.plot:
        draw(rows, layers.widths, layers.plot)
    write_results(options.output, layers, {"measurements": rows})


if __name__ == "__main__":
    main()
