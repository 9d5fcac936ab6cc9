r"""How FNGD's time grows with samples, length, width and layers; and which route a layer takes.

    python scripts/bench/growth.py --repeats 3 --warmup 1 \
        --output scripts/bench/results/growth.json --plot scripts/bench/results/growth.png

A Marian is measured at several values of one size, all others fixed. At each, the steps of AdamW
and of FNGD's later and first epochs run in turns; `first epoch adds` is the median over rounds of
the first epoch's step less the later one's. Exponents are slopes of a line through the logarithms.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from step_time import Options, interleave
from transformers import HfArgumentParser
from workload import Workload, make_step, write_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from hf_fngd.solve.gram import choose_route  # noqa: E402

STEPS = {
    "AdamW": "adamw",
    "later epochs": "fngd_adamw later epochs",
    "first epoch": "fngd_adamw first epoch",
}
# Name of the series, and the workloads' sizes that differ.
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
    """Which sizes, and the picture."""

    only: list[str] | None = field(default=None, metadata={"help": "Names of series."})
    plot: str | None = field(default=None, metadata={"help": "PNG file."})


def measure(workload: Workload, options: Options) -> dict[str, float]:
    """Times the three kinds of steps.

    Args:
        workload: Shapes.
        options: Number of rounds.

    Returns:
        Median seconds of each, and what the first epoch adds to a later one's step.
    """
    seconds = interleave({n: make_step(workload, v) for n, v in STEPS.items()}, options)
    row = {name: statistics.median(values) for name, values in seconds.items()}
    later, first = seconds["later epochs"], seconds["first epoch"]
    row["first epoch adds"] = statistics.median(b - a for a, b in zip(later, first, strict=True))
    return row


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Fits powers of the size that varies.

    Args:
        rows: Measurements of a series.

    Returns:
        Exponents by column.
    """
    sizes = np.log([row["size"] for row in rows])
    columns = (*STEPS, "first epoch adds")
    found = {}
    for column in columns:
        values = np.array([row[column] for row in rows])
        if (values > 0).all():
            found[column] = float(np.polyfit(sizes, np.log(values), 1)[0])
    return found


def draw(results: dict[str, Any], file: str) -> None:
    """Plots time against size.

    Args:
        results: Measurements and exponents by series.
        file: PNG file.
    """
    size = (4 * len(results), 3.6)
    figure, axes = plt.subplots(1, len(results), figsize=size, squeeze=False)
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
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Workload, Options, Plot], description=__doc__)
    base, options, plot = parser.parse_args_into_dataclasses()
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
