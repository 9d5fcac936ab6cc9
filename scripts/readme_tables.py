"""Writes the tables of the pages that come from the code and from committed result files.

python scripts/readme_tables.py            # rewrites README.md and those under scripts
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

from hf_fngd.methods.base import PreconditionerConfig
from hf_fngd.settings import OptimizerConfig
from readme_costs import (
    RESULTS,
    checkpointing,
    convolutions,
    costs,
    estimates,
    first_epochs,
    growth,
    memory,
    methods,
    profiles,
    rules,
    store,
)
from readme_reports import REPORTS, reports, summary

from hf_fngd import EvaConfig, FNGDConfig, KFACConfig, SENGConfig, TENGraDConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "scripts/bench/README.md", "scripts/plans/README.md")
# Heading, and the classes of which the last one's settings are shown, but for those of the first.
CONFIGS = {
    "all methods": (object, OptimizerConfig),
    "FNGD": (OptimizerConfig, FNGDConfig),
    "KFAC, Eva, TENGraD and SENG": (OptimizerConfig, PreconditionerConfig),
    "KFAC": (PreconditionerConfig, KFACConfig),
    "Eva": (PreconditionerConfig, EvaConfig),
    "TENGraD": (PreconditionerConfig, TENGraDConfig),
    "SENG": (PreconditionerConfig, SENGConfig),
}


def settings() -> str:
    """Makes the table of settings from the config dataclasses.

    Returns:
        Markdown.
    """
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for heading, (base, config) in CONFIGS.items():
        known = {one.name: one.default for one in fields(base)} if base is not object else {}
        lines.append(f"| **{heading}** | | |")
        for one in fields(config):
            if one.name not in known or one.default != known[one.name]:
                text = one.metadata["help"].replace("|", "\\|")
                lines.append(f"| `{one.name}` | `{one.default}` | {text} |")
    return "\n".join(lines)


def sharing() -> str:
    """Makes the table of what is left of coefficients elsewhere from its study.

    Returns:
        Markdown.
    """
    lines = [
        "| | trained for | λ | r, other batch | r, earlier weights | plain gradient "
        "| γ of another batch | and of earlier weights |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    columns = ("r: batch", "r: weights", "cos: plain", "cos: shared", "cos: old")
    for kind, name in (("from scratch", ""), ("fine-tuning", "_finetune")):
        report = json.loads((RESULTS / f"coefficient_noise{name}.json").read_text())
        for row in report["results"]["measurements"]:
            if "cos: old" in row:
                cells = " | ".join(f"{row[column]:.2f}" for column in columns)
                lines.append(f"| {kind} | {row['epochs']} epochs | {row['damping']:g} | {cells} |")
    return "\n".join(lines)


def support() -> str:
    """Makes the table of what works from the marks of the tests that show it.

    Returns:
        Markdown.
    """
    rows = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.feature":
                    name, state, *note = map(ast.literal_eval, mark.args)
                    told = ": ".join([state, *note])
                    rows.append((name, told, f"`{path.stem}::{node.name}`"))
    rows.sort(key=lambda row: row[0].strip("`").lower())
    lines = ["| | | shown by |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def fill(text: str) -> str:
    """Puts the tables between their marks.

    Args:
        text: A page.

    Returns:
        The text with present tables.
    """
    tables = {}
    for make in (
        settings,
        costs,
        memory,
        checkpointing,
        store,
        rules,
        profiles,
        first_epochs,
        estimates,
        convolutions,
        growth,
        methods,
        sharing,
        support,
        summary,
    ):
        tables[make.__name__] = make()
    for name, titles in REPORTS.items():
        tables[name] = reports(titles)
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        block = f"{begin}\n{table}\n{end}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in (ROOT / name for name in PAGES):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
