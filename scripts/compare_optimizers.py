r"""Compare optimizers on the same model, data, seeds, schedule and search budget.

    python scripts/compare_optimizers.py scripts/plans/cifar10.json --results runs/cifar10

Every optimizer gets the same number of search trials. The trial with the best validation objective
sets the values of the final runs, one for each seed. If the plan names an optimizer under
`equal_time`, further runs take as many steps as fit into that optimizer's training time.

Each finished run is a file below RESULTS/runs. At the end all runs move into RESULTS/runs.jsonl,
and table.md, search.md and curves.png are made from it (without seconds if the plan says
`timed: false`). The same command resumes a stopped comparison.
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
    """Parse the command line, by default that of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="JSON file, as in scripts/plans")
    parser.add_argument(
        "--results", type=Path, help="folder of results; default: runs/compare/NAME_OF_PLAN"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of settings, messages and models; default: runs/compare/NAME_OF_PLAN/work",
    )
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="run only these optimizers")
    parser.add_argument(
        "--stage",
        choices=("search", "final", "timed", "report"),
        help="run only this one; timed: runs of equal time; report: no runs; default: all in turn",
    )
    parser.add_argument(
        "--max_minutes",
        type=float,
        help="start no run after this time; the report is still written",
    )
    options = parser.parse_args(arguments)
    usual = Path("runs/compare") / options.plan.stem
    options.results = options.results or usual
    options.work = options.work or usual / "work"
    return options


def main() -> None:
    """Execute the remaining runs of the plan and write the report.

    Raises:
        PlanError: If the plan, an option, or an earlier result cannot be used.
    """
    options = parse()
    plan = load_plan(options.plan)
    for label in options.only or ():
        if label not in plan.optimizers:
            known = ", ".join(plan.optimizers)
            raise PlanError(f"--only: the plan has no {label!r}: choose {known}")
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
    """Run the command and return its exit code; an error that the user can fix is one line."""
    # SIGTERM must also end the training process.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except PlanError as error:
        print(f"compare_optimizers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare_optimizers: stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
