"""Tables of the comparisons, from the pages that `compare_optimizers.py` wrote."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping

from readme_costs import RESULTS, table_head

# Mark in scripts/plans/README.md, and titles of the reports.
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
        "quality_lora": "The same fine-tuning by LoRA adapters of rank 16",
        "quality_small_batches": "The same fine-tuning in batches of 8, 3 epochs",
    },
    "quality_bleu": {
        "quality_finetune_bleu": "The same fine-tuning, searched by BLEU on the validation set",
    },
    "paper": {
        "paper_setting": "Multi30K en-de, 6,000 pairs, Marian of width 128 with 6 + 6 layers from "
        "scratch, 5 epochs; searched with 3,000 pairs and 188 steps",
    },
    "noise": {
        "noise_finetune": "The same fine-tuning with 20 % or 40 % of the pairs misaligned",
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


# Folders of results, by column of the summary: its heading, and the score in it.
TASKS = {
    "quality_finetune": ("fine-tuning: BLEU", "test bleu"),
    "quality_small_batches": ("in batches of 8", "test bleu"),
    "quality_lora": ("by LoRA", "test bleu"),
    "quality_scratch": ("from scratch: BLEU", "test bleu"),
    "quality_cifar10": ("CIFAR-10: accuracy", "test accuracy"),
}
# Results of `methods.py` with the shapes of these tasks, by heading.
STEPS = {"methods_small_marian": "step, Marian", "methods_small_resnet": "step, ResNet"}
# Optimizer, states that it keeps for each selected weight, its labels in the plans, and the kinds
# of its steps in `methods.py` with their shares.
ROWS: dict[str, tuple[int, tuple[str, ...], dict[str, float]]] = {
    "AdamW": (2, ("adamw",), {"adamw step": 1}),
    "Muon": (1, ("muon",), {"muon step": 1}),
    "SGD": (1, ("sgd",), {"sgd step": 1}),
    "SGD, `update_scale=rms`": (1, ("sgd_rms",), {"sgd_rms step": 1}),
    "FNGD, γ of the first of five epochs": (
        1,
        ("fngd_rms",),
        {"fngd collect": 0.2, "fngd reuse": 0.8},
    ),
    "FNGD, γ of every step": (1, ("fngd_rms_fresh",), {"fngd collect": 1}),
    "the same, `leave_one_out`": (1, ("fngd_loo_fresh",), {"fngd collect": 1}),
    "the same by tokens": (1, ("fngd_rms_loo_token",), {}),
    "TENGraD, every 20 steps": (1, ("tengrad",), {"tengrad update": 0.05, "tengrad between": 0.95}),
}


def summary() -> str:
    """Makes the table of tasks and optimizers: scores on the test sets, and the cost of a step.

    Returns:
        Markdown.
    """
    pages = {name: _page(name) for name in TASKS}
    steps = {name: _seconds(name) for name in STEPS}
    headings = (heading for heading, _ in TASKS.values())
    lines = table_head(*headings, *STEPS.values(), "states a weight")
    for title, (states, labels, shares) in ROWS.items():
        cells = [title]
        for name, (_, score) in TASKS.items():
            found = next((row for row in pages[name] if row["optimizer"] in labels), None)
            cells.append(found[score] if found else "")
        for seconds in steps.values():
            mean = sum(share * seconds[kind] for kind, share in shares.items())
            cells.append(f"{mean / seconds['adamw step']:.2f}" if shares else "")
        lines.append("| " + " | ".join([*cells, str(states)]) + " |")
    return "\n".join(lines)


def reports(titles: Mapping[str, str]) -> str:
    """Makes short tables of comparisons from their reports.

    Args:
        titles: Folder of each under the results, and what it is.

    Returns:
        Markdown.
    """
    parts = []
    for name, title in titles.items():
        folder = RESULTS / name
        rows = _page(name)
        kept = [head for head in rows[0] if _is_shown(head)]
        lines = ["| " + " | ".join(kept) + " |", "|---" * len(kept) + "|"]
        lines += ["| " + " | ".join(row[head] for head in kept) + " |" for row in rows]
        place = f"../bench/results/{name}"
        links = f"[whole table]({place}/table.md)"
        if (folder / "search.md").exists():
            links += f", [every trial]({place}/search.md)"
        parts += [f"**{title}** ({links}):", "", *lines, ""]
        if (folder / "curves.png").exists():
            parts += [f"![curves]({place}/curves.png)", ""]
    return "\n".join(parts).rstrip()


def _seconds(name: str) -> dict[str, float]:
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
    return {
        f"{row['method']} {kind}": seconds
        for row in results.values()
        for kind, seconds in row["kinds"].items()
    }


def _page(name: str) -> list[dict[str, str]]:
    lines = (RESULTS / name / "table.md").read_text(encoding="utf-8").splitlines()
    # The first table; one of equal time may follow.
    begin = next(i for i, line in enumerate(lines) if line.startswith("|"))
    first = itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])
    heads, _, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in first
    )
    made = [dict(zip(heads, row, strict=True)) for row in rows]
    return [row for row in made if not row["final runs"].startswith("0 of ")]


def _is_shown(column: str) -> bool:
    # Seconds are there where the plan was timed.
    return column in ("optimizer", "final runs", "AUC of γ", "s / step") or column.startswith(
        ("test ", "eval_", "against ")
    )
