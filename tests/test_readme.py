"""The front page agrees with the code and with the committed results."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables():
    path = ROOT / "scripts" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_code_and_the_result_files():
    assert tables().fill(README) == README, "run python scripts/readme_tables.py"
    assert "| `damping` | `0.1` |" in README and "fngd_adamw later epochs" in README


def test_table_of_what_works_names_tests_that_exist():
    rows = re.findall(r"^\| (.+) \| (works|slower|refused).* \| `(\w+)::(\w+)` \|$", README, re.M)
    assert len(rows) > 30 and len({feature for feature, *_ in rows}) == len(rows)
    for _, _, file, test in rows:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.M)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda p: p.name)
def test_cards_are_what_the_code_makes_of_the_numbers(folder, tmp_path):
    own = tmp_path / folder.name
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("README.md"))
    script = str(ROOT / "scripts" / "write_card.py")
    subprocess.run([sys.executable, script, str(own)], check=True, cwd=ROOT, timeout=120)
    for path in folder.iterdir():
        assert (own / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda p: p.name)
def test_cards_repeat_their_metrics_file(folder):
    found = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text(encoding="utf-8")
    test, validation = found.get("test"), found["validation"]
    scores = test or {name: validation[f"eval_{name}"] for name in ("bleu", "chrf")}
    assert f"| this model | {scores['bleu']:.2f} | {scores['chrf']:.2f} |" in card
    assert f"On the {'test' if test else 'validation'} set" in card
    assert found["environment"]["command"] in card
    assert test is None or test["bleu_signature"] in card


def test_what_is_said_of_the_comparison_is_so():
    assert "FNGD with its defaults is behind plain SGD" in README and "Muon is\n  ahead" in README
    for name, metric in (("cifar10", "test_accuracy"), ("multi30k", "bleu")):
        runs = ROOT / "scripts" / "bench" / "results" / f"compare_{name}" / "runs"
        means = {}
        for folder in runs.iterdir():
            found = [json.loads(path.read_text())["test"] for path in folder.glob("final-*.json")]
            means[folder.name] = sum(test[metric] for test in found) / len(found)
        assert max(means, key=means.get) == "muon" and means["fngd"] < means["sgd"], means


def test_activation_checkpointing_keeps_its_gain():
    file = ROOT / "scripts" / "bench" / "results" / "checkpointing.json"
    saved = {
        name: row["saved_mib"] for name, row in json.loads(file.read_text())["results"].items()
    }
    for mode, gain in saved.pop("adamw").items():
        assert gain > 100 and all(row[mode] > 0.95 * gain for row in saved.values())


def test_what_is_said_of_the_store_is_so():
    file = ROOT / "scripts" / "bench" / "results" / "store.json"
    text = file.read_text()
    results = json.loads(text)["results"]
    largest = [row for row in results["measured"] if row["rows"] == 10**6]
    assert len(largest) == 4 and results["stored_layers"] == 100
    assert all(row["highest_share"] < 0.01 for row in largest)
    for row in [*results["measured"], *results["on_paper"]]:
        size = {"float32": 4, "float16": 2}[row["dtype"]]
        assert row["table_mib"] == size * row["rows"] * 100 / 2**20
    assert {row["rows"] for row in results["on_paper"]} == {10**8}


def test_what_is_said_of_old_coefficients_is_so():
    assert "further away, at every damping" in README and "nearer at λ = 0.1" in README
    later = {}
    for name in ("", "_finetune"):
        file = ROOT / "scripts" / "bench" / "results" / f"coefficient_noise{name}.json"
        rows = json.loads(file.read_text())["results"]["measurements"]
        later[name] = [row for row in rows if "cos: old" in row]
        assert all(row["cos: plain"] < row["cos: shared"] for row in rows)
    assert len(later[""]) == 12 and len(later["_finetune"]) == 6
    assert all(row["cos: old"] < row["cos: plain"] for row in later[""])
    for row in later["_finetune"]:
        nearer = row["cos: old"] - row["cos: plain"]
        assert nearer > 0.02 if row["damping"] == 0.1 else abs(nearer) < 0.025, row


def test_what_is_said_of_fine_tuning_is_so():
    assert "cost 0.8 on the second" in README and "standard deviation of each other" in README
    runs = ROOT / "scripts" / "bench" / "results" / "quality_finetune" / "runs"
    first, second, loss = {}, {}, {}
    for label in ("adamw", "muon", "sgd_rms", "fngd_rms"):
        found = [json.loads(path.read_text()) for path in (runs / label).glob("final-*.json")]
        assert len(found) == 3 and len(list((runs / label).glob("search-*.json"))) == 12
        first[label] = [run["test"]["bleu"] for run in found]
        second[label] = mean(run["test"]["bleu_test_2017_flickr"] for run in found)
        loss[label] = [run["objective"] for run in found]
    means = {label: mean(values) for label, values in first.items()}
    spread = min(stdev(values) for label, values in first.items() if label != "fngd_rms")
    for label in ("muon", "sgd_rms", "fngd_rms"):
        assert abs(means[label] - means["adamw"]) < spread, means
    assert round(second["sgd_rms"] - second["fngd_rms"], 1) == 0.8
    assert min(loss["fngd_rms"]) > max(loss["sgd_rms"])
