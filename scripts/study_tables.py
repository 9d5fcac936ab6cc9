"""Tables of scores: studies of `compare_optimizers.py`, and the front page's two."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

from common.tabled import RESULTS, load, machine, shape, table
from comparison.results import read_runs

# Heads of columns, and the middle of the names of files with the cost of all methods.
METHODS = {"ResNet-18": "resnet18", "Transformer": "multi30k"}
SHOWN = re.compile(r"optimizer|final runs|AUC of γ|s / step|test .*|eval_.*|against .*")


def study(name: str, number: int = 0) -> dict[str, dict[str, str]]:
    """Read a table of a study's table.md: 0 is that of the final runs, 1 that at equal time.

    Returns:
        Cells by head, by label; without the labels that have no run.
    """
    lines = (RESULTS / name / "table.md").read_text(encoding="utf-8").splitlines()
    blocks = [[*part] for is_row, part in groupby(lines, lambda line: line[:1] == "|") if is_row]
    heads, _, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in blocks[number]
    )
    found = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    runs = "runs" if number else "final runs"
    return {label: row for label, row in found.items() if not row[runs].startswith("0 of ")}


def short(name: str) -> str:
    """Make the short table of a study: scores on the test sets, and seconds where they count."""
    rows = [*study(name).values()]
    heads = [head for head in rows[0] if SHOWN.fullmatch(head)]
    return table(rows, {head: itemgetter(head) for head in heads})


def sharing() -> str:
    """Make the table of how long coefficients stay valid."""
    rows = []
    for kind, name in (("from scratch", ""), ("fine-tuning", "_finetune")):
        found = load(f"coefficient_noise{name}.json")["results"]["measurements"]
        rows += [{"kind": kind, **one} for one in found if "cos: old" in one]
    columns = {
        "": itemgetter("kind"),
        "trained for": lambda row: f"{row['epochs']} epoch{'s' * (row['epochs'] > 1)}",
        "λ": lambda row: f"{row['damping']:g}",
        "r, other batch": itemgetter("r: batch"),
        "r, earlier weights": itemgetter("r: weights"),
        "plain gradient": itemgetter("cos: plain"),
        "γ of another batch": itemgetter("cos: shared"),
        "and of earlier weights": itemgetter("cos: old"),
    }
    return table(rows, columns, texts=2)


def directions() -> str:
    """Make the table of how much of other batches' loss each direction can remove."""
    found = [load(name) for name in ("direction_quality.json", "direction_quality_late.json")]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in (row for report in found for row in report["results"]["measurements"]):
        row = rows.setdefault((one["part"], one["direction"]), {})
        for when, step in (("first", 1), ("last", found[0]["workload"]["steps"])):
            head = f"epoch {one['epochs']:g}, step {step}"
            ratio, error = one[f"gain, {when} step"], one[f"error, {when} step"]
            row[head] = f"{ratio:.2f} ± {error:.2f}"
    columns: dict[str, Callable] = {"part": lambda r: r[0][0], "direction": lambda r: r[0][1]}
    heads = next(iter(rows.values()))
    columns |= {head: lambda r, head=head: r[1][head] for head in heads}
    return table(rows.items(), columns, texts=2) + machine(found[0], "mean ± standard error")


# ---- front page --------------------------------------------------------------------------------

# Rows of `methods_*.json` with their shares, the label in each study of `TASKS`, and the steps from
# one curvature update to the next in these studies, where the rows have another period.
FIVE_EPOCHS = {"fngd, first epoch": 0.2, "fngd, later epochs": 0.8}
OPTIMIZERS = {
    "AdamW": ({"adamw": 1.0}, ("adamw", "adamw", "adamw"), None),
    "`muon_soap`": ({"muon, soap": 1.0}, ("", "muon_soap", "muon_soap"), None),
    "`muon`": ({"muon": 1.0}, ("muon", "muon", "muon"), None),
    "`plain`": ({"sgd": 1.0}, ("sgd", "", "sgd_rms"), None),
    "`kfac`": ({"kfac, inverse every 10": 1.0}, ("kfac", "", ""), None),
    "`seng`": ({"seng, every 200": 1.0}, ("seng", "", ""), 20),
    "`tengrad`": ({"tengrad, every 100": 1.0}, ("tengrad", "", ""), 20),
    "`eva`": ({"eva": 1.0}, ("eva", "", ""), None),
    "`fngd`": (FIVE_EPOCHS, ("fngd", "", "fngd"), None),
}
TASKS = {
    "CIFAR-10: accuracy": "compare_cifar10",
    "translation: BLEU": "three_epochs",
    "fine-tuning: BLEU": "finetune_muon_base",
}
# Setting, task, study and number of its table, labels without and with the coefficients, and
# `methods_small_*.json` with its row without them and its rows with them.
EVERY_STEP = {"fngd, first epoch": 1.0}
LEFT_OUT = "`share=none,leave_one_out=true`"
GAINS = (
    ("the paper's", "CIFAR-10: accuracy", "compare_cifar10", 0, "sgd", "fngd",
     ("resnet", "sgd", FIVE_EPOCHS)),
    ("the paper's", "translation from scratch: BLEU", "compare_multi30k", 0, "sgd", "fngd",
     ("marian", "sgd", FIVE_EPOCHS)),
    ("`share=sample`", "fine-tuning: BLEU", "finetune_muon_base", 0, "sgd_rms", "fngd",
     ("marian", "sgd_rms", FIVE_EPOCHS)),
    ("`share=sample`", "fine-tuning by LoRA: BLEU", "quality_lora", 0, "sgd_rms", "fngd_rms", None),
    ("`share=none`", "fine-tuning: BLEU", "quality_finetune_bleu", 0, "sgd_rms", "fngd_rms_fresh",
     ("marian", "sgd_rms", EVERY_STEP)),
    (LEFT_OUT, "CIFAR-10, 3 epochs: accuracy", "quality_cifar10", 0, "sgd", "fngd_loo_fresh",
     ("resnet", "sgd", EVERY_STEP)),
    (LEFT_OUT, "the same in the time of 3 epochs without", "quality_cifar10", 1, "sgd",
     "fngd_loo_fresh", None),
)  # fmt: skip


