r"""Compares optimizers: the same model, data, seeds, schedule and budget for each.

    python scripts/compare_optimizers.py scripts/plans/cifar10.json --results runs/cifar10

Every optimizer gets the same number of search trials; the best setting by the validation objective
then runs over several seeds and, if the plan names an optimizer under equal_time, once more for as
many steps as fit into that one's seconds. One JSON file a run under RESULTS/runs, and from these
table.md, search.md and curves.png: without seconds where the plan says `timed: false`, because
other work ran beside it. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from comparison.campaign import Campaign
from comparison.plan import PlanError, load_plan
from comparison.report import write_report
from comparison.results import fold_runs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: Words; default: those of the process.

    Returns:
        Options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="JSON file: see scripts/plans")
    parser.add_argument("--results", type=Path, help="default: runs/compare/NAME_OF_PLAN")
    parser.add_argument(
        "--work",
        type=Path,
        help="settings, messages and models; default: runs/compare/NAME_OF_PLAN/work",
    )
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="run these optimizers only")
    parser.add_argument(
        "--stage",
        choices=("search", "final", "timed", "report"),
        help="timed: the runs of equal time, if the plan has equal_time; default: all in turn",
    )
    parser.add_argument(
        "--max_minutes", type=float, help="start no new run after this; the report is still written"
    )
    options = parser.parse_args(arguments)
    usual = Path("runs/compare") / options.plan.stem
    options.results = options.results or usual
    options.work = options.work or usual / "work"
    return options


def main() -> None:
    """Runs what is left of the plan, and reports.

    Raises:
        PlanError: If the plan, an option, or an earlier result cannot be used.
    """
    options = parse()
    plan = load_plan(options.plan)
    for label in options.only or ():
        if label not in plan.optimizers:
            known = ", ".join(plan.optimizers)
            raise PlanError(f"--only: the plan has no {label!r}, it has {known}")
    campaign = Campaign(plan, options.results, options.work, options.only, options.max_minutes)
    if options.stage != "report":
        campaign.check()
        if options.stage in (None, "search"):
            campaign.search()
        if options.stage in (None, "final"):
            campaign.final(strict=options.stage == "final")
        if options.stage in (None, "timed"):
            campaign.timed(strict=options.stage == "timed")
    fold_runs(options.results)
    for path in write_report(plan, options.results):
        print(f"written: {path}")


def cli() -> int:
    """Runs the command; what the user can mend ends it with one line on stderr.

    Returns:
        Exit code.
    """
    # So that SIGTERM also ends the training process.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except PlanError as error:
        print(f"compare_optimizers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare_optimizers: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
