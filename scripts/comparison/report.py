"""The pages and the picture of a comparison, made from its results."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from comparison import results
from comparison.jobs import TRAINER_SETTINGS, optim_args
from comparison.outcome import NONE, Outcome, difference, outcomes, spread
from comparison.plan import Plan, shown
from comparison.search import at_edge
from hf_fngd.report.plots import plot


def write_report(plan: Plan, folder: Path) -> list[Path]:
    """Write table.md, search.md if the plan has trials, and curves.png if final runs are usable.

    Args:
        plan: The plan.
        folder: Folder of results.

    Returns:
        Paths of the files.
    """
    found = outcomes(plan, folder)
    pages = {"table.md": table(plan, folder, found)}
    if plan.trials:
        pages["search.md"] = search_table(plan, found)
    for name, text in pages.items():
        results.write_text(folder / name, text)
    written = [folder / name for name in pages]
    series = {outcome.optimizer.label: outcome.usable for outcome in found if outcome.usable}
    if series:
        plot(folder / "curves.png", series, plan.objective, plan.timed)
        written.append(folder / "curves.png")
    return written


def table(plan: Plan, folder: Path, found: Sequence[Outcome]) -> str:
    """Return the Markdown page with a row for each optimizer.

    Args:
        plan: The plan.
        folder: Folder of results, for the command.
        found: Outcomes, in the order of the plan.

    Returns:
        Markdown.
    """
    rows = []
    for outcome in found:
        status = [trial["status"] for trial in outcome.trials]
        row = {
            "optimizer": outcome.optimizer.label,
            "learning rate": NONE,
            "other settings": NONE,
            "trials": len(status),
            "ok / diverged / failed": " / ".join(
                str(status.count(one)) for one in ("ok", "diverged", "failed")
            ),
            "final runs": f"{len(outcome.usable)} of {len(plan.final_seeds)}",
            **{f"test {name}": spread(outcome.numbers(name)) for name in plan.final_metrics},
            plan.objective: spread(outcome.numbers("objective")),
            **_against(plan, outcome, found, lambda one: one.usable),
            **({"AUC of γ": spread(_auc(outcome))} if any(map(_auc, found)) else {}),
            "training loss": spread(outcome.numbers("train_loss")),
        }
        if plan.timed:
            row |= _seconds(outcome, found[0])
        if outcome.chosen:
            values, settings = outcome.chosen["searched"], outcome.chosen["settings"]
            rate = settings.get("learning_rate")
            row["learning rate"] = NONE if rate is None else f"{rate:g}"
            told = [f"{n}={values[n]:g}" for n in TRAINER_SETTINGS[1:] if n in values]
            own = outcome.optimizer.settings.items()
            told += [f"{n}={value}" for n, value in own if n != "learning_rate"]
            told += filter(None, [optim_args(outcome.optimizer, values)])
            row["other settings"] = _cell(", ".join(told) or NONE)
        rows.append(row)
    places = [shown(plan.path), "--results", shown(folder)]
    command = ["python", "scripts/compare_optimizers.py", *places]
    seeds = ", ".join(map(str, plan.final_seeds))
    better = "largest" if plan.more_is_better else "smallest"
    source = "Settings: those of the plan, without a search."
    if plan.trials:
        source = (
            f"Settings: those of the trial with the {better} {plan.objective}, of {plan.trials} "
            "for each optimizer (search.md)."
        )
    lines = [
        f"    {shlex.join(command)}",
        "",
        tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
        "",
        f"Final runs: mean ± sample standard deviation; seeds: {seeds}. {source} Training loss: "
        "the last logged one.",
        *_pairs(plan),
        *_equal_time(plan, found),
        *_notes(plan, found),
        *_machine(found),
    ]
    return "\n".join(lines) + "\n"


def _pairs(plan: Plan) -> list[str]:
    if plan.paired_with is None:
        return []
    told = f"{plan.objective} against {plan.paired_with}: mean difference between runs of the same "
    return [f"{told}seed (initial weights, order of the data) ± its standard error."]


def _against(
    plan: Plan, outcome: Outcome, found: Sequence[Outcome], runs: Callable[[Outcome], Sequence[Any]]
) -> dict[str, str]:
    label = plan.paired_with
    if label is None:
        return {}
    other = next(one for one in found if one.optimizer.label == label)
    told = NONE if other is outcome else difference("objective", runs(outcome), runs(other))
    return {f"{plan.objective} against {label}": told}


def _seconds(outcome: Outcome, first: Outcome) -> dict[str, str]:
    step, unit = (one.numbers("seconds_per_step") for one in (outcome, first))
    ratio = statistics.mean(step) / statistics.mean(unit) if step and unit else None
    return {
        "s / step": _mean(step),
        f"against {first.optimizer.label}": NONE if ratio is None else f"{ratio:.2f}",
        "training s": _mean(outcome.numbers("train_seconds")),
    }


def _equal_time(plan: Plan, found: Sequence[Outcome]) -> list[str]:
    if plan.equal_time is None:
        return []

    def timed(outcome: Outcome) -> Sequence[Any]:
        # The final runs of the reference already take the reference time.
        reference = outcome.optimizer.label == plan.equal_time
        return outcome.usable if reference else outcome.usable_timed

    rows = []
    for outcome in found:
        runs = timed(outcome)
        rows.append(
            {
                "optimizer": outcome.optimizer.label,
                "runs": f"{len(runs)} of {len(plan.final_seeds)}",
                "steps": _mean(outcome.numbers("steps", runs)),
                **{f"test {n}": spread(outcome.numbers(n, runs)) for n in plan.final_metrics},
                plan.objective: spread(outcome.numbers("objective", runs)),
                **_against(plan, outcome, found, timed),
                "training s": _mean(outcome.numbers("train_seconds", runs)),
            }
        )
    return [
        "",
        f"At equal time: as many steps as fit into the training seconds of {plan.equal_time}, by "
        "the seconds a step of the runs above, with the whole learning-rate schedule.",
        "",
        tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
    ]


def search_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """Return the Markdown page with every search trial."""
    lines = [f"Every trial, by {plan.objective} on the validation set; **bold**: chosen."]
    for outcome in found:
        rows = []
        for trial in outcome.trials:
            value = trial["objective"]
            shown = NONE if value is None else f"{value:.5g}"
            best = outcome.chosen is not None and trial["run"] == outcome.chosen["run"]
            rows.append(
                {
                    "trial": trial["run"],
                    **{name: f"{number:g}" for name, number in trial["searched"].items()},
                    plan.objective: f"**{shown}**" if best else shown,
                    "status": trial["status"],
                    "reason": _cell(trial["reason"] or ""),
                    "seconds": f"{trial['total_seconds']:.0f}",
                }
            )
        ranges = ", ".join(
            f"{name} {low:g} to {high:g}" for name, (low, high) in outcome.optimizer.search.items()
        )
        lines += ["", f"## {outcome.optimizer.label}", "", f"Ranges: {ranges}.", ""]
        body = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        lines.append(body or "No trial yet.")
    return "\n".join(lines) + "\n"


def _auc(outcome: Outcome) -> list[float]:
    """Return the AUC of coefficients as a filter, for each run with misaligned pairs."""
    return [run["misaligned"]["auc"] for run in outcome.usable if "misaligned" in run]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _mean(numbers: Sequence[float]) -> str:
    return f"{statistics.mean(numbers):.4g}" if numbers else NONE


def _notes(plan: Plan, found: Sequence[Outcome]) -> list[str]:
    notes = []
    for outcome in found:
        label, trials = outcome.optimizer.label, outcome.trials
        if len(trials) < plan.trials:
            notes.append(f"{label}: {len(trials)} of {plan.trials} trials made so far.")
        elif outcome.chosen is None:
            notes.append(
                f"{label}: no trial ended with a finite {plan.objective}, so there are no final "
                f"runs; the last one: {trials[-1]['reason']}."
            )
        else:
            edges = at_edge(outcome.optimizer, outcome.chosen["searched"])
            notes += [f"{label}: {text}." for text in edges]
            left = len(plan.final_seeds) - len(outcome.finals)
            if left:
                notes.append(f"{label}: {left} of {len(plan.final_seeds)} final runs are missing.")
            for run in [*outcome.finals, *outcome.timed]:
                if run["status"] != "ok":
                    told = f"{run['status']} ({run['reason']})"
                    notes.append(f"{label}: {run['run']} {told} and is not part of the means.")
    if any(run["evaluation_in_seconds"] for outcome in found for run in outcome.usable):
        notes.append("The seconds include the evaluations during training.")
    return ["", *(f"- {note}" for note in notes)] if notes else []


def _machine(found: Sequence[Outcome]) -> list[str]:
    machines: list[Mapping[str, Any]] = []
    timed = [run for outcome in found for run in [*outcome.finals, *outcome.timed]]
    # The tables show the seconds of final runs.
    for run in timed or [run for outcome in found for run in outcome.trials]:
        # A failed run reports only part of its environment.
        if run["status"] != "failed" and run["environment"] not in machines:
            machines.append(run["environment"])
    told = []
    for one in machines:
        versions = ", ".join(f"{name} {number}" for name, number in one.get("versions", {}).items())
        threads = one["OMP_NUM_THREADS"]
        told.append(
            f"{one.get('device', one['machine'])}, {one['cores']} cores"
            + (f", OMP_NUM_THREADS={threads}" if threads else "")
            + (f"; {versions}" if versions else "")
        )
    if len(told) > 1:
        return ["", "**The runs were made on different machines or versions**, so their seconds "
                "do not compare:", *("- " + one for one in told)]  # fmt: skip
    return ["", f"Machine: {told[0]}."] if told else []
