r"""Peak memory that activation checkpointing saves: with FNGD against torch's AdamW.

Every variant and mode is trained in a process of its own, as in memory.py.

    python scripts/bench/checkpointing.py --length 64 --steps 2 --repeats 1 \
        --output scripts/bench/results/checkpointing.json
"""

from __future__ import annotations

from memory import peak_of, read_options
from workload import MODES, write_results

VARIANTS = ("adamw", "fngd_adamw first epoch", "fngd_adamw later epochs")


def main() -> None:
    """Runs the benchmark from the command line."""
    workload, options = read_options(__doc__)
    shapes = [
        word
        for name, value in vars(workload).items()
        if name != "checkpointing"
        for word in (f"--{name}", str(value))
    ]
    peaks: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MODES} for name in VARIANTS}
    for _ in range(options.repeats):
        for name, modes in peaks.items():
            for mode, values in modes.items():
                more = ["--steps", str(options.steps), "--checkpointing", mode, "--variant", name]
                values.append(peak_of([*shapes, *more]))
    table = {}
    for name, modes in peaks.items():
        least = {mode: min(values) for mode, values in modes.items()}
        saved = {mode: least["none"] - least[mode] for mode in MODES[1:]}
        table[name] = {"peak_mib": least, "saved_mib": saved, "all_mib": modes}
        numbers = "".join(f"{mode:>16} {mib:.0f} MiB" for mode, mib in least.items())
        print(f"{name:<28}{numbers}")
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
