"""--average_start: files and card say what was averaged, and how the last weights scored."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.scripts.script_utils import run_script
from tests.scripts.test_run_clm import files, options

__all__ = ["files"]


def test_run_reports_the_average_and_the_last_weights(files, capsys):
    words = options(files, average_start=0.5, average_every=2, lr_scheduler_type="constant")
    assert run_script("run_clm", *words) == 0
    capsys.readouterr()
    folder = files / "out"
    found = json.loads((folder / "metrics.json").read_text())
    averaging, mine = found["averaging"], found["validation"]
    # 12 steps: those after steps 8, 10 and 12
    assert averaging["points"] == 3
    assert averaging["last"]["last_loss"] != mine["eval_loss"]
    # The last evaluation of the training already has the average, and no later one is in it.
    losses = [entry["eval_loss"] for entry in found["history"] if "eval_loss" in entry]
    assert losses[-1] == mine["eval_loss"] and len(losses) == 3
    assert not any("last_loss" in entry for entry in found["history"])
    training = found["settings"]["training"]
    assert training["average_start"] == 0.5 and training["average_every"] == 2
    assert "average_decay" not in training
    card = (folder / "README.md").read_text()
    assert "The weights are the average of those after 3 of its steps." in card
    last = averaging["last"]["last_loss"]
    assert f"loss {last:.3f} ({mine['eval_loss']:.3f})" in card
    assert "| average_start | 0.5 |" in card
    # What was saved is what was scored.
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert all(bool(p.isfinite().all()) for p in saved.parameters())
    again = {"model_name_or_path": folder, "output_dir": files / "again", "do_train": None}
    assert run_script("run_clm", *options(files, **again, eval_strategy="no")) == 0
    second = json.loads((files / "again/metrics.json").read_text())
    assert second["validation"]["eval_loss"] == pytest.approx(mine["eval_loss"], rel=1e-5)


def test_run_without_an_average_says_nothing_of_it(files, capsys):
    assert run_script("run_clm", *options(files, num_train_epochs=1)) == 0
    capsys.readouterr()
    found = json.loads((files / "out/metrics.json").read_text())
    assert "averaging" not in found
    assert not any(name.startswith("average") for name in found["settings"]["training"])
    assert "The weights are the average" not in (files / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"average_every": 2}, "--average_every and --average_decay need --average_start"),
        ({"average_decay": 0.9}, "--average_every and --average_decay need --average_start"),
        (
            {"average_start": 1},
            "--average_start must be a finite number at least 0 and below 1, not 1.0",
        ),
        (
            {"average_start": 0.5, "average_every": 0},
            "--average_every must be a whole number at least 1",
        ),
        (
            {"average_start": 0.5, "average_decay": 2},
            "--average_decay must be a finite number above 0",
        ),
    ],
)
def test_bad_values_end_in_one_line(given, message, files, capsys):
    assert run_script("run_clm", *options(files, **given)) == 2
    assert message in capsys.readouterr().err


def test_best_model_at_the_end_is_refused(files, capsys):
    words = options(files, average_start=0.5, load_best_model_at_end=True, save_strategy="epoch")
    assert run_script("run_clm", *words) == 2
    assert "load_best_model_at_end replaces the average" in capsys.readouterr().err
