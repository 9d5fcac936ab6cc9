"""Fill the tables of the pages from the code and from committed result files.

python scripts/tables.py   # rewrites what lies between <!-- NAME --> and <!-- end of NAME -->
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any

from common.tabled import ROOT, Columns, load, machine, reports, shape, table
from gpu_tables import GPU_TABLES
from study_tables import METHODS, STUDY_TABLES, short

from hf_fngd import EKFACConfig, EvaConfig, FNGDConfig, KFACConfig, SENGConfig, TENGraDConfig

_NAMES = (
    "README.md",
    "hf_fngd/README.md",
    "tests/README.md",
    "scripts/README.md",
    "scripts/bench/README.md",
    "scripts/bench/memory.md",
    "scripts/plans/README.md",
    "scripts/plans/coefficients.md",
    "scripts/plans/finetuning.md",
    "scripts/plans/vocabulary.md",
    "model_cards/README.md",
)
PAGES = [ROOT / name for name in _NAMES if (ROOT / name).exists()]


def fill(text: str) -> str:
    """Put the tables between their marks on a page; a mark may also name a study's folder."""
    for name in re.findall(r"<!-- end of (\w+) -->", text):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        made = TABLES[name]() if name in TABLES else short(name)
        block = f"{begin}\n{made}\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


# ---- settings, and what works ------------------------------------------------------------------


def settings() -> str:
    """Make the table of settings: each stands where it appears first or gets another default."""
    several, damped, shared = EvaConfig.__mro__[1:4]
    methods = (KFACConfig, EKFACConfig, EvaConfig, TENGraDConfig, SENGConfig)
    groups = {
        "all methods": shared,
        "FNGD, KFAC, EKFAC, Eva, TENGraD and SENG": damped,
        "FNGD": FNGDConfig,
        "KFAC, EKFAC, Eva, TENGraD and SENG": several,
        "KFAC and EKFAC": KFACConfig.__mro__[1],
        **{one.title: one for one in methods},
    }
    rows = []
    for heading, config in groups.items():
        parent = config.__mro__[1]
        known = {one.name: one.default for one in fields(parent)} if config is not shared else {}
        rows.append((f"**{heading}**", "", ""))
        for one in fields(config):
            if known.get(one.name, "not there") != one.default:
                text = one.metadata["help"].replace("|", "\\|")
                rows.append((f"`{one.name}`", f"`{one.default}`", text))
    heads = ("name", "default", "meaning")
    return table(rows, {head: itemgetter(i) for i, head in enumerate(heads)}, texts=3)


def support() -> str:
    """Make the table of what works from the `feature` marks of the tests."""
    rows = []
    ran = on_gpu()
    for place, test, (name, state, *note) in marks("feature"):
        gpu = ran.pop(name, "")
        rows.append((name, ": ".join([state, *note]), f"`{place}::{test}`", gpu))
    assert not ran, f"no row of the table is called {', '.join(ran)}"
    rows.sort(key=lambda row: row[0].strip("`").lower())
    heads = ("feature", "state", "shown by", "run on a GPU")
    return table(rows, {head: itemgetter(i) for i, head in enumerate(heads)}, texts=4)