_SOAP = {"muon", "muon, soap"}


def _ratio(file: str, base: str, shares: Mapping[str, float], key: str = "ratio") -> float | str:
    name = f"methods_{file}.json"
    # Muon and SOAP were measured by themselves, beside AdamW.
    if (RESULTS / f"methods_{file}_soap.json").exists() and shares.keys() <= _SOAP:
        name = f"methods_{file}_soap.json"
    rows = load(name)["results"]
    if not shares.keys() <= rows.keys():
        return ""
    return sum(share * rows[name][key] for name, share in shares.items()) / rows[base][key]


def _time(file: str, shares: Mapping[str, float], period: int | None) -> float | str:
    ratio = _ratio(file, "adamw", shares)
    if period is None or isinstance(ratio, str):
        return ratio
    (name,) = shares
    row = load(f"methods_{file}.json")["results"][name]
    update, between = row["kinds"].values()
    return ratio * (update + (period - 1) * between) / period / row["seconds"]


def _score(row: Mapping[str, str]) -> str:
    return next(cell for head, cell in row.items() if head.startswith("test "))


def names() -> str:
    """Make the table of optimizer names: what each costs, and its scores on the test sets."""
    columns: dict[str, Callable] = {"`--optim`": itemgetter(0)}
    for name, file in METHODS.items():
        columns[f"step, {name}"] = lambda r, file=file: _time(file, r[1][0], r[1][2])
    columns["memory, Transformer"] = lambda r: _ratio("multi30k", "adamw", r[1][0], "peak_mib")
    for i, (head, name) in enumerate(TASKS.items()):
        found = study(name)
        columns[head] = lambda r, i=i, found=found: (
            _score(found[label]) if (label := r[1][1][i]) else ""
        )
    return table(OPTIMIZERS.items(), columns)


VOCABULARY = {
    "AdamW": "adamw",
    "`muon`": "muon",
    "`muon_soap`": "muon, soap",
    "`soap`": "soap",
    "EKFAC before `muon_soap`": "ekfac, muon, soap",
}


CONVOLUTIONS = {
    "`muon`": "muon",
    "EKFAC before `muon`": "ekfac, muon",
    "`kfac`": "kfac, inverse every 10",
    "`kfac`, `stat_samples=16`": "kfac, 16 samples, inverse every 10",
}


def vocabulary() -> str:
    """Make the table of what a step of Muon and SOAP costs."""
    files = sorted(RESULTS.glob("methods_translation_*.json"), key=lambda path: len(path.name))
    found = {f"batch {one['workload']['batch_size']}": one for one in (load(f.name) for f in files)}
    first = next(iter(found.values()))
    return _costs(VOCABULARY, found, "adamw") + machine(
        first, shape(first).rpartition(", ")[0], "ratios to AdamW"
    )


def convolutions() -> str:
    """Make the table of what a step with curvature costs on convolutions."""
    files = ("methods_small_resnet_whitening.json", "methods_resnet18_whitening.json")
    found = {f"width {one['workload']['width']}": one for one in map(load, files)}
    first = next(iter(found.values()))
    return _costs(CONVOLUTIONS, found, "muon") + machine(first, shape(first), "ratios to Muon")


def _costs(names: Mapping[str, str], reports: Mapping[str, Any], base: str) -> str:
    columns: dict[str, Callable] = {"optimizer": itemgetter(0)}
    for head, report in reports.items():
        rows = report["results"]
        columns[head] = lambda item, rows=rows: rows[item[1]]["ratio"] / rows[base]["ratio"]
    return table(names.items(), columns)


def _reached(run: Mapping[str, Any], loss: float) -> float | None:
    """Return the share of a run's steps after which its validation loss is this; None: never."""
    course = [(one["step"], one["eval_loss"]) for one in run["history"] if "eval_loss" in one]
    last = course[-1][0]
    for (before, high), (step, low) in pairwise(course):
        if low <= loss < high:
            return (before + (step - before) * (high - loss) / (high - low)) / last
    return None


def steps() -> str:
    """Make the table of steps to the loss that Muon ends with, by seed."""
    runs = {(one["label"], one["run"]): one for one in read_runs(RESULTS / "three_epochs")}
    ends = {name: one["objective"] for (label, name), one in runs.items() if label == "muon"}
    labels = dict.fromkeys(label for label, _ in runs)
    columns: dict[str, Callable] = {"optimizer": itemgetter(0)}
    for name, loss in ends.items():
        columns[name.replace("final-seed", "seed ")] = lambda item, name=name, loss=loss: (
            _reached(runs[item[0], name], loss) or "–"
        )
    return table(((label,) for label in labels), columns)


def fngd() -> str:
    """Make the table of what FNGD's coefficients gain over the same rule without them."""
    columns = {
        "coefficients": itemgetter(0),
        "task": itemgetter(1),
        "without": lambda r: _score(study(r[2], r[3])[r[4]]),
        "with": lambda r: _score(study(r[2], r[3])[r[5]]),
        "time of a step": lambda r: _ratio(f"small_{r[6][0]}", *r[6][1:]) if r[6] else "",
    }
    return table(GAINS, columns, texts=2)


STUDY_TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (sharing, directions, names, fngd, vocabulary, convolutions, steps)
}
