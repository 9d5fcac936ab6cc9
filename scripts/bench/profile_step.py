r"""Profile the operators in which a step of FNGD spends more time than a step of AdamW.

    python scripts/bench/profile_step.py --shapes resnet18 --batch_size 128 --repeats 3 \
        --variant "fngd_adamw first epoch" --output scripts/bench/results/profile/resnet18_b128.json

Both steps run in turns under torch's profiler. The result is, for each operator, its milliseconds
in a step of either kind, without the operators that it calls: the median over steps. Operators that
differ most come first. `Python and autograd` is the rest of the step's wall time.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from measure import parse, write_results
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from workload import VARIANTS, Workload, make_step

REST = "Python and autograd"


@dataclass
class Options:
    """The step to compare, number of steps, and the result file."""

    variant: str = field(
        default="fngd_adamw later epochs",
        metadata={"help": "Step to compare with adamw's.", "choices": list(VARIANTS)},
    )
    repeats: int = field(default=8, metadata={"help": "Profiled steps of each."})
    rows: int = field(default=6, metadata={"help": "Operators shown."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def operators(step: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds of one step by operator; their sum is the step's wall time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        step()
        wall = 1000 * (time.perf_counter() - begin)
    found = {
        event.key: event.self_cpu_time_total / 1000
        for event in profiler.key_averages()
        if event.key.startswith(("aten::", "hf_fngd"))
    }
    return {**found, REST: wall - sum(found.values())}


def main() -> None:
    """Run the benchmark from the command line."""
    workload, options = parse([Workload, Options], __doc__)
    steps = {name: make_step(workload, name) for name in ("adamw", options.variant)}
    for step in steps.values():
        step()
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            for operator, milliseconds in operators(step).items():
                times[name][operator].append(milliseconds)
    names = set().union(*times.values())
    rows = []
    for operator in names:
        base, other = (statistics.median(times[name].get(operator, [0.0])) for name in steps)
        rows.append({"operator": operator, "adamw": base, "variant": other, "more": other - base})
    rows.sort(key=lambda row: -abs(row["more"]))
    print(tabulate(rows[: options.rows], headers="keys", tablefmt="github", floatfmt=".1f"))
    results = {"variant": options.variant, "operators": rows[: options.rows]}
    results["step"] = {
        name: sum(statistics.median(values) for values in found.values())
        for name, found in times.items()
    }
    write_results(options.output, workload, results)


if __name__ == "__main__":
    main()
