r"""Measure the time of a training step: FNGD's first and later epochs against torch's AdamW.

All variants run in one process, in turns (A B C A B C …). The result is the median seconds of each,
the median and the quartiles of its ratios to AdamW's step in the same round, and the operations of
its matrix products and convolutions, as torch counts them.

    python scripts/bench/step_time.py --repeats 20 \
        --output scripts/bench/results/step_time/marian_256_b64.json

all_shapes.py runs it on all shapes of the page.
"""

from __future__ import annotations

from measure import Options, parse, report
from workload import VARIANTS, Workload, make_step


def main() -> None:
    """Run the benchmark from the command line."""
    workload, options = parse([Workload, Options], __doc__)
    report({name: make_step(workload, name) for name in VARIANTS}, options, workload)


if __name__ == "__main__":
    main()
