r"""Measure time, memory and work of the optimizers on a GPU, within some minutes.

    python scripts/bench/gpu.py --output scripts/bench/results/gpu/h100.json

Every part runs in this one process: steps of FNGD's later and first epochs on five shapes against
`torch.optim.AdamW(fused=True)`, with peak memory and a roofline; a profile of a step; the update
rules alone; solves of small systems; KFAC, TENGraD, SENG and Eva on images. A part that fails
leaves its message in the results and the others go on. The results are written after each part, and
a table comes last.

    python scripts/bench/gpu.py --tiny --device cpu --output /tmp/gpu.json     # a rehearsal
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerator import Clock, Peak, ceilings, demand, facts, summarise
from measure import parse
from solves import time_solves
from tabulate import tabulate
from traces import profile_steps
from trials import IMAGES, METHODS, RULES, Trial, shapes

PARTS = ("ceilings", "shapes", "profile", "rules", "solves", "methods")
# Names of steps: the trial that takes them, and what it enters before. Ratios are to the first.
# FNGD's first epoch comes before its later ones, which need the coefficients.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "fngd first": ("fngd", {"epoch": 0, "update_scale": "rms"}),
    "fngd later": ("fngd", {"epoch": 1, "update_scale": "rms"}),
    "fngd later, update_scale=none": ("fngd", {"epoch": 1, "update_scale": "none"}),
    "fngd_adamw first": ("fngd_adamw", {"epoch": 0}),
    "fngd_adamw later": ("fngd_adamw", {"epoch": 1}),
}
# Bounds on the seconds of parts; a step of a large model must fit many times.
_SHAPE_SECONDS, _PROFILE_SECONDS, _RULES_SECONDS = 50.0, 40.0, 30.0


@dataclass
class Options:
    """Device, limit of time, and the result file."""

    output: str = field(metadata={"help": "JSON file for the results."})
    device: str = field(default="cuda", metadata={"help": "Device to measure."})
    minutes: float = field(default=8.0, metadata={"help": "Limit for all parts together."})
    rounds: int = field(default=15, metadata={"help": "Timed rounds of a shape, at most."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts to measure.", "choices": list(PARTS)},
    )
    only: list[str] | None = field(default=None, metadata={"help": "Shapes; default: all."})
    tiny: bool = field(default=False, metadata={"help": "Tiny sizes, to rehearse on a CPU."})


class Bench:
    """The parts, their results and the time that is left.

    Args:
        options: Options.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.clock = Clock(self.device)
        if options.tiny:
            # More threads would only wait for each other.
            torch.set_num_threads(1)
        self.end = time.perf_counter() + 60 * options.minutes
        self.shapes = shapes(options.tiny)
        self.machine = facts(self.device)
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, part: Callable[[dict[str, Any]], None], seconds: float) -> None:
        """Run a part, keep its results or its failure, and write all results.

        Args:
            name: Name of the part.
            part: Fills the dictionary that it is given.
            seconds: Bound on its time.
        """
        begin, found = time.perf_counter(), self.results.setdefault(name, {})
        try:
            with limit(min(seconds, self.end - begin - 3)):
                part(found)
        except Exception as error:
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
            found["error"] = traceback.format_exc(limit=-8)
        found["part_seconds"] = time.perf_counter() - begin
        print(f"{name}: {found['part_seconds']:.1f} s", flush=True)
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Write all results so far."""
        file = Path(self.options.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        workloads = {name: asdict(shape) for name, shape in self.shapes.items()}
        text = {"machine": self.machine, "workloads": workloads, "results": self.results}
        file.write_text(json.dumps(text, indent=2) + "\n")

    def trial(self, name: str, shape: str) -> Trial:
        """Build a model with an optimizer on the device."""
        return Trial(name, self.shapes[shape], self.device)

    # ---- parts -----------------------------------------------------------------------------------

    def ceilings(self, found: dict[str, Any]) -> None:
        """Measure the ceilings of the device, after its libraries have allocated what they keep."""
        trial = Trial("adamw", next(iter(shapes(tiny=True).values())), self.device)
        for _ in range(3):
            trial.step()
        size, copied = (64, 2**16) if self.options.tiny else (8192, 2**32)
        found.update(ceilings(self.clock, size, copied))

    def shape(self, found: dict[str, Any], name: str) -> None:
        """Measure a shape: memory, times, and the work of the first epoch."""
        begin = time.perf_counter()
        trials: dict[str, Trial] = {}
        memory: dict[str, float] = {}
        for kind, (one, how) in KINDS.items():
            if one not in trials:
                peak = Peak(self.device)
                trials[one] = self.trial(one, name)
            trials[one].enter(**how)
            memory[kind] = peak.mib(trials[one].step, 3)
        base = memory["adamw"]
        found["memory"] = {
            kind: {"mib": mib, "ratio": mib / base if base else None}
            for kind, mib in memory.items()
        }
        steps = {
            kind: (functools.partial(trials[one].enter, **how), trials[one].step)
            for kind, (one, how) in KINDS.items()
        }
        # A turn lasts long enough to show whether Python keeps up with the device.
        once = self.clock.time(trials["adamw"].step).step
        times = max(1, min(4, round(0.1 / once)))
        rest = 0.7 * _SHAPE_SECONDS - (time.perf_counter() - begin)
        table = summarise(self.clock.turns(steps, self.options.rounds, rest, times), "adamw")
        for rule in ("fngd", "fngd_adamw"):
            later, first = (table[f"{rule} {epoch}"] for epoch in ("later", "first"))
            later["ten_epochs"] = (first["ratio"] + 9 * later["ratio"]) / 10
        found["times"] = table
        self.write()
        self.work(found, trials)

    def work(self, found: dict[str, Any], trials: dict[str, Trial]) -> None:
        """Count what the first epoch asks of the device beyond a later one, and compare times."""
        limits = self.results.get("ceilings", {})
        asked = {}
        for kind in ("adamw", "fngd_adamw later", "fngd_adamw first"):
            one, how = KINDS[kind]
            trials[one].enter(**how)
            asked[kind] = demand(trials[one].step, limits if "bytes" in limits else None)
        later, first = asked["fngd_adamw later"], asked["fngd_adamw first"]
        table = found["times"]
        measured = table["fngd_adamw first"]["seconds"] - table["fngd_adamw later"]["seconds"]
        extra = {
            key: first[key] - later[key] for key in ("operations", "bytes", "calls", "seconds")
        }
        found["work"] = {
            **asked,
            "first epoch adds": {**extra, "measured_seconds": measured},
            "operations_ratio": first["operations"] / asked["adamw"]["operations"],
            "against_roofline": measured / extra["seconds"] if extra["seconds"] else None,
        }

    def profile(self, found: dict[str, Any]) -> None:
        """Profile steps of the first shape, with their time outside of the profiler."""
        for kind in ("adamw", "fngd_adamw later", "fngd later", "fngd_adamw first"):
            one, how = KINDS[kind]
            trial = self.trial(one, next(iter(self.shapes)))
            trial.step()
            trial.enter(**how)
            trial.step()
            times = [self.clock.time(trial.step, 4) for _ in range(3)]
            found[kind] = {
                "seconds": min(one.step for one in times),
                "launch_seconds": min(one.launch for one in times),
                **profile_steps(trial.step, self.device, 3),
            }

    def rules(self, found: dict[str, Any]) -> None:
        """Time `optimizer.step()` alone, on the gradients of one backward pass."""
        steps = {}
        for rule in ("adamw", "torch sgd", *RULES, "torch muon"):
            trial = self.trial(rule, next(iter(self.shapes)))
            trial.backward()
            steps[rule] = (lambda: None, trial.update)
        rounds = 2 * self.options.rounds
        found.update(summarise(self.clock.turns(steps, rounds, _RULES_SECONDS / 2, 3), "adamw"))
        muon = found["rule muon"]
        muon["to_torch_muon"] = muon["seconds"] / found["torch muon"]["seconds"]

    def method(self, found: dict[str, Any], name: str) -> None:
        """Time a method's kinds of steps on images, against AdamW and FNGD's later epochs."""
        trials = {one: self.trial(one, IMAGES) for one in ("adamw", "fngd", name)}
        trials["fngd"].step()
        trials["fngd"].enter(epoch=1)
        own, method = trials.pop(name), METHODS[name]
        steps = {one: (lambda: None, trial.step) for one, trial in trials.items()}
        steps |= {kind: (lambda: None, own.step) for kind in method.shares}
        times = self.clock.turns(steps, self.options.rounds, method.seconds / 2)
        found["kinds"] = table = summarise(times, "adamw")
        found["shares"] = method.shares
        found["seconds"] = sum(s * table[kind]["seconds"] for kind, s in method.shares.items())
        found["to_adamw"] = found["seconds"] / table["adamw"]["seconds"]
        found["to_fngd_later"] = found["seconds"] / table["fngd"]["seconds"]

    def everything(self) -> None:
        """Run all parts, the most important first."""
        parts = self.options.parts
        names = [
            name
            for name in self.shapes
            if self.options.only in (None, []) or name in self.options.only
        ]
        if "ceilings" in parts:
            self.run("ceilings", self.ceilings, 20.0)
        if "shapes" in parts:
            for name in names:
                if name != IMAGES:
                    part = functools.partial(self.shape, name=name)
                    self.run(f"shape {name}", part, _SHAPE_SECONDS)
        if "profile" in parts:
            self.run("profile", self.profile, _PROFILE_SECONDS)
        if "rules" in parts:
            self.run("rules", self.rules, _RULES_SECONDS)
        if "solves" in parts:
            sizes = (8,) if self.options.tiny else (16, 64, 128, 256)
            part = functools.partial(time_solves, clock=self.clock, sizes=sizes)
            self.run("solves", part, _RULES_SECONDS)
        if "methods" in parts:
            for name, method in METHODS.items():
                part = functools.partial(self.method, name=name)
                self.run(f"method {name}", part, method.seconds)


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Interrupt the enclosed work after some time, as soon as Python has a say.

    Args:
        seconds: The time.

    Raises:
        TimeoutError: In the enclosed work, or before it where there is no time.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def print_results(results: dict[str, dict[str, Any]]) -> None:
    """Print the numbers that have goals, and the parts that failed."""
    steps, methods, last = [], [], []
    for part, found in results.items():
        work = found.get("work", {})
        for kind, row in found.get("times", {}).items():
            steps.append(
                {
                    "shape": part.removeprefix("shape "),
                    "step": kind,
                    "ms": 1000 * row["seconds"],
                    "ratio": row["ratio"],
                    "launch": row["launch_seconds"] / row["seconds"],
                    "memory": found["memory"][kind]["ratio"],
                    "operations": work.get("operations_ratio") if "first" in kind else None,
                    "ten epochs": row.get("ten_epochs"),
                }
            )
        if "to_adamw" in found:
            name = part.removeprefix("method ")
            ratios = {"to AdamW": found["to_adamw"], "to FNGD later": found["to_fngd_later"]}
            methods.append({"ResNet-18": name, "ms": 1000 * found["seconds"], **ratios})
        if work.get("against_roofline"):
            last.append(f"{part}: the first epoch adds {work['against_roofline']:.2f} x roofline")
        if "error" in found:
            last.append(f"{part} failed: {found['error'].strip().splitlines()[-1]}")
    rules = [
        {"optimizer.step()": name, "ms": 1000 * row["seconds"], "ratio": row["ratio"]}
        for name, row in results.get("rules", {}).items()
        if isinstance(row, dict)
    ]
    for rows in (steps, rules, methods):
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    print("\n".join(last))


def main() -> None:
    """Run the benchmark from the command line."""
    (options,) = parse([Options], __doc__)
    bench = Bench(options)
    bench.everything()
    print_results(bench.results)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
