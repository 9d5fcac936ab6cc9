"""Tables of pages from result files: reading, rendering, names of models and machines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"
Columns = Mapping[str, Callable[[Any], Any]]


def table(items: Iterable[Any], columns: Columns, texts: int = 1) -> str:
    """Render a Markdown table.

    Args:
        items: What the rows are about.
        columns: For each head a function from an item to its cell; a float gets two digits.
        texts: Number of columns with text, the first ones; the others hold numbers.

    Returns:
        Markdown without padding, so that a longer cell changes one line and not all.
    """
    rows = [[_cell(make(item)) for make in columns.values()] for item in items]
    sides = ["left"] * texts + ["right"] * (len(columns) - texts)
    made = tabulate(rows, [*columns], tablefmt="pipe", disable_numparse=True, colalign=sides)
    head, line, *rest = (re.sub(r" {2,}", " ", one) for one in made.splitlines())
    return "\n".join([head, re.sub("-+", "---", line), *rest])


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def load(name: str) -> dict[str, Any]:
    """Read a result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def reports(folder: str) -> list[dict[str, Any]]:
    """Read all result files of a folder, by name."""
    return [load(f"{folder}/{path.name}") for path in sorted((RESULTS / folder).glob("*.json"))]


def shape(report: Mapping[str, Any]) -> str:
    """Name the model and batch of a benchmark."""
    work = report["workload"]
    size = f"batch {work['batch_size']}"
    if work["shapes"] == "resnet18":
        return f"ResNet-18, 32x32, {size}"
    layers, width = work["layers"], f"d {work['d_model']}"
    size += f" × {work['length']}" + (", bf16 autocast" if work.get("bf16") else "")
    if work["shapes"] == "marian":
        words = f", {work['vocab_size']:,} words" if work["vocab_size"] > 8000 else ""
        return f"Marian, {width}, {layers} + {layers} layers{words}, {size}"
    if work["shapes"] == "lora":
        blocks = "a Llama block" if layers == 1 else f"{layers} Llama blocks"
        return f"LoRA, rank {work['lora_rank']}, {blocks} of {width}, {size}"
    return f"GPT-2, {width}, {layers} blocks, {size}"


def machine(report: Mapping[str, Any], *more: str) -> str:
    """Name the machine of a measurement, as a paragraph after its table."""
    place = [f"{report['machine']}, torch {report['torch']}"] if "torch" in report else []
    return f"\n\nMachine: {'; '.join([*(place or [report['machine']]), *more])}."
