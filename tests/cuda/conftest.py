"""Float32 means float32, algorithms are repeatable, and what tests measured is printed last.

HF_FNGD_GPU_REPORT names a JSON file for the outcomes, of which the table of what works tells.
"""

import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def _precise() -> Iterator[None]:
    # Not read before: torch refuses where a library has set them by their newer names.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    repeatable = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = repeatable


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        f"{report.nodeid.rpartition('/')[2]}: {name} {value}"
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and "tests/cuda/" in report.nodeid
        for name, value in report.user_properties
    ]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
    if "HF_FNGD_GPU_REPORT" in os.environ:
        outcomes: dict[str, dict[str, int]] = {}
        for outcome in ("passed", "failed", "skipped"):
            reports = terminalreporter.getreports(outcome)
            names = [one.nodeid.partition("[")[0] for one in reports]
            for name, count in collections.Counter(names).items():
                outcomes.setdefault(name, {})[outcome] = count
        machine = {"torch": torch.__version__, "transformers": transformers.__version__}
        if torch.cuda.is_available():
            machine["device"] = torch.cuda.get_device_name()
        found = {"machine": machine, "outcomes": dict(sorted(outcomes.items())), "measured": lines}
        Path(os.environ["HF_FNGD_GPU_REPORT"]).write_text(json.dumps(found, indent=2) + "\n")
