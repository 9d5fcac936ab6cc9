"""Measure the memory of the coefficient store, and its look-ups against a training step.

    python scripts/bench/store.py --repeats 8 --warmup 1 --output scripts/bench/results/store.json

Before each look-up comes a training step, so it finds the caches as a step leaves them. `numbers`
are the row numbers of FNGDTrainer, `hashes` the 64-bit ids of a stock Trainer, which also need a
dictionary. The ids of a batch lie anywhere in the data set. A file is looked up as it is after
writing, in the system's cache. Memory for --paper_rows is computed, not measured.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Options, interleave, parse, write_results
from tabulate import tabulate
from workload import Workload, make_step

from hf_fngd.methods.stores import SampleStore

MIB = 2**20
VARIANT = "fngd_adamw later epochs"
# Precision, kind of ids, and whether in a file.
STORES = (
    ("float32", "numbers", False),
    ("float16", "numbers", False),
    ("float16", "numbers", True),
    ("float16", "hashes", False),
)


@dataclass
class Stores:
    """Sizes of the store."""

    rows: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000],
        metadata={"help": "Numbers of data set rows."},
    )
    stored_layers: int = field(default=100, metadata={"help": "Layers that have coefficients."})
    paper_rows: int = field(
        default=100_000_000, metadata={"help": "Rows for which memory is computed, not measured."}
    )


@dataclass
class Probe:
    """A filled store, and batches of ids to look up."""

    row: dict[str, Any]
    store: SampleStore
    batches: Sequence[list[int]]

    def look_up(self) -> Callable[[], object]:
        """Return a function that looks up the next batch, as FNGD does in later epochs."""
        batches = itertools.cycle(self.batches)

        def run() -> None:
            rows = self.store.locate(next(batches), create=False)
            assert self.store.count_known(rows) == len(rows)
            self.store.read(rows)

        return run


def fill(
    workload: Workload, stores: Stores, rows: int, kind: tuple[str, str, bool], folder: str
) -> Probe:
    """Fill a store of one of the kinds in `STORES`, and measure its memory.

    Args:
        workload: Workload, for its batch size.
        stores: Number of layers.
        rows: Rows of the data set.
        kind: One of `STORES`.
        folder: Folder of the file.

    Returns:
        The store, with its memory.
    """
    dtype, ids_kind, in_file = kind
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows)
    if ids_kind == "hashes":
        ids = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    place = folder if in_file else None
    store = SampleStore(stores.stored_layers, getattr(torch, dtype), rows, place)
    seconds = []
    for part in ids.split(workload.batch_size):
        values = torch.rand(len(part), stores.stored_layers, generator=generator)
        begin = time.perf_counter()
        store.write(store.locate(part.tolist(), create=True), values)
        seconds.append(time.perf_counter() - begin)
    picked = torch.randint(rows, (64, workload.batch_size), generator=generator)
    table = store.table.untyped_storage().nbytes()
    beside = store.known.nbytes + store.dirty.nbytes
    if store.rows is not None:
        numbers = itertools.chain(store.rows, store.rows.values())
        beside += sys.getsizeof(store.rows) + sum(map(sys.getsizeof, numbers))
    row = {
        "rows": rows,
        "dtype": dtype,
        "ids": ids_kind,
        "file": in_file,
        "table_mib": table / MIB,
        "beside_mib": beside / MIB,
        "write_ms": 1000 * statistics.median(seconds),
    }
    return Probe(row, store, [ids[places].tolist() for places in picked])


def on_paper(row: dict[str, Any], rows: int) -> dict[str, Any]:
    """Compute the memory for more rows: all of it is proportional to them."""
    factor = rows / row["rows"]
    kept = {name: row[name] for name in ("dtype", "ids", "file")}
    return {"rows": rows, **kept, **{n: row[n] * factor for n in ("table_mib", "beside_mib")}}


def main() -> None:
    """Run the benchmark from the command line."""
    workload, stores, options = parse([Workload, Stores, Options], __doc__)
    step = make_step(workload, VARIANT)
    turns: dict[tuple[str, int], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        probes = [
            fill(workload, stores, rows, kind, folder) for rows in stores.rows for kind in STORES
        ]
        for number, probe in enumerate(probes):
            turns["step", number] = step
            turns["look-up", number] = probe.look_up()
        seconds = interleave(turns, options)
    for number, probe in enumerate(probes):
        times = seconds["look-up", number]
        shares = [a / b for a, b in zip(times, seconds["step", number], strict=True)]
        probe.row["look_up_ms"] = 1000 * statistics.median(times)
        probe.row["share_of_step"] = statistics.median(shares)
        probe.row["highest_share"] = max(shares)
    all_steps = [one for (kind, _), times in seconds.items() if kind == "step" for one in times]
    step_ms = 1000 * statistics.median(all_steps)
    table = [probe.row for probe in probes]
    print(f"step: {step_ms:.0f} ms ({VARIANT})")
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3g"))
    results = {
        "step": VARIANT,
        "step_ms": step_ms,
        "stored_layers": stores.stored_layers,
        "measured": table,
        "on_paper": [on_paper(row, stores.paper_rows) for row in table[-len(STORES) :]],
    }
    write_results(options.output, workload, results)


if __name__ == "__main__":
    main()
