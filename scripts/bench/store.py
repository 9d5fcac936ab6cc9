"""Memory of the coefficient store, and time of its look-ups, by the number of data set rows.

    python scripts/bench/store.py --output scripts/bench/results/store.json

`row numbers` is what FNGDTrainer uses; `hashes` are the 64-bit ids of a stock Trainer, which need a
dictionary beside the table. The ids of a batch lie anywhere in the data set.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.benchmark import Timer
from transformers import HfArgumentParser
from workload import write_results

from hf_fngd.sample_store import SampleStore

MIB = 2**20
BATCHES = 64


@dataclass
class Store:
    """What is stored, and how it is asked for."""

    rows: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000],
        metadata={"help": "Numbers of data set rows."},
    )
    layers: int = field(default=100, metadata={"help": "Selected layers."})
    batch_size: int = field(default=64, metadata={"help": "Rows looked up at once."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


@dataclass
class Options:
    """How long, and where to."""

    seconds: float = field(default=1.0, metadata={"help": "Time for each measurement."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def measure(settings: Store, rows: int, dtype: str, hashed: bool, seconds: float) -> dict[str, Any]:
    """Fills a store and measures it.

    Args:
        settings: Shapes.
        rows: Rows of the data set.
        dtype: float32 or float16.
        hashed: Whether ids are 64-bit hashes instead of row numbers.
        seconds: Time for each measurement.

    Returns:
        Memory in MiB, and median milliseconds of a look-up (locate and read) and of a write.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows)
    if hashed:
        ids = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    store = SampleStore(settings.layers, getattr(torch, dtype), rows)
    for part in ids.split(4096):
        values = torch.rand(len(part), settings.layers, generator=generator)
        store.write(store.locate(part.tolist(), create=True), values)
    picked = torch.randint(rows, (BATCHES, settings.batch_size), generator=generator)
    batches = [ids[places].tolist() for places in picked]
    values = torch.rand(settings.batch_size, settings.layers, generator=generator)

    def look_up() -> None:
        for batch in batches:
            store.read(store.locate(batch, create=False))

    def write() -> None:
        for batch in batches:
            store.write(store.locate(batch, create=True), values)

    times = {}
    for function in (look_up, write):
        timer = Timer("f()", globals={"f": function}, num_threads=settings.threads)
        median = timer.blocked_autorange(min_run_time=seconds).median
        times[f"{function.__name__}_ms"] = 1000 * median / BATCHES
    tensors = (store.table, store.known, store.dirty)
    memory = sum(t.untyped_storage().nbytes() for t in tensors)
    if store.rows is not None:
        memory += sys.getsizeof(store.rows) + sum(map(sys.getsizeof, store.rows))
    return {
        "rows": rows,
        "dtype": dtype,
        "ids": "hashes" if hashed else "row numbers",
        "memory_mib": memory / MIB,
        **times,
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Store, Options], description=__doc__)
    settings, options = parser.parse_args_into_dataclasses()
    torch.set_num_threads(settings.threads)
    table = [
        measure(settings, rows, dtype, hashed, options.seconds)
        for rows in settings.rows
        for dtype in ("float32", "float16")
        for hashed in (False, True)
    ]
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3g"))
    write_results(options.output, settings, {"measurements": table})


if __name__ == "__main__":
    main()
