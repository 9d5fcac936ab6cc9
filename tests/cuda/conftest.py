"""Float32 means float32, algorithms are repeatable, and what tests measured is printed last."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _precise() -> Iterator[None]:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    repeatable = torch.backends.cudnn.deterministic
    for place in places:
        place.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed
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
