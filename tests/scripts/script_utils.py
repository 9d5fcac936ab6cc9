"""Runs the training scripts in this process, to spare a start of Python for each."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from tests.hf.test_runner import ROOT


@contextlib.contextmanager
def script(path: Path) -> Iterator[ModuleType]:
    """The script as a module, with its own folder first on the path."""
    spec = importlib.util.spec_from_file_location(f"tests.script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # So that dataclasses find the module of their annotations.
    sys.modules[spec.name] = module
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
        yield module


def run_script(name: str, *words: Any, folder: Path = ROOT) -> int:
    """Calls `cli()` of scripts/NAME.py as `python scripts/NAME.py WORDS` in a folder would."""
    words = tuple(map(str, words))
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            script(ROOT / "scripts" / f"{name}.py") as module,
            mock.patch.object(sys, "argv", [f"scripts/{name}.py", *words]),
        ):
            return module.cli()
    finally:
        os.chdir(before)


def use_as_the_card_says(folder: Path) -> str:
    """What the lines of a card that load and use its model print."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace('"..."', repr(str(folder)))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, str(folder / "README.md"), "exec"), {})
    return printed.getvalue().strip()


def write_metric(folder: Path, name: str, predictions: str, references: str, result: str) -> Path:
    """Writes a metric of `evaluate` into a folder.

    Args:
        folder: Where its folder goes.
        name: Its name.
        predictions: Type of a prediction, as `string`.
        references: Type of its references; in brackets if there are several: `[string]`.
        result: What it computes of `predictions` and `references`, as Python.
    """
    types = ", ".join(
        f"{column!r}: " + (f"[Value({kind[1:-1]!r})]" if kind[0] == "[" else f"Value({kind!r})")
        for column, kind in (("predictions", predictions), ("references", references))
    )
    (folder / name).mkdir()
    (folder / name / f"{name}.py").write_text(
        f"""
import evaluate
from datasets import Features, Value

class Written(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", features=Features({{{types}}})
        )

    def _compute(self, predictions, references, scale=1):
        return {result}
""",
        encoding="utf-8",
    )
    return folder / name


def flat(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line; None and False are left out."""
    words: list[str] = []
    for name, value in settings.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
