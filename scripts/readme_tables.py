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

from hf_fngd import EvaConfig, FNGDConfig, KFACConfig, SENGConfig, TENGraDConfig
from hf_fngd.methods.base import PreconditionerConfig
from hf_fngd.settings import OptimizerConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "bench" / "results"


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


COMPARISONS = {
    "compare_cifar10": "CIFAR-10, 18,000 images, ResNet-18 of width 8, 5 epochs",
    "compare_multi30k": "Multi30K en-de, 6,000 pairs, Marian of width 128 from scratch, 5 epochs",
}
STUDIES = {
    "quality_finetune": "Fine-tuning a Marian of width 128 (trained on Tatoeba) on 2,000 pairs of "
    "Multi30K en-de, 5 epochs",
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


def costs() -> str:
    """Makes the table of time and memory from the benchmark results.

    Returns:
        Markdown.
    """
    time = json.loads((RESULTS / "step_time.json").read_text())
    memory = json.loads((RESULTS / "memory.json").read_text())
    lines = ["| | step | against AdamW | quartiles | peak memory against AdamW |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, row in time["results"].items():
        lines.append(
            f"| {name} | {1000 * row['median_seconds']:.0f} ms | {row['median_ratio']:.2f} | "
            f"{row['quartile_low']:.2f} to {row['quartile_high']:.2f} | "
            f"{memory['results'][name]['ratio']:.2f} |"
        )
    lines += ["", f"Machine: {time['machine']}, torch {time['torch']}."]
    return "\n".join(lines)


def checkpointing() -> str:
    """Makes the table of what activation checkpointing saves from the benchmark results.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "checkpointing.json").read_text())
    modes = ("non-reentrant", "reentrant")
    lines = [
        "| | peak without | non-reentrant saves | to AdamW | re-entrant saves | to AdamW |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = report["results"]["adamw"]["saved_mib"]
    for name, row in report["results"].items():
        cells = [
            f"{row['saved_mib'][mode]:.0f} MiB | {row['saved_mib'][mode] / base[mode]:.2f}"
            for mode in modes
        ]
        lines.append(f"| {name} | {row['peak_mib']['none']:.0f} MiB | " + " | ".join(cells) + " |")
    shapes = report["workload"]
    sizes = f"batch {shapes['batch_size']}, {shapes['length']} tokens"
    return "\n".join(
        [*lines, "", f"Machine: {report['machine']}, torch {report['torch']}; {sizes}."]
    )


def store() -> str:
    """Makes the table of the coefficient store's memory and time from the benchmark results.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "store.json").read_text())
    results = report["results"]
    lines = [
        "| rows | ids | precision | table | beside it | look-up | share of a step |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in [*results["measured"], *results["on_paper"]]:
        place = " in a file" if row["file"] else ""
        time = "not measured | "
        if "look_up_ms" in row:
            time = f"{row['look_up_ms']:.2f} ms | {row['share_of_step']:.2%}"
        lines.append(
            f"| {row['rows']:,} | {row['ids']} | {row['dtype']}{place} | "
            f"{row['table_mib']:,.0f} MiB | {row['beside_mib']:,.1f} MiB | {time} |"
        )
    batch = report["workload"]["batch_size"]
    last = f"Machine: {report['machine']}, torch {report['torch']}; a step of batch {batch} took "
    last += f"{results['step_ms']:.0f} ms. The largest numbers of rows are computed, not measured."
    return "\n".join([*lines, "", last])


def rules() -> str:
    """Makes the table of the update rules' time from the benchmark results.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "update_rules.json").read_text())
    lines = ["| | step | against the first | quartiles |", "|---|---:|---:|---:|"]
    for name, row in report["results"].items():
        lines.append(
            f"| {name} | {1000 * row['median_seconds']:.0f} ms | {row['median_ratio']:.2f} | "
            f"{row['quartile_low']:.2f} to {row['quartile_high']:.2f} |"
        )
    shapes = report["workload"]
    sizes = f"d_model {shapes['d_model']}, {shapes['layers']} + {shapes['layers']} layers"
    return "\n".join([*lines, "", f"Machine: {report['machine']}, {sizes}."])


def methods() -> str:
    """Makes the table of all methods' time and memory from the benchmark results.

    Returns:
        Markdown.
    """
    files = [RESULTS / f"methods_{name}.json" for name in ("resnet18", "multi30k")]
    if not all(file.exists() for file in files):
        return "Not measured yet."
    found = [json.loads(file.read_text()) for file in files]
    lines = [
        "| | ResNet-18: step | memory | Transformer: step | memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in found[0]["results"]:
        cells = []
        for report in found:
            row = report["results"][name]
            span = f"{row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f}"
            cells += [f"{row['ratio']:.2f} ({span})", f"{row['memory_ratio']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base = [report["results"]["sgd"]["seconds"] for report in found]
    lines += [
        "",
        f"Ratios to SGD ({base[0]:.1f} s and {base[1]:.1f} s a step), medians and range of "
        f"interleaved rounds. Machine: {found[0]['machine']}, torch {found[0]['torch']}.",
        "",
    ]
    for shapes, report in zip(("ResNet-18", "Transformer"), found, strict=True):
        seconds = {name: row["seconds"] for name, row in report["results"].items()}
        later = seconds["fngd, later epochs"]
        often, seldom = (seconds[f"kfac, inverse every {n}"] for n in (10, 100))
        peer = seconds["kfac-pytorch, inverse every 10"]
        tengrad, seng = seconds["tengrad, every 100"], seconds["seng, every 200"]
        lines.append(
            f"- {shapes}, in steps of FNGD's later epochs: KFAC with factors every step "
            f"{often / later:.2f} (inverse every 10 steps) and {seldom / later:.2f} (every 100), "
            f"TENGraD {tengrad / later:.2f}, SENG {seng / later:.2f}. Our KFAC takes "
            f"{often / peer:.2f} times as long as kfac-pytorch."
        )
    lines.append("- The FNGD paper reports 2.05 to 2.07 for KFAC on ResNet-18, on a GPU.")
    return "\n".join(lines)


def comparison() -> str:
    """Makes short tables of the tuned comparisons from their reports.

    Returns:
        Markdown.
    """
    return _reports(COMPARISONS, timed=True)


def quality() -> str:
    """Makes short tables of the studies of quality from their reports.

    Returns:
        Markdown.
    """
    return _reports(STUDIES, timed=False)


def _reports(titles: Mapping[str, str], timed: bool) -> str:
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
        links = f"[whole table]({place}/table.md), [every trial]({place}/search.md)"
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
    for make in (
        settings,
        costs,
        checkpointing,
        store,
        rules,
        methods,
        comparison,
        quality,
        sharing,
        support,
    ):
        name, table = make.__name__, make()
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        block = f"{begin}\n{table}\n{end}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
