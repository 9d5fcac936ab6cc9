"""Trainings that share a GPU, rehearsed on a CPU: results of good, bad and late runs."""

import gzip
import json
import sys
from unittest import mock

import pytest

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import script

FILES = ("train", "validation", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    words = [("a dog runs", "ein Hund rennt"), ("two men sit", "zwei Männer sitzen")]
    rows = [
        {"translation": {"en": f"{en} {number}", "de": f"{de} {number}"}}
        for number in range(20)
        for en, de in words
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in FILES:
        with gzip.open(folder / f"{name}.en-de.jsonl.gz", "wt") as file:
            file.write(text)
    return tmp_path / "data"


def run(folder, data, *words):
    output = folder / "results" / "runs.json"
    words = ("--tiny", "--data", data, "--work", folder / "work", "--output", output, *words)
    with (
        script(ROOT / "scripts" / "gpu_runs.py") as module,
        mock.patch.object(sys, "argv", ["gpu_runs.py", *map(str, words)]),
    ):
        module.main()
    return json.loads(output.read_text())["runs"]


@pytest.mark.slow
def test_good_and_bad_runs_have_results(tmp_path, data, capsys):
    runs = run(tmp_path, data, "--optimizers", "fngd", "--jobs", 2, "--minutes", 4)
    good, bad = runs
    assert (good["task"], good["state"], good["steps"]) == ("translation", "ok", 4)
    assert good["settings"]["optim"] == "fngd" and good["settings"]["train_file"].startswith(
        str(data)
    )
    assert {"test_bleu", "bleu_test_2017_mscoco"} <= good["test"].keys()
    assert good["train_loss"] > 0 and good["seconds_per_step"] > 0
    # There are no images.
    assert (bad["task"], bad["state"]) == ("images", "failed")
    assert "there is no file" in bad["said"]
    assert "| translation | fngd" in capsys.readouterr().out


def test_late_runs_are_ended_and_the_others_not_begun(tmp_path, data):
    words = ("--tasks", "translation", "--optimizers", "adamw", "fngd", "--minutes", 0.005)
    first, second = run(tmp_path, data, *words, "--jobs", 1)
    assert first["state"] == "ended: no time was left" and 0 < first["total_seconds"] < 30
    assert second["state"] == "not begun"
