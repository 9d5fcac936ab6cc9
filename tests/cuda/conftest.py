"""Float32 means float32, algorithms are repeatable, and what tests measured is printed last."""

from collections.abc import Iterator

import pytest
import torch


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
