"""Tables on time and memory, from the committed results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "bench" / "results"
# Column, and variant of scripts/bench/workload.py.
COSTS = {
    "`fngd_adamw`, later epochs": "fngd_adamw later epochs",
    "`fngd`": "fngd later epochs",
    "with `update_scale=rms`": "fngd later epochs, update_scale=rms",
}
FIRST = {
    "exact": "fngd_adamw first epoch",
    "`gram_outputs=64`": "fngd_adamw first epoch, gram_outputs=64",
    "and `gram_inputs=16`": "fngd_adamw first epoch, gram_inputs=16,gram_outputs=64",
    "`gram_dtype=bfloat16`": "fngd_adamw first epoch, gram_dtype=bfloat16",
}
MEMORY = {
    "`fngd_adamw`, later epochs": "fngd_adamw later epochs",
    "first epoch": "fngd_adamw first epoch",
    "`fngd`, later epochs": "fngd later epochs",
    "first epoch, `update_scale=rms`": "fngd first epoch, update_scale=rms",
}


def table_head(*columns: str) -> list[str]:
    """Begins a Markdown table whose first column has no name.

    Args:
        columns: Names of the others, which hold numbers.

    Returns:
        Its first two lines.
    """
    return ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]


def _row(report: Mapping[str, Any], *cells: str | float) -> str:
    words = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
    return f"| {_shape(report['workload'])} | " + " | ".join(words) + " |"


def costs() -> str:
    """Makes the table of step times by shape from the benchmark results.

    Returns:
        Markdown.
    """
    lines = table_head("AdamW", *COSTS)
    for report in _step_times():
        seconds = report["results"]["adamw"]["median_seconds"]
        ratios = [report["results"][name]["median_ratio"] for name in COSTS.values()]
        lines.append(_row(report, f"{seconds:.2f} s", *ratios))
    lines += ["", f"Machine: {report['machine']}, torch {report['torch']}."]
    return "\n".join(lines)


def first_epochs() -> str:
    """Makes the table of the first epoch's step times, exact and cheaper ones.

    Returns:
        Markdown.
    """
    lines = table_head(*FIRST, *(f"ten epochs, {how}" for how in list(FIRST)[::3]))
    for report in _step_times():
        found = {name: row["median_ratio"] for name, row in report["results"].items()}
        firsts = [found[name] for name in FIRST.values()]
        later = found["fngd_adamw later epochs"]
        lines.append(_row(report, *firsts, *((9 * later + one) / 10 for one in firsts[::3])))
    return "\n".join(lines)


def profiles() -> str:
    """Makes the table of where FNGD's steps spend more than AdamW's.

    Returns:
        Markdown.
    """
    lines = ["| | AdamW | FNGD | most of the difference |", "|---|---:|---:|---|"]
    for file in sorted((RESULTS / "profile").glob("*.json")):
        report = json.loads(file.read_text())
        found = report["results"]
        base, step = found["step"].values()
        more = [f"`{row['operator']}` {row['more']:+.0f}" for row in found["operators"][:4]]
        name = f"{_shape(report['workload'])}: `{found['variant']}`"
        lines.append(f"| {name} | {base:.0f} ms | {step:.0f} ms | {', '.join(more)} |")
    return "\n".join(lines)


def _step_times() -> list[dict[str, Any]]:
    files = sorted((RESULTS / "step_time").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def memory() -> str:
    """Makes the table of peak memory by shape from the benchmark results.

    Returns:
        Markdown.
    """
    files = sorted((RESULTS / "memory").glob("*.json"))
    lines = table_head("AdamW", *MEMORY)
    for file in files:
        report = json.loads(file.read_text())
        found = report["results"]
        ratios = [found[name]["ratio"] for name in MEMORY.values()]
        lines.append(_row(report, f"{found['adamw']['peak_mib']:.0f} MiB", *ratios))
    return "\n".join(lines)


def _shape(workload: Mapping[str, Any]) -> str:
    size = f"batch {workload['batch_size']}"
    if workload["shapes"] == "resnet18":
        return f"ResNet-18, 32x32, {size}"
    layers, width = workload["layers"], f"d {workload['d_model']}"
    size += f" × {workload['length']}" + (", bf16 autocast" if workload.get("bf16") else "")
    if workload["shapes"] == "marian":
        words = f", {workload['vocab_size']:,} words" if workload["vocab_size"] > 8000 else ""
        return f"Marian, {width}, {layers} + {layers} layers{words}, {size}"
    if workload["shapes"] == "lora":
        return f"LoRA, rank {workload['lora_rank']}, a Llama block of {width}, {size}"
    return f"GPT-2, {width}, {layers} blocks, {size}"


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


def estimates() -> str:
    """Makes the table of what an estimated Gram matrix costs in quality.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "estimates.json").read_text())
    lines = [
        "| λ | | r of γ with the exact | cosine with the natural gradient | plain gradient "
        "| training loss after 3 epochs, to the exact one's |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in report["results"]["measurements"]:
        if row["estimate"]:
            lines.append(
                f"| {row['damping']:g} | `{row['estimate']}` | {row['r']:.3f} | {row['cos']:.4f} | "
                f"{row['cos: plain']:.3f} | {row['ratio']:.4f} ± {row['deviation']:.4f} |"
            )
    return "\n".join(lines)


def convolutions() -> str:
    """Makes the table of what Gram matrices of convolutions take, exact and estimated.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "conv_estimates.json").read_text())
    names = [name for name in next(iter(report["results"].values())) if name != "layer"]
    lines = table_head(*names)
    for layer, rows in report["results"].items():
        ratios = " | ".join(f"{rows[name]['median_ratio']:.2f}" for name in names)
        lines.append(f"| {layer} | {ratios} |")
    return "\n".join(lines)


def growth() -> str:
    """Makes the table of exponents of step time.

    Returns:
        Markdown.
    """
    report = json.loads((RESULTS / "growth.json").read_text())
    columns = ("AdamW", "later epochs", "first epoch", "first epoch adds")
    lines = table_head("from", "to", *columns)
    for name, series in report["results"].items():
        sizes = [row["size"] for row in series["measurements"]]
        found = series["exponents"]
        cells = [f"{found[c]:.2f}" if c in found else "–" for c in columns]
        lines.append(f"| {name} | {min(sizes)} | {max(sizes)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Marian, d 256, 3 + 3 layers. Machine: {report['machine']}."])


def methods() -> str:
    """Makes the table of all methods' time and memory from the benchmark results.

    Returns:
        Markdown.
    """
    files = [RESULTS / f"methods_{name}.json" for name in ("resnet18", "multi30k")]
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