def marks(kind: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Find the tests with a mark: their file, their name and the mark's arguments."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        place = path.relative_to(ROOT / "tests").with_suffix("")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == f"pytest.mark.{kind}":
                    yield place, node.name, list(map(ast.literal_eval, mark.args))


def on_gpu() -> dict[str, str]:
    """Name the GPU on which what a row says was run and passed."""
    report = load("gpu/tests.json")
    found = {}
    for place, test, (row,) in marks("on_gpu"):
        outcome = report["outcomes"].get(f"tests/{place}.py::{test}")
        if outcome is None or "device" not in report["machine"]:
            continue
        passed = outcome.get("passed", 0) and not outcome.get("failed", 0)
        found[row] = report["machine"]["device"].removeprefix("NVIDIA ") if passed else "failed"
    return found


# ---- time and memory ---------------------------------------------------------------------------

# Column, and variant of scripts/bench/workload.py.
LATER = "fngd_adamw later epochs"
COSTS = {
    "`fngd_adamw`, later epochs": LATER,
    "`fngd`": "fngd later epochs",
    "with `update_scale=rms`": "fngd later epochs, update_scale=rms",
}
FIRST = {
    "exact": "fngd_adamw first epoch",
    "`gram_dtype=bfloat16`": "fngd_adamw first epoch, gram_dtype=bfloat16",
}
MEMORY = {
    "`fngd_adamw`, later epochs": LATER,
    "first epoch": "fngd_adamw first epoch",
    "`fngd`, later epochs": "fngd later epochs",
    "first epoch, `update_scale=rms`": "fngd first epoch, update_scale=rms",
}


def variants(names: Mapping[str, str], key: str) -> Columns:
    """Return columns with a number of each variant."""
    return {head: lambda r, name=name: r["results"][name][key] for head, name in names.items()}


def costs() -> str:
    """Make the table of step times."""
    found = reports("step_time")
    adamw = {"AdamW": lambda r: f"{r['results']['adamw']['median_seconds']:.2f} s"}
    columns = {"": shape, **adamw, **variants(COSTS, "median_ratio")}
    return table(found, columns) + machine(found[-1])


def first_epochs() -> str:
    """Make the table of the first epoch's step times."""

    def ten(report: Mapping[str, Any], first: str) -> float:
        later, once = (report["results"][name]["median_ratio"] for name in (LATER, first))
        return (9 * later + once) / 10

    tens = {
        f"ten epochs, {head}": lambda r, name=name: ten(r, name) for head, name in FIRST.items()
    }
    return table(reports("step_time"), {"": shape, **variants(FIRST, "median_ratio"), **tens})


def memory() -> str:
    """Make the table of peak memory."""
    adamw = {"AdamW": lambda r: f"{r['results']['adamw']['peak_mib']:.0f} MiB"}
    return table(reports("memory"), {"": shape, **adamw, **variants(MEMORY, "ratio")})


def profiles() -> str:
    """Make the table of where FNGD's steps spend more time than AdamW's."""

    def most(report: Mapping[str, Any]) -> str:
        found = report["results"]["operators"][:4]
        return ", ".join(f"`{one['operator']}` {one['more']:+.0f}" for one in found)

    columns = {
        "": lambda r: f"{shape(r)}: `{r['results']['variant']}`",
        "AdamW": lambda r: f"{[*r['results']['step'].values()][0]:.0f} ms",
        "FNGD": lambda r: f"{[*r['results']['step'].values()][1]:.0f} ms",
        "most of the difference": most,
    }
    return table(reports("profile"), columns, texts=4)


def checkpointing() -> str:
    """Make the table of what activation checkpointing saves."""
    report = load("checkpointing.json")
    base = report["results"]["adamw"]["saved_mib"]
    columns: dict[str, Callable] = {
        "": itemgetter(0),
        "peak without": lambda r: f"{r[1]['peak_mib']['none']:.0f} MiB",
    }
    for mode in ("non-reentrant", "reentrant"):
        columns[f"{mode} saves"] = lambda r, m=mode: f"{r[1]['saved_mib'][m]:.0f} MiB"
        columns[f"{mode} to AdamW's"] = lambda r, m=mode: r[1]["saved_mib"][m] / base[m]
    work = report["workload"]
    size = f"batch {work['batch_size']}, {work['length']} tokens"
    return table(report["results"].items(), columns) + machine(report, size)


def store() -> str:
    """Make the table of the coefficient store's memory and time."""
    report = load("store.json")
    results = report["results"]
    columns = {
        "rows": lambda r: f"{r['rows']:,}",
        "ids": itemgetter("ids"),
        "precision": lambda r: r["dtype"] + (" in a file" if r["file"] else ""),
        "table": lambda r: f"{r['table_mib']:,.0f} MiB",
        "index": lambda r: f"{r['beside_mib']:,.1f} MiB",
        "look-up": lambda r: f"{r['look_up_ms']:.2f} ms" if "look_up_ms" in r else "not measured",
        "share of a step": lambda r: f"{r['share_of_step']:.2%}" if "look_up_ms" in r else "",
    }
    step = f"a step of batch {report['workload']['batch_size']} took {results['step_ms']:.0f} ms"
    made = table([*results["measured"], *results["on_paper"]], columns, texts=3)
    note = " The largest numbers of rows are computed, not measured."
    return made + machine(report, step) + note


def rules() -> str:
    """Make the table of the update rules' time."""
    report = load("update_rules.json")
    columns = {
        "": itemgetter(0),
        "step": lambda r: f"{1000 * r[1]['median_seconds']:.0f} ms",
        "against the first": lambda r: r[1]["median_ratio"],
        "quartiles": lambda r: f"{r[1]['quartile_low']:.2f} to {r[1]['quartile_high']:.2f}",
    }
    work = report["workload"]
    size = f"d_model {work['d_model']}, {work['layers']} + {work['layers']} layers"
    return table(report["results"].items(), columns) + machine(report, size)


def growth() -> str:
    """Make the table of exponents of step time."""
    report = load("growth.json")
    columns = {
        "": itemgetter(0),
        "from": lambda r: min(one["size"] for one in r[1]["measurements"]),
        "to": lambda r: max(one["size"] for one in r[1]["measurements"]),
    }
    for name in ("AdamW", "later epochs", "first epoch", "first epoch adds"):
        columns[name] = lambda r, name=name: r[1]["exponents"].get(name, "–")
    made = table(report["results"].items(), columns)
    return made + machine(report, "Marian, d 256, 3 + 3 layers")


def methods() -> str:
    """Make the table of all methods' time and memory."""
    found = {name: load(f"methods_{file}.json") for name, file in METHODS.items()}
    columns: dict[str, Callable] = {"": str}
    for name, report in found.items():
        rows = report["results"]
        columns[f"{name}: step"] = lambda label, rows=rows: (
            "{ratio:.2f} ({lowest_ratio:.2f}-{highest_ratio:.2f})".format(**rows[label])
        )
        columns[f"{name}: memory"] = lambda label, rows=rows: rows[label]["memory_ratio"]
    first, second = found.values()
    seconds = [f"{one['results']['sgd']['seconds']:.1f} s" for one in (first, second)]
    unit = f"ratios to SGD ({' and '.join(seconds)} a step), median and range of interleaved rounds"
    paper = "The FNGD paper reports 2.05 to 2.07 for KFAC on ResNet-18, on a GPU."
    return f"{table(first['results'], columns)}{machine(first, unit)} {paper}"


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        settings, support, costs, first_epochs, memory, profiles, checkpointing, store, rules,
        growth, methods,
    )
} | GPU_TABLES | STUDY_TABLES  # fmt: skip


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
