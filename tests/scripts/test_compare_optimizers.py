"""scripts/compare_optimizers.py: same budget for all, resumes, and tables that repeat the files."""

import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib import image

from tests.hf.test_runner import ROOT

SCRIPT = ROOT / "scripts" / "compare_optimizers.py"
PLANS = ROOT / "scripts" / "plans"
STUB = """
import json, math, pathlib, sys, time
s = json.loads(pathlib.Path(sys.argv[1]).read_text())
with open(s["calls"], "a") as file:
    file.write(f"{s['optim']} {s.get('seed')} {s['do_predict']}\\n")
time.sleep(s.get("sleep", 0))
rate = s["learning_rate"]
print("a warning", file=sys.stderr)
if rate > s.get("crash_above", 1e9):
    sys.exit("stub: it broke\\n\\n")
nan = rate > s.get("nan_above", 1e9)
final = abs(math.log10(rate) + 1) + 0.01 * s.get("seed", 0)
steps = s.get("max_steps", 400)
history = [
    {"step": i, "loss": final + 1 / i, "train_seconds": i * rate, "grad_norm": 1.0, "epoch": i / 9}
    for i in range(1, steps + 1)
]
if nan:
    history[2]["loss"] = float("nan")
history.append({"step": steps, "eval_loss": final, "eval_runtime": 3.0})
history.append({"step": steps, "train_loss": 9.0, "train_runtime": 7.0})
out = pathlib.Path(s["output_dir"])
out.mkdir(parents=True)
(out / "model.bin").write_text("weights")
found = {"history": history, "validation": {"eval_loss": final}, "train": {"train_runtime": 7.0},
         "environment": {"command": "x", "versions": {"torch": "1"}, "device": "stub CPU"}}
if s.get("misaligned_fraction") and s["optim"] == "fngd":
    found["misaligned"] = {"auc": 0.5 + 0.1 * s["seed"]}
if s["do_predict"]:
    found["test"] = {"test_accuracy": 1 - final / 10, "test_loss": final}
(out / "metrics.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("compare_optimizers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


class Bench:
    """A plan in a folder, with a stub as its training script."""

    def __init__(self, folder, script, monkeypatch, capsys):
        self.folder, self.script, self.monkeypatch, self.capsys = (
            folder,
            script,
            monkeypatch,
            capsys,
        )
        (folder / "stub.py").write_text(STUB)
        self.results = folder / "results"
        rate = {"learning_rate": [1e-3, 1.0]}
        self.plan = {
            "script": str(folder / "stub.py"),
            "base": {"calls": str(folder / "calls"), "seed": 0},
            "optimizers": {
                "sgd": {"optim": "plain", "optim_args": {"update_rule": "sgd"}, "search": rate},
                "fngd": {
                    "optim": "fngd",
                    "optim_args": {"nesterov": True, "target_modules": ["a", "b"]},
                    "search": {**rate, "damping": [1e-3, 1.0]},
                },
            },
            "trials": 3,
            "seed": 5,
            "search_overrides": {"max_steps": 4},
            "final_seeds": [1, 2],
            "objective": "eval_loss",
            "final_metrics": ["accuracy"],
        }

    def command(self, *options):
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        places = ("--results", self.results, "--work", self.folder / "work")
        return list(map(str, [SCRIPT, self.folder / "plan.json", *places, *options]))

    def run(self, *options):
        self.monkeypatch.setattr(sys, "argv", self.command(*options))
        code = self.script.cli()
        self.said = self.capsys.readouterr()
        return code

    def refused(self, *options):
        assert self.run(*options) == 2
        (line,) = self.said.err.strip().splitlines()
        assert line.startswith("compare_optimizers: error: ")
        return line

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def result(self, label, name):
        from comparison.results import read_runs

        runs = {(run["label"], run["run"]): run for run in read_runs(self.results)}
        return runs[label, name]

    def forget(self, label, name):
        """Deletes a run as the message of a refusal says."""
        file = self.results / "runs.jsonl"
        first, *lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(
            f'{{"label": "{label}", "run": "{name}"')]  # fmt: skip
        assert len(kept) == len(lines) - 1
        file.write_text(first + "".join(kept))

    def cells(self, label):
        lines = (self.results / "table.md").read_text().splitlines()
        head, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            for line in lines
            if "|" in line
        ]
        return next(dict(zip(head, row, strict=True)) for row in rows if row[0] == label)


@pytest.fixture
def bench(tmp_path, script, monkeypatch, capsys):
    return Bench(tmp_path, script, monkeypatch, capsys)


@pytest.mark.parametrize("names", [["learning_rate"], ["learning_rate", "damping"]])
@pytest.mark.parametrize("seed", range(4))
def test_draws_are_inside_spread_and_reproducible(names, seed, script):
    from comparison.plan import Optimizer
    from comparison.search import draw

    ranges = {"learning_rate": (1e-4, 1.0), "damping": (1e-3, 1e1)}
    optimizer = Optimizer("one", "fngd", {}, {name: ranges[name] for name in names})
    drawn = draw(optimizer, 32, seed)
    assert drawn == draw(optimizer, 32, seed) and len(drawn) == 32
    assert drawn[:8] == draw(optimizer, 8, seed)  # more trials go on where fewer ended
    assert drawn != draw(optimizer, 32, seed + 1)
    assert drawn != draw(Optimizer("two", "fngd", {}, optimizer.search), 32, seed)
    for name in names:
        low, high = ranges[name]
        values = [point[name] for point in drawn]
        assert all(low <= value <= high for value in values)
        places = [math.log(value / low) / math.log(high / low) for value in values]
        counts = np.histogram(places, bins=4, range=(0, 1))[0]
        assert counts.min() >= 9 - 2 * len(names)  # log-uniform
    if len(names) == 2:
        logs = np.log([[point[name] for name in names] for point in drawn])
        assert np.histogram2d(*logs.T, bins=3)[0].min() >= 1
        assert abs(np.corrcoef(logs.T)[0, 1]) < 0.3


def test_values_of_a_search_do_not_depend_on_the_order_in_the_plan(script):
    from comparison.plan import Optimizer
    from comparison.search import draw

    search = {"learning_rate": (1e-4, 1.0), "damping": (1e-3, 1e1)}
    one = draw(Optimizer("one", "fngd", {}, search), 4, 0)
    assert one == draw(Optimizer("one", "fngd", {}, dict(reversed(search.items()))), 4, 0)


def test_whole_comparison(bench):
    assert bench.run() == 0, bench.said.err
    # The optimizers take turns; only final runs see the test set.
    search = ["plain 0 False", "fngd 0 False"] * 3
    assert bench.calls() == search + [f"{n} {s} True" for s in (1, 2) for n in ("plain", "fngd")]
    run = bench.result("fngd", "search-02")
    settings, searched = run["settings"], run["searched"]
    assert settings["optim"] == "fngd" and settings["max_steps"] == 4
    assert settings["learning_rate"] == searched["learning_rate"]
    fixed = "nesterov=true,target_modules=a|b"
    assert settings["optim_args"] == f"{fixed},damping={searched['damping']}"
    assert settings["logging_nan_inf_filter"] is False
    assert "max_steps" not in bench.result("sgd", "final-seed1")["settings"]
    assert run["status"] == "ok" and run["environment"]["device"] == "stub CPU"
    assert "history" not in run
    assert "a warning" in (bench.folder / "work/fngd/search-02/stderr.txt").read_text()
    # Search runs leave no model, final runs do.
    assert not (bench.folder / "work/fngd/search-02/out").exists()
    assert (bench.folder / "work/fngd/final-seed2/out/model.bin").exists()
    final = bench.result("fngd", "final-seed2")
    history = final["history"]
    assert len(history) <= 200 and history[0]["step"] == 1
    assert history[-1] == {"step": 400, "eval_loss": pytest.approx(final["objective"], rel=1e-5)}
    assert set(history[0]) == {"step", "loss", "train_seconds"}
    assert (bench.results / "curves.png").read_bytes().startswith(b"\x89PNG")
    # All runs are in one file.
    assert {path.name for path in bench.results.iterdir()} == {
        "runs.jsonl", "table.md", "search.md", "curves.png"}  # fmt: skip
    assert len((bench.results / "runs.jsonl").read_text().splitlines()) == 1 + 6 + 4


def test_table_repeats_the_result_files(bench):
    assert bench.run() == 0
    steps = {}
    for label in ("sgd", "fngd"):
        trials = [bench.result(label, f"search-{n:02d}") for n in (1, 2, 3)]
        finals = [bench.result(label, f"final-seed{s}") for s in (1, 2)]
        best = min(trials, key=lambda run: run["objective"])
        cells = bench.cells(label)
        assert cells["learning rate"] == f"{best['searched']['learning_rate']:g}"
        assert ("a\\|b" in cells["other settings"]) == (label == "fngd")
        assert cells["trials"] == "3" and cells["ok / diverged / failed"] == "3 / 0 / 0"
        assert cells["final runs"] == "2 of 2"
        for column, numbers in {
            "test accuracy": [run["test"]["test_accuracy"] for run in finals],
            "eval_loss": [run["validation"]["eval_loss"] for run in finals],
            "training loss": [[e for e in r["history"] if "loss" in e][-1]["loss"] for r in finals],
        }.items():
            mean, deviation = map(float, cells[column].split(" ± "))
            assert mean == pytest.approx(statistics.mean(numbers), rel=1e-3)
            assert deviation == pytest.approx(statistics.stdev(numbers), abs=1e-3)
        timed = [[e for e in run["history"] if "loss" in e][-1] for run in finals]
        seconds = statistics.mean(entry["train_seconds"] for entry in timed)
        assert float(cells["training s"]) == pytest.approx(seconds, rel=1e-3)
        steps[label] = seconds / 400
        assert float(cells["s / step"]) == pytest.approx(steps[label], rel=1e-3)
        assert float(cells["against sgd"]) == pytest.approx(steps[label] / steps["sgd"], abs=0.006)
        assert f"| **{best['objective']:.5g}**" in (bench.results / "search.md").read_text()
    text = (bench.results / "table.md").read_text()
    plan, results = bench.folder / "plan.json", bench.results
    command = f"    python scripts/compare_optimizers.py {plan} --results {results}\n"
    assert text.startswith(command)
    assert "stub CPU" in text and "seeds: 1, 2" in text and "evaluations during" not in text
    before = {path: path.read_bytes() for path in bench.results.glob("*.md")}
    assert bench.run("--stage", "report") == 0
    assert before == {path: path.read_bytes() for path in bench.results.glob("*.md")}


def test_goes_on_where_it_was_stopped(bench):
    assert bench.run() == 0
    bench.folder.joinpath("calls").unlink()
    assert bench.run() == 0 and bench.calls() == []
    bench.forget("fngd", "search-02")
    bench.forget("sgd", "final-seed2")
    assert bench.run() == 0
    assert bench.calls() == ["fngd 0 False", "plain 2 True"]
    bench.plan["trials"], bench.plan["final_seeds"] = 3, [1, 2, 3]
    assert bench.run() == 0
    assert bench.calls()[2:] == ["plain 3 True", "fngd 3 True"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["base"].update(warmup=3), "made with warmup=None, the plan now says 3"),
        (lambda p: p.update(seed=6), "made with learning_rate=.*, the plan now says"),
        (lambda p: p["optimizers"]["sgd"].update(optim="adamw"), "optim='plain'.* 'adamw'"),
    ],
)
def test_changed_plan_is_refused_before_anything_runs(change, message, bench):
    assert bench.run("--stage", "search") == 0
    count = len(bench.calls())
    change(bench.plan)
    bench.forget("fngd", "search-03")
    line = bench.refused()
    assert "search-01 in" in line and "delete its line in" in line and "--results" in line
    assert re.search(message, line), line
    assert len(bench.calls()) == count


def test_single_files_of_a_stopped_comparison_are_read_and_folded(bench):
    assert bench.run() == 0
    text, table = ((bench.results / name).read_text() for name in ("runs.jsonl", "table.md"))
    # As if the comparison had been killed after three more runs than its file holds.
    from comparison import results

    for label, name in (("sgd", "search-02"), ("fngd", "search-03"), ("fngd", "final-seed1")):
        run = bench.result(label, name)
        bench.forget(label, name)
        results.write(bench.results / "runs" / label / f"{name}.json", run)
    bench.folder.joinpath("calls").unlink()
    assert bench.run() == 0 and bench.calls() == []
    assert not (bench.results / "runs").exists()
    assert (bench.results / "runs.jsonl").read_text() == text
    assert (bench.results / "table.md").read_text() == table
    # A single file is newer than a folded line, and is refused like one.
    run = bench.result("sgd", "search-01")
    path = bench.results / "runs/sgd/search-01.json"
    results.write(path, {**run, "total_seconds": 0.125})
    assert bench.run("--stage", "report") == 0
    assert bench.result("sgd", "search-01")["total_seconds"] == 0.125
    results.write(path, {**run, "settings": {**run["settings"], "learning_rate": 3}})
    assert "search-01.json was made with learning_rate=3" in bench.refused()


def test_a_stopped_fold_loses_nothing(bench, monkeypatch):
    from comparison import results

    monkeypatch.setattr("pathlib.Path.unlink", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run("--stage", "search")
    assert (bench.results / "runs.jsonl").exists()
    assert len(list(bench.results.glob("runs/*/*.json"))) == 6
    assert len(results.read_runs(bench.results)) == 6
    monkeypatch.undo()
    count = len(bench.calls())
    assert bench.run("--stage", "search") == 0 and len(bench.calls()) == count
    assert len(results.read_runs(bench.results)) == 6 and not (bench.results / "runs").exists()


def test_fold_keeps_what_runs_share_once(script):
    from comparison.folding import fold, unfold

    shared = {"script": "a.py", "settings": {"width": 8, "seed": 1, "flip": True}}
    place, other = {"cores": 2}, {"cores": 4}
    runs = [
        {"label": "a", "run": "final-1", **shared, "environment": place, "test": {"bleu": 1.5}},
        {"label": "a", "run": "final-2", "script": "a.py", "environment": other,
         "settings": {"width": 8, "seed": 2, "flip": 1, "rate": None}, "objective": None},
        {"label": "b", "run": "final-1", **shared, "environment": place},
    ]  # fmt: skip
    text = fold(reversed(runs))
    first, *lines = map(json.loads, text.splitlines())
    # 1 and true are different settings.
    assert first == {"script": "a.py", "settings": {"width": 8}, "environments": [place, other]}
    assert lines[1]["settings"] == {"seed": 2, "flip": 1, "rate": None}
    assert lines[1]["environment"] == 1 and "script" not in lines[1]
    found = unfold(text)
    assert found == runs and found[0]["settings"]["flip"] is True
    assert fold(found) == text


STUDIES = sorted(path.parent.name for path in (ROOT / "scripts/bench/results").glob("*/runs.jsonl"))


@pytest.mark.parametrize("study", STUDIES)
def test_folded_studies_resume_and_repeat_their_tables(study, script, monkeypatch):
    """Every line is a run that the plan demands, with exactly the settings it demands."""
    from comparison.folding import fold, unfold
    from comparison.outcome import outcomes
    from comparison.plan import load_plan
    from comparison.report import search_table, table

    monkeypatch.chdir(ROOT)
    folder = PLANS.parent / "bench/results" / study
    text = (folder / "runs.jsonl").read_text(encoding="utf-8")
    runs = unfold(text)
    assert fold(runs) == text
    page = (folder / "table.md").read_text(encoding="utf-8")
    plan = load_plan(ROOT / re.search(r"scripts/plans/\S+", page)[0])
    found = outcomes(plan, folder)  # refuses other settings
    stages = [(o.trials, o.finals, o.timed) for o in found]
    assert sum(map(len, (stage for three in stages for stage in three))) == len(runs) > 0
    assert all(run["history"] for run in runs if not run["run"].startswith("search"))
    assert table(plan, folder.relative_to(ROOT), found) == page
    if plan.trials:
        assert search_table(plan, found) == (folder / "search.md").read_text(encoding="utf-8")


def test_damaged_result_is_refused(bench):
    assert bench.run("--stage", "search") == 0
    path = bench.results / "runs/sgd/search-01.json"
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"label": "sgd", "run": "search-02"}'):
        path.write_text(text)
        assert "search-01.json is not the result of a run: delete" in bench.refused()
    path.unlink()
    (bench.results / "runs.jsonl").write_text('{"label": "sgd"}\n')
    assert "runs.jsonl is not a file of runs: restore it" in bench.refused()


@pytest.mark.slow
def test_a_killed_comparison_loses_only_the_run_in_progress(bench):
    bench.plan["base"]["sleep"] = 1.0
    process = subprocess.Popen(
        [sys.executable, *bench.command("--only", "sgd", "--stage", "search")],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(bench.calls()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in (bench.results / "runs/sgd").iterdir()] == ["search-01.json"]
    # The training process that outlived it is waited for.
    assert bench.run("--only", "sgd", "--stage", "search") == 0
    assert (
        "waiting: another run" in bench.said.out and "1 of 3 runs have a result" in bench.said.out
    )
    assert len(bench.calls()) == 1 + 1 + 2
    assert all(bench.result("sgd", f"search-0{n}")["status"] == "ok" for n in (1, 2, 3))


@pytest.mark.slow
def test_sigterm_ends_the_training_process_too(bench):
    bench.plan["base"]["sleep"] = 60
    process = subprocess.Popen(
        [sys.executable, *bench.command()], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not bench.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130 and "the same command resumes" in error
    bench.plan["base"]["sleep"] = 0
    assert bench.run("--stage", "search") == 0 and "waiting" not in bench.said.out


def test_results_are_written_at_once(tmp_path, script, monkeypatch):
    from comparison import results

    path = tmp_path / "runs" / "one.json"
    results.write(path, {"loss": float("nan"), "history": [{"loss": math.inf}]})
    old = path.read_text()
    assert json.loads(old) == {"loss": None, "history": [{"loss": None}]}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write(path, {"loss": 1.0})
    assert path.read_text() == old


def test_diverged_and_failed_trials_count_and_are_told(bench):
    bench.plan["base"].update(nan_above=0.02, crash_above=0.2)
    bench.plan["trials"] = 6
    assert bench.run() == 0
    trials = [bench.result("sgd", f"search-{n:02d}") for n in range(1, 7)]
    statuses = [run["status"] for run in trials]
    assert set(statuses) == {"ok", "diverged", "failed"}
    for run in trials:
        if run["status"] != "ok":
            assert run["objective"] is None
        if run["status"] == "failed":
            assert run["reason"] == "stub: it broke"
    cells = bench.cells("sgd")
    counts = " / ".join(str(statuses.count(s)) for s in ("ok", "diverged", "failed"))
    assert cells["trials"] == "6" and cells["ok / diverged / failed"] == counts
    best = min((r for r in trials if r["status"] == "ok"), key=lambda run: run["objective"])
    assert cells["learning rate"] == f"{best['searched']['learning_rate']:g}"
    text = (bench.results / "search.md").read_text()
    assert "NaN or infinite loss" in text and "stub: it broke" in text
    count = len(bench.calls())
    assert bench.run() == 0 and len(bench.calls()) == count  # never tried again by itself


def test_optimizer_without_a_usable_trial(bench):
    bench.plan["base"]["crash_above"] = 0
    bench.plan["optimizers"]["sgd"]["search"] = {"learning_rate": [1e-3, 2e-3]}
    assert bench.run() == 0
    assert "sgd: no trial has a finite eval_loss" in bench.said.out
    text = (bench.results / "table.md").read_text()
    assert "- sgd: no trial ended" in text and "the last one: stub: it broke" in text
    assert bench.cells("sgd")["eval_loss"] == "–"
    assert not (bench.results / "curves.png").exists()


def test_failed_final_run_is_told_and_left_out(bench):
    bench.plan["final_metrics"] = ["bleu"]
    assert bench.run() == 0
    reason = bench.result("sgd", "final-seed1")["reason"]
    assert reason == "metrics.json has no test metric 'bleu'; it has test_accuracy, test_loss"
    assert bench.cells("sgd")["final runs"] == "0 of 2"
    assert f"sgd: final-seed1 failed ({reason})" in (bench.results / "table.md").read_text()


def test_choice(script):
    from comparison.search import choose

    def trial(name, objective, status="ok"):
        return {"run": name, "objective": objective, "status": status}

    plan = type("Plan", (), {"more_is_better": False})
    trials = [trial("a", None, "failed"), trial("b", 2.0), trial("c", 1.0), trial("d", 1.0)]
    assert choose(plan, trials)["run"] == "c"
    plan.more_is_better = True
    assert choose(plan, trials)["run"] == "b"
    assert choose(plan, trials[:1]) is None


def test_value_at_the_edge_is_told(bench, script):
    from comparison.plan import Optimizer
    from comparison.search import at_edge

    optimizer = Optimizer("a", "b", {}, {"learning_rate": (1e-2, 1.0)})
    low, high = 10 ** (-2 + 0.2), 10 ** (-0.2)
    assert at_edge(optimizer, {"learning_rate": low * 1.01}) == []
    assert at_edge(optimizer, {"learning_rate": high / 1.01}) == []
    assert "lower edge" in at_edge(optimizer, {"learning_rate": low / 1.01})[0]
    assert "upper edge of its range [0.01, 1]" in at_edge(optimizer, {"learning_rate": 1.0})[0]
    # The stub is best at 0.1, which this range does not hold.
    bench.plan["optimizers"]["sgd"]["search"] = {"learning_rate": [1e-3, 1e-2]}
    bench.plan["trials"] = 12
    assert bench.run("--only", "sgd") == 0
    text = (bench.results / "table.md").read_text()
    assert "- sgd: learning_rate=0.00" in text and "the best value may lie beyond." in text
    assert "- fngd: 0 of 12 trials made so far." in text


def test_stages_and_time_limit(bench):
    assert "3 trials of sgd are missing: run --stage search" in bench.refused("--stage", "final")
    assert bench.run("--max_minutes", "0") == 0
    assert "time is up, 6 runs left" in bench.said.out and bench.calls() == []
    assert bench.run("--stage", "search", "--only", "fngd") == 0
    assert bench.calls() == ["fngd 0 False"] * 3
    assert bench.run("--stage", "final", "--only", "fngd") == 0
    assert bench.calls()[3:] == ["fngd 1 True", "fngd 2 True"]
    assert bench.cells("sgd")["trials"] == "0" and bench.cells("fngd")["final runs"] == "2 of 2"
    assert "--only: the plan has no 'adam': choose sgd, fngd" in bench.refused("--only", "adam")


def test_seconds_without_train_seconds_are_marked(bench):
    stub = (bench.folder / "stub.py").read_text()
    (bench.folder / "stub.py").write_text(stub.replace('"train_seconds": i * rate, ', ""))
    assert bench.run() == 0
    assert bench.cells("sgd")["training s"] == "7" and bench.cells("sgd")["s / step"] == "0.0175"
    assert "seconds include the evaluations" in (bench.results / "table.md").read_text()


def test_settings_of_the_trainer_are_searched_too(bench):
    bench.plan["search_overrides"]["warmup_steps"] = 2
    search = {"warmup_steps": [0.01, 0.3], "max_grad_norm": [0.1, 10.0]}
    bench.plan["optimizers"]["fngd"]["search"].update(search)
    assert bench.run() == 0
    for name in ("search-01", "search-03", "final-seed1"):
        run = bench.result("fngd", name)
        for key, (low, high) in search.items():
            assert low <= run["settings"][key] == run["searched"][key] <= high
        assert run["settings"]["optim_args"].endswith(f"|b,damping={run['searched']['damping']}")
    values = bench.result("fngd", "final-seed1")["searched"]
    told = f"warmup_steps={values['warmup_steps']:g}, max_grad_norm={values['max_grad_norm']:g}, "
    assert bench.cells("fngd")["other settings"].startswith(told)
    assert bench.result("sgd", "search-01")["settings"]["warmup_steps"] == 2
    assert "warmup_steps" not in bench.result("sgd", "final-seed1")["settings"]


def test_equal_time(bench):
    assert "the plan has no equal_time" in bench.refused("--stage", "timed")
    bench.plan |= {"equal_time": "sgd", "paired_with": "sgd"}
    line = bench.refused("--stage", "timed")
    assert "final runs of sgd or fngd are missing: run --stage final" in line
    assert bench.run() == 0, bench.said.err
    assert bench.calls()[-2:] == ["fngd 1 True", "fngd 2 True"]
    with pytest.raises(KeyError):
        bench.result("sgd", "timed-seed1")
    # In the stub a step takes as many seconds as the learning rate says.
    rates = {
        n: bench.result(n, "final-seed1")["settings"]["learning_rate"] for n in ("sgd", "fngd")
    }
    steps = round(400 * rates["sgd"] / rates["fngd"])
    for seed in (1, 2):
        run = bench.result("fngd", f"timed-seed{seed}")
        assert (
            run["settings"]["max_steps"] == run["steps"] == steps
            and run["settings"]["seed"] == seed
        )
        assert run["settings"]["learning_rate"] == rates["fngd"]
    text = (bench.results / "table.md").read_text()
    rows = [line.split("|") for line in text[text.index("At equal time") :].splitlines()]
    (row,) = ([c.strip() for c in line] for line in rows if len(line) > 1 and "fngd" in line[1])
    ours, theirs = bench.result("fngd", "timed-seed1"), bench.result("sgd", "final-seed1")
    assert row[-3] == f"{ours['objective'] - theirs['objective']:+.3f} ± 0.000"
    assert row[2:4] == ["2 of 2", str(steps)] and float(row[-2]) == pytest.approx(
        400 * rates["sgd"], rel=1e-2
    )
    count = len(bench.calls())
    assert bench.run() == 0 and len(bench.calls()) == count
    bench.forget("fngd", "timed-seed2")
    assert bench.run("--stage", "timed") == 0 and bench.calls()[count:] == ["fngd 2 True"]


def test_differences_of_runs_with_the_same_seed(bench):
    bench.plan["paired_with"] = "sgd"
    assert bench.run() == 0, bench.said.err
    # The stub's objective depends on the seed in the same way for both.
    ends = {n: bench.result(n, "final-seed1")["objective"] for n in ("sgd", "fngd")}
    found = f"{ends['fngd'] - ends['sgd']:+.3f} ± 0.000"
    assert bench.cells("fngd")["eval_loss against sgd"] == found
    assert "eval_loss against sgd: mean difference" in (bench.results / "table.md").read_text()
    from comparison.outcome import difference

    runs = [[{"run": f"final-seed{i}", "x": x} for i, x in some] for some in (
        [(1, 3.0), (2, 4.0), (4, 9.0)], [(1, 2.0), (2, 1.0), (3, 7.0)])]  # fmt: skip
    assert difference("x", *runs) == f"+2.000 ± {statistics.stdev([1, 3]) / 2**0.5:.3f}"
    assert difference("x", runs[0][:1], runs[1]) == "+1.000"
    assert difference("x", [], runs[1]) == "–"


def test_seconds_that_mean_nothing_are_not_shown(bench):
    assert bench.run() == 0, bench.said.err
    assert bench.cells("fngd")["s / step"] != "–"
    before = image.imread(bench.results / "curves.png").shape
    bench.plan["timed"] = False
    count = len(bench.calls())
    assert bench.run() == 0 and len(bench.calls()) == count
    cells = bench.cells("fngd")
    assert not {"s / step", "against sgd", "training s"} & cells.keys() and "eval_loss" in cells
    # Two panels in one row in place of two in two rows.
    after = image.imread(bench.results / "curves.png").shape
    assert after[1] == before[1] and after[0] * 2 == before[0]


def test_plan_without_trials_runs_what_it_says(bench):
    first = {"optim": "plain", "settings": {"learning_rate": 0.5, "seed": 7}}
    second = {"optim": "fngd", "optim_args": {"damping": 2}, "settings": {"warmup_steps": 9}}
    bench.plan["base"]["learning_rate"] = 0.25
    bench.plan |= {"trials": 0, "optimizers": {"first": first, "second": second}}
    assert bench.run() == 0, bench.said.err
    assert bench.calls() == ["plain 1 True", "fngd 1 True", "plain 2 True", "fngd 2 True"]
    settings = bench.result("first", "final-seed2")["settings"]
    assert settings["learning_rate"] == 0.5 and settings["seed"] == 2
    settings = bench.result("second", "final-seed1")["settings"]
    assert settings["warmup_steps"] == 9 and settings["optim_args"] == "damping=2"
    cells = bench.cells("second")
    assert cells["learning rate"] == "0.25" and cells["final runs"] == "2 of 2"
    assert cells["other settings"] == "warmup_steps=9, damping=2" and cells["trials"] == "0"
    text = (bench.results / "table.md").read_text()
    assert "without a search" in text and "smallest" not in text and "AUC" not in text
    assert not (bench.results / "search.md").exists()
    assert (bench.results / "curves.png").exists()
    # The same command makes nothing anew; changed settings are refused.
    assert bench.run() == 0 and len(bench.calls()) == 4
    first["settings"]["learning_rate"] = 0.6
    assert "first" in bench.refused()


def test_table_says_how_well_coefficients_tell_misaligned_pairs(bench):
    bench.plan["base"]["misaligned_fraction"] = 0.2
    assert bench.run() == 0, bench.said.err
    assert bench.cells("fngd")["AUC of γ"] == "0.6500 ± 0.0707"
    assert bench.cells("sgd")["AUC of γ"] == "–"


def entry(**changes):
    return {"sgd": {"optim": "plain", "search": {"learning_rate": [0.1, 1.0]}, **changes}}


BAD = {
    "unknown name": ({"trails": 3}, "the plan has an unknown name 'trails': choose script"),
    "no optimizers": ({"optimizers": {}}, "optimizers is empty"),
    "no such objective": ({"objective": "test_loss"}, "unknown objective 'test_loss': choose"),
    "less than no trials": ({"trials": -1}, "trials must be a whole number of at least 0, not -1"),
    "trials no number": ({"trials": "3"}, "trials must be a whole number .*, not '3'"),
    "seeds twice": ({"final_seeds": [1, 1]}, "final_seeds must be one or more different"),
    "no seeds": ({"final_seeds": []}, "final_seeds must be one or more different"),
    "metrics": ({"final_metrics": "bleu"}, "final_metrics must be a list"),
    "script": ({"script": "run_nothing"}, "unknown script 'run_nothing': choose run_tr"),
    "no such script": ({"script": "no/such.py"}, "there is no training script 'no/such.py'"),
    "reserved": ({"base": {"output_dir": "x"}}, "base sets 'output_dir', .*remove it"),
    "test set": ({"search_overrides": {"do_predict": True}}, "search_overrides sets 'do_predict'"),
    "reference": ({"equal_time": "adam"}, "equal_time 'adam' is not a label: choose sgd, fngd"),
    "pair": ({"paired_with": "adam"}, "paired_with 'adam' is not a label: choose sgd, fngd"),
    "timed": ({"timed": "no"}, "timed must be true or false, not 'no'"),
    "time of nothing": ({"equal_time": "sgd", "timed": False}, "equal_time needs seconds"),
    "base": ({"base": []}, "base must be a JSON object"),
    "label": (
        {"optimizers": {"../x": entry()["sgd"]}},
        "optimizers.../x: name the label with letters",
    ),
    "entry": ({"optimizers": entry(trials=9)}, "optimizers.sgd has an unknown name 'trials'"),
    "no search": ({"optimizers": entry(search={})}, "optimizers.sgd.search is empty"),
    "no name": ({"optimizers": {"sgd": {"search": {}}}}, "optimizers.sgd has no 'optim': add it"),
    "low high": (
        {"optimizers": entry(search={"learning_rate": [1, 1]})},
        r"sgd.search.learning_rate must have 0 < low < high .*, not \[1, 1\]",
    ),
    "zero": ({"optimizers": entry(search={"damping": [0, 1]})}, "damping must have 0 < low"),
    "range": ({"optimizers": entry(search={"damping": 1})}, r"damping must be \[low, high\]"),
    "search without trials": ({"trials": 0}, "sgd.search has no effect with trials=0: remove"),
    "settings reserved": (
        {"optimizers": entry(settings={"do_eval": False})},
        "optimizers.sgd.settings sets 'do_eval', .*remove it",
    ),
    "settings twice": (
        {"optimizers": entry(settings={"learning_rate": 1})},
        "'learning_rate' is both in settings and in search",
    ),
    "twice": (
        {"optimizers": entry(optim_args={"damping": 1}, search={"damping": [0.1, 1]})},
        "'damping' is both in optim_args and in search",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_plan_is_one_line(case, bench):
    changes, message = BAD[case]
    bench.plan.update(changes)
    line = bench.refused()
    assert re.search(message, line), line
    assert not bench.results.exists()


def test_plan_that_cannot_be_read(bench):
    path = bench.folder / "other.json"
    for text, message in (
        (None, "No such file"),
        ("{", "Expecting property name"),
        ('{"trials": 1, "trials": 2}', "'trials' is given twice"),
        ("[]", "the plan must be a JSON object"),
        ("{}", "the plan has no 'script': add it"),
    ):
        if text is not None:
            path.write_text(text)
        bench.monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path)])
        assert bench.script.cli() == 2
        (line,) = bench.capsys.readouterr().err.strip().splitlines()
        assert message in line


@pytest.mark.parametrize("name", ["cifar10", "multi30k"])
def test_shipped_plans_give_all_the_same(name, script, monkeypatch):
    from comparison import plan
    from comparison.jobs import search_jobs

    monkeypatch.setattr(plan, "_script", lambda name: ROOT / "scripts" / f"{name}.py")
    jobs = search_jobs(plan.load_plan(PLANS / f"{name}.json"))
    eight = ["sgd", "adamw", "muon", "fngd", "kfac", "eva", "tengrad", "seng"]
    assert list(jobs)[:8] == eight
    own = {"optim", "optim_args", "learning_rate"}
    common = {json.dumps({k: v for k, v in job.settings.items() if k not in own})
              for some in jobs.values() for job in some}  # fmt: skip
    assert len(common) == 1 and {len(some) for some in jobs.values()} == {8}


@pytest.mark.slow
def test_real_training_runs(tmp_path, script):
    """The tiny plan, with an optimizer that does not exist beside those that do."""
    plan = json.loads((PLANS / "tiny.json").read_text())
    plan["optimizers"]["wrong"] = {"optim": "nosuch", "search": {"learning_rate": [0.1, 1]}}
    del plan["optimizers"]["fngd_adamw"]
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(plan))
    places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), *places],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    from comparison.results import read_runs

    found = {run["run"] + run["label"]: run for run in read_runs(tmp_path / "results")}
    assert {name for name in found if "final" in name} == {"final-seed1adamw", "final-seed1fngd"}
    wrong = found["search-01wrong"]
    assert wrong["status"] == "failed" and "nosuch is not a valid" in wrong["reason"]
    final = found["final-seed1fngd"]
    assert "test" in final and 0 < final["test"]["chrf"] < 100 and final["steps"] == 8
    assert final["settings"]["optim_args"].startswith("share=sample,update_scale=rms,damping=")
    table = (tmp_path / "results" / "table.md").read_text()
    assert f"{final['test']['chrf']:.3f}" in table and "wrong: no trial ended" in table
    assert (tmp_path / "results" / "curves.png").exists()
