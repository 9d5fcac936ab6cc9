"""Writes the tables of README.md that come from the code and from committed result files.

python scripts/readme_tables.py            # rewrites README.md
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

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

from hf_fngd import EvaConfig, FNGDConfig, KFACConfig, SENGConfig, TENGraDConfig
from hf_fngd.methods.base import PreconditionerConfig
from hf_fngd.settings import OptimizerConfig

ROOT = Path(__file__).resolve().parents[1]


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


# Mark in README, and titles of the reports shown there. Those of `comparison` were timed.
REPORTS = {
    "comparison": {
        "compare_cifar10": "CIFAR-10, 18,000 images, ResNet-18 of width 8, 5 epochs",
        "compare_multi30k": "Multi30K en-de, 6,000 pairs, Marian of width 128 from scratch, "
        "5 epochs",
    },
    "quality": {
        "quality_finetune": "Fine-tuning a Marian of width 128 (trained on Tatoeba) on 2,000 pairs "
        "of Multi30K en-de, 5 epochs",
        "quality_scratch": "Multi30K en-de, 6,000 pairs, Marian of width 128 from scratch, "
        "10 epochs; searched with 3,000 pairs and 188 steps",
    },
    "ablation": {
        "ablation_finetune": "The same fine-tuning, at the settings that were found for `sgd_rms`",
    },
    "leave_one_out": {
        "quality_cifar10": "CIFAR-10, 18,000 images, ResNet-18 of width 8, 3 epochs",
        "ablation_cifar10": "The same training, one setting for all but the learning rate of `rms`",
        "ablation_cifar10_wide": "The same at width 32",
        "ablation_scratch": "Multi30K en-de from scratch, 3,000 pairs, 188 steps, at settings that "
        "were found for `sgd_rms` and Muon",
    },
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


def reports(titles: Mapping[str, str], timed: bool) -> str:
    """Makes short tables of comparisons from their reports.

    Args:
        titles: Folder of each under the results, and what it is.
        timed: Whether seconds are shown.

    Returns:
        Markdown.
    """
    parts = []
    for name, title in titles.items():
        folder = RESULTS / name
        lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
        # The first table; one of equal time may follow.
        begin = next(i for i, line in enumerate(lines) if line.startswith("|"))
        first = itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])
        table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in first]
        kept = [i for i, cell in enumerate(table[0]) if _is_shown(cell.strip(), timed)]
        made = [row for row in table if not any(cell.strip().startswith("0 of ") for cell in row)]
        rows = ["| " + " | ".join(row[i].strip() for i in kept) + " |" for row in made]
        rows[1] = "|---" * len(kept) + "|"
        place = folder.relative_to(ROOT).as_posix()
        links = f"[whole table]({place}/table.md)"
        if (folder / "search.md").exists():
            links += f", [every trial]({place}/search.md)"
        parts += [f"**{title}** ({links}):", "", *rows, ""]
        if (folder / "curves.png").exists():
            parts += [f"![curves]({place}/curves.png)", ""]
    return "\n".join(parts).rstrip()


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


def _is_shown(column: str, timed: bool) -> bool:
    if column == "s / step" or column.startswith("against "):
        return timed
    return column in ("optimizer", "final runs") or column.startswith(("test ", "eval_"))


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
        text: README.md.

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
    ):
        tables[make.__name__] = make()
    for name, titles in REPORTS.items():
        tables[name] = reports(titles, timed=name == "comparison")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        block = f"{begin}\n{table}\n{end}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
