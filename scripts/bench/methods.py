r"""Measure time and memory of a training step of every method, by ratio to SGD.

Steps of a method differ: some update curvature, most do not. Each method runs its kinds of steps
one after the other, all methods take turns in one process, and a method's step is the mean of its
kinds, weighted by how often they occur. Peak memory is the largest resident set of a separate
process that runs each kind of step.

    python scripts/bench/methods.py --shapes resnet18 --batch_size 128 \
        --output scripts/bench/results/methods_resnet18.json

If the package `kfac` (kfac-pytorch) can be imported, it is measured next to our KFAC.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import parse, print_table, write_results
from memory import peak_of, print_peak
from workload import Workload

from hf_fngd import FNGD, create_preconditioned_optimizer, soap


@dataclass
class Method:
    """A method, and the kinds of steps that it has.

    Its settings are such that the kinds take turns, in the order in which the schedules name them.

    Attributes:
        settings: Settings of our optimizer, `method` among them; None for others.
        schedules: How often each kind of step occurs, by name of the schedule.
    """

    settings: dict[str, Any] | None = None
    schedules: dict[str, dict[str, float]] = field(default_factory=lambda: {"": {"step": 1.0}})

    @property
    def kinds(self) -> list[str]:
        """Kinds of steps, in the order in which they are run."""
        return list(dict.fromkeys(kind for kinds in self.schedules.values() for kind in kinds))


def every(period: int, update: str, between: str) -> dict[str, float]:
    """Return the shares of the steps that update and of the others."""
    return {update: 1 / period, between: 1 - 1 / period}


# The inverse solver, since decompositions of factors of 4608 rows take minutes on a CPU.
_KFAC = {"method": "kfac", "kfac_solver": "inverse", "inverse_period": 2}
_INVERSE = {
    f"inverse every {period}": every(period, "inverse", "factors only") for period in (10, 100)
}
_MUON = {"method": "plain", "update_rule": "muon", "update_scale": "rms"}
_BASIS = {"": every(10, "new basis", "between")}
METHODS = {
    "sgd": Method(),
    "adamw": Method(),
    "muon": Method({"method": "plain", "update_rule": "muon"}),
    "muon, soap": Method({**_MUON, "other_rule": "soap"}, _BASIS),
    "soap": Method({"method": "plain", "update_rule": "soap", "other_rule": "soap"}, _BASIS),
    "ekfac, muon, soap": Method(
        {
            **_MUON,
            "method": "ekfac",
            "curvature_power": 0.5,
            "update_period": 2,
            "inverse_period": 2,
            "other_rule": "soap",
        },
        _BASIS,
    ),
    "ekfac, muon": Method(
        {
            "method": "ekfac",
            "update_rule": "muon",
            "curvature_power": 0.5,
            "stat_samples": 16,
            "update_period": 2,
            "inverse_period": 4,
        },
        {"": {"new basis": 0.02, "after it": 0.45, "new moments": 0.08, "between": 0.45}},
    ),
    "sgd_rms": Method({"method": "plain", "update_rule": "sgd", "update_scale": "rms"}),
    "fngd": Method(
        {"method": "fngd", "update_scale": "none", "refresh_every": 2},
        {"later epochs": {"reuse": 1.0}, "first epoch": {"collect": 1.0}},
    ),
    "kfac": Method(_KFAC, _INVERSE),
    "kfac reduce": Method({**_KFAC, "kfac_approx": "reduce"}, _INVERSE),
    "kfac, 16 samples": Method({**_KFAC, "stat_samples": 16}, _INVERSE),
    "kfac-pytorch": Method(None, _INVERSE),
    "eva": Method({"method": "eva"}),
    "tengrad": Method(
        {"method": "tengrad", "update_period": 2}, {"every 100": every(100, "update", "between")}
    ),
    "seng": Method(
        {"method": "seng", "update_period": 2}, {"every 200": every(200, "update", "between")}
    ),
}


@dataclass
class Options:
    """Methods to measure, number of rounds, and the result file."""

    rounds: int = field(default=5, metadata={"help": "Timed rounds."})
    memory_repeats: int = field(default=1, metadata={"help": "Processes of each method; 0: none."})
    methods: list[str] | None = field(
        default=None,
        metadata={"help": "Methods besides sgd; default: all.", "choices": list(METHODS)},
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(
        default=None, metadata={"help": "Measure memory of this one here (internal)."}
    )


class Runner:
    """One method on its own copy of the model.

    Args:
        name: A name in `METHODS`.
        workload: Model and batch.
    """

    def __init__(self, name: str, workload: Workload) -> None:
        self.workload = workload
        self.model, self.batch = workload.model(), workload.batch()
        rate, settings = workload.learning_rate, METHODS[name].settings
        self.epoch = 0
        self.peer: Any = None
        self.optimizer: torch.optim.Optimizer
        if settings is not None:
            self.optimizer = create_preconditioned_optimizer(self.model, lr=rate, **settings)
        elif name == "adamw":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, fused=True)
        else:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), lr=rate, momentum=0.9, fused=True
            )
        if name == "kfac-pytorch":
            from kfac.preconditioner import KFACPreconditioner

            self.peer = KFACPreconditioner(
                self.model,
                factor_update_steps=1,
                inv_update_steps=2,
                compute_method="inverse",
                damping=0.003,
                lr=rate,
                skip_layers=["lm_head"],
            )

    def prepare(self) -> None:
        """Begin an epoch with each step: FNGD reuses coefficients in the odd ones."""
        self.epoch += 1
        if isinstance(self.optimizer, FNGD):
            self.optimizer.start_epoch(self.epoch)

    def step(self) -> None:
        """Train one step."""
        if isinstance(self.optimizer, FNGD):
            self.optimizer.set_batch(range(self.workload.batch_size))
        self.workload.loss(self.model, self.batch).backward()
        if self.peer is not None:
            self.peer.step()
        self.optimizer.step()
        self.optimizer.zero_grad()


def chosen(options: Options) -> list[str]:
    """List the methods to measure, SGD first."""
    known = [n for n in METHODS if n != "kfac-pytorch" or importlib.util.find_spec("kfac")]
    return [n for n in known if not options.methods or n in ("sgd", *options.methods)]


def time_steps(workload: Workload, options: Options) -> dict[str, dict[str, list[float]]]:
    """Time all kinds of steps in turns; the first round is not counted.

    Args:
        workload: Model and batch.
        options: Number of rounds.

    Returns:
        Seconds of every timed step, by method and kind.
    """
    runners = {name: Runner(name, workload) for name in chosen(options)}
    seconds: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in METHODS[name].kinds} for name in runners
    }
    for round_number in range(options.rounds + 1):
        for name, runner in runners.items():
            for values in seconds[name].values():
                runner.prepare()
                begin = time.perf_counter()
                runner.step()
                if round_number:
                    values.append(time.perf_counter() - begin)
        print(f"round {round_number} of {options.rounds}", file=sys.stderr, flush=True)
    return seconds


def summarise(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Compute medians, and the mean step of each schedule by ratio to SGD's.

    Args:
        seconds: Result of `time_steps`.

    Returns:
        Numbers by method and schedule.
    """
    table: dict[str, dict[str, Any]] = {}
    sgd = seconds["sgd"]["step"]
    for name, kinds in seconds.items():
        for schedule, shares in METHODS[name].schedules.items():
            rounds = [
                sum(shares[kind] * kinds[kind][i] for kind in shares) for i in range(len(sgd))
            ]
            ratios = sorted(one / base for one, base in zip(rounds, sgd, strict=True))
            table[f"{name}, {schedule}" if schedule else name] = {
                "method": name,
                "seconds": statistics.median(rounds),
                "ratio": statistics.median(ratios),
                "lowest_ratio": ratios[0],
                "highest_ratio": ratios[-1],
                "kinds": {kind: statistics.median(kinds[kind]) for kind in shares},
            }
    return table


def main() -> None:
    """Run the benchmark from the command line."""
    options, workload = parse([Options, Workload], __doc__)
    # In turns with a new basis and without one.
    soap.PERIOD = 2
    if options.only:
        runner = Runner(options.only, workload)
        for _ in METHODS[options.only].kinds * 2:
            runner.prepare()
            runner.step()
        print_peak()
        return
    peaks = {
        name: min(peak_of([*sys.argv[1:], "--only", name], options.memory_repeats))
        for name in (chosen(options) if options.memory_repeats else ())
    }
    table = summarise(time_steps(workload, options))
    for row in table.values():
        if row["method"] in peaks:
            row["peak_mib"] = peaks[row["method"]]
            row["memory_ratio"] = peaks[row["method"]] / peaks["sgd"]
    print_table(table)
    write_results(options.output, workload, table)


if __name__ == "__main__":
    main()
