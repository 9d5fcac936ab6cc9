r"""Measure how FNGD's time grows with samples, length, width and layers.

    python scripts/bench/growth.py --repeats 3 --warmup 1 \
        --output scripts/bench/results/growth.json --plot scripts/bench/results/growth.png

A Marian is measured at several values of one size, all others fixed. At each, the steps of AdamW
and of FNGD's later and first epochs run in turns; `first epoch adds` is the median over rounds of
the first epoch's step minus the later one's. The results are these seconds, the exponent of each
(the slope of a line through the logarithms), and the route that a square layer takes.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from measure import Options, interleave, parse, write_results
from workload import Workload, make_step

from hf_fngd.solve.gram import choose_route

STEPS = {
    "AdamW": "adamw",
    "later epochs": "fngd_adamw later epochs",
    "first epoch": "fngd_adamw first epoch",
}
# Name of the series, and the sizes that differ.
SERIES: dict[str, list[dict[str, int]]] = {
    "samples, 1,280 tokens in all": [
        {"batch_size": n, "length": 1280 // n} for n in (8, 16, 32, 64, 128, 256)
    ],
    "samples of 20 tokens": [{"batch_size": n} for n in (8, 16, 32, 64, 128)],
    "tokens of each of 32 samples": [{"length": t, "batch_size": 32} for t in (5, 10, 20, 40, 80)],
    "layers": [{"layers": n} for n in (1, 2, 4, 8)],
    "width": [{"d_model": d, "ffn_dim": 4 * d} for d in (128, 256, 512)],
}


@dataclass
class Plot:
    """Sizes that grow, and the picture."""

    only: list[str] | None = field(
        default=None, metadata={"help": "Names of series; default: all.", "choices": list(SERIES)}
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file."})


def measure(workload: Workload, options: Options) -> dict[str, float]:
    """Return median seconds of each step, and the seconds that the first epoch adds."""
    seconds = interleave({n: make_step(workload, v) for n, v in STEPS.items()}, options)
    row = {name: statistics.median(values) for name, values in seconds.items()}
    later, first = seconds["later epochs"], seconds["first epoch"]
    row["first epoch adds"] = statistics.median(b - a for a, b in zip(later, first, strict=True))
    return row


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Fit a power of the size that varies to each column of a series' measurements."""
    sizes = np.log([row["size"] for row in rows])
    found = {}
    for column in (*STEPS, "first epoch adds"):
        values = np.array([row[column] for row in rows])
        if (values > 0).all():
            found[column] = float(np.polyfit(sizes, np.log(values), 1)[0])
    return found


def draw(results: dict[str, Any], file: str) -> None:
    """Plot time against size, with a panel for each series."""
    figure = Figure(figsize=(4 * len(results), 3.6))
    axes = figure.subplots(1, len(results), squeeze=False)
    for axis, (name, series) in zip(axes[0], results.items(), strict=True):
        rows = series["measurements"]
        for step in STEPS:
            axis.plot([r["size"] for r in rows], [r[step] for r in rows], "o-", label=step)
        axis.set(xlabel=name, ylabel="seconds a step", xscale="log", yscale="log")
        axis.minorticks_off()
        sizes = [row["size"] for row in rows]
        axis.set_xticks(sizes, map(str, sizes))
        axis.grid(True, alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the benchmark from the command line."""
    base, options, plot = parse([Workload, Options, Plot], __doc__)
    results: dict[str, Any] = {}
    for name, variations in SERIES.items():
        if plot.only and name not in plot.only:
            continue
        rows: list[dict[str, Any]] = []
        for sizes in variations:
            workload = dataclasses.replace(base, **sizes)
            row: dict[str, Any] = {"size": next(iter(sizes.values()))}
            shape = (workload.batch_size, workload.length, workload.d_model, workload.d_model)
            row |= {"route of a square layer": choose_route(*shape)} | measure(workload, options)
            rows.append(row)
            print(name, row, flush=True)
        results[name] = {"measurements": rows, "exponents": exponents(rows)}
        print(name, results[name]["exponents"], flush=True)
    if plot.plot:
        draw(results, plot.plot)
    write_results(options.output, base, results)


if __name__ == "__main__":
    main()
