"""`python -m hf_fngd compare`: a table and a picture from what runs left behind."""

import json
import shutil

import pytest
from matplotlib import pyplot

from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from hf_fngd.report import compare
from hf_fngd.report.plots import clock, points
from hf_fngd.report.runs import read_run
from tests.hf_utils import arguments, make_trainer
from tests.test_runner import ROOT, run

CARDS = ROOT / "model_cards"
HISTORY = [
    {"step": 10, "loss": 3.0, "train_seconds": 5.0},
    {"step": 10, "eval_loss": 2.5, "eval_accuracy": 0.25, "eval_runtime": 9.0},
    {"step": 20, "loss": 2.0, "train_seconds": 8.0},
    {"step": 20, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 9.0},
]
METRICS = {
    "settings": {"training": {"optim": "kfac", "learning_rate": 0.01, "seed": 7}},
    "environment": {"device": "one", "versions": {"torch": "2"}},
    "history": HISTORY,
    "test": {"test_accuracy": 0.4375, "test_runtime": 1.0},
}


def write(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | changes))
    return folder


def table(capsys, *words):
    compare.main([str(word) for word in words])
    out = capsys.readouterr().out
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}, out


@pytest.fixture
def drawn(monkeypatch):
    """What the picture was made from."""
    seen = {}

    def keep(path, series, metric):
        seen.update(path=path, series=series, metric=metric)

    monkeypatch.setattr(compare, "plot", keep)
    return seen


def test_table_says_what_the_files_say(tmp_path, drawn, capsys):
    rows, out = table(capsys, write(tmp_path / "a"), write(tmp_path / "b", test={}))
    assert rows["a"] == {
        "run": "a",
        "optimizer": "kfac",
        "learning rate": "0.01",
        "seed": "7",
        "steps": "20",
        "training loss": "2",
        "validation: eval_accuracy": "0.5",
        "test accuracy": "0.4375",
        "s / step": "0.4",
        "training s": "8",
    }
    assert rows["b"]["test accuracy"] == ""
    assert "different machines" not in out and "include their evaluations" not in out
    assert drawn["metric"] == "eval_accuracy" and list(drawn["series"]) == ["a", "b"]


def test_validation_after_training_counts_more_than_during(tmp_path, drawn, capsys):
    folder = write(tmp_path / "a", validation={"eval_loss": 1.25})
    rows, _ = table(capsys, folder, "--metric", "eval_loss")
    assert rows["a"]["validation: eval_loss"] == "1.25" and drawn["metric"] == "eval_loss"


def test_notes_on_seconds_that_do_not_compare(tmp_path, drawn, capsys):
    untimed = [{k: v for k, v in entry.items() if k != "train_seconds"} for entry in HISTORY]
    changes = {"history": untimed, "train": {"train_runtime": 30.0}}
    other = write(tmp_path / "b", environment={"device": "two"}, **changes)
    rows, out = table(capsys, write(tmp_path / "a"), other)
    assert rows["b"]["training s"] == "30" and rows["b"]["s / step"] == "1.5"
    assert "different machines" in out and "include their evaluations" in out


def test_runs_of_the_same_name_are_told_apart(tmp_path, drawn, capsys):
    folders = [write(tmp_path / one / "out") for one in ("x", "y")]
    rows, _ = table(capsys, *folders, folders[0])
    assert list(rows) == [str(folder) for folder in folders]


def test_committed_runs_and_their_picture(tmp_path, capsys):
    folders = [CARDS / "tatoeba-demo", CARDS / "multi30k-marian-small-fngd"]
    rows, _ = table(capsys, *folders, "--plot", tmp_path / "both.png")
    for folder in folders:
        test = json.loads((folder / "metrics.json").read_text())["test"]
        assert rows[folder.name]["test bleu"] == f"{test['test_bleu']:.4g}"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_picture_is_drawn_from_steps_and_seconds(tmp_path):
    steps, seconds, values = points([read_run(write(tmp_path / "a"))], "loss")
    assert steps.tolist() == [10, 20] and seconds.tolist() == [5.0, 8.0]
    assert values.tolist() == [[3.0, 2.0]]
    untimed = {"history": [{"step": 4, "loss": 1.0}], "seconds_per_step": 0.5}
    assert clock(untimed, steps).tolist() == [5.0, 10.0]


def test_any_trainer_leaves_enough(tmp_path, drawn, capsys):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path / "own", max_steps=2))
    trainer.train()
    trainer.save_state()
    rows, out = table(capsys, tmp_path / "own")
    (row,) = rows.values()
    history = trainer.state.log_history
    assert row["steps"] == "2" and row["optimizer"] == "–" and row["run"] == "own"
    assert row["training loss"] == f"{history[1]['loss']:.4g}"
    assert row["training s"] == f"{history[-1]['train_runtime']:.4g}"
    assert "include their evaluations" in out
    # Without a history of training, metrics.json of another program says nothing.
    (tmp_path / "own" / "metrics.json").write_text('{"history": 3}')
    assert table(capsys, tmp_path / "own")[0] == rows


def test_run_shorter_than_its_logging_steps(tmp_path, capsys):
    history = [{"step": 3, "eval_loss": 2.5, "train_seconds": 1.5}, {"step": 3, "train_runtime": 2}]
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "metrics.json").write_text(json.dumps({"history": history}))
    rows, _ = table(capsys, tmp_path / "short", "--plot", tmp_path / "short.png")
    (row,) = rows.values()
    assert row["training loss"] == "–" and row["training s"] == "1.5"
    # One row of panels: nothing is drawn for what no run logged.
    height, width, _ = pyplot.imread(tmp_path / "short.png").shape
    assert width > 2 * height


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no folder"),
        ({}, "is no finished run: it has no metrics.json and no trainer_state.json"),
        ({"metrics.json": "{"}, "cannot read .*metrics.json"),
        ({"metrics.json": '["a"]'}, "is no finished run"),
        ({"trainer_state.json": '{"log_history": [{"epoch": 1}]}'}, "is no finished run"),
    ],
)
def test_folders_of_something_else(content, message, tmp_path, drawn):
    folder = tmp_path / "foreign"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(FNGDError, match=message) as caught:
        compare.main([str(write(tmp_path / "good")), str(folder)])
    assert "foreign" in str(caught.value) and drawn == {}


def test_unknown_metric_and_unwritable_picture(tmp_path):
    folder = str(write(tmp_path / "a"))
    known = "logged: eval_accuracy, eval_loss"
    with pytest.raises(FNGDError, match=f"no run has logged 'eval_bleu'; {known}"):
        compare.main([folder, "--metric", "eval_bleu"])
    with pytest.raises(FNGDError, match="--plot: cannot write .*No such file"):
        compare.main([folder, "--plot", str(tmp_path / "no" / "such" / "place.png")])


def test_command(tmp_path):
    shutil.copytree(CARDS / "tatoeba-demo", tmp_path / "demo")
    out = run("compare", "demo", cwd=tmp_path)
    assert out.returncode == 0 and out.stdout.startswith("| run ")
    assert "written: compare.png" in out.stderr and (tmp_path / "compare.png").exists()
    out = run("compare", "nothing", cwd=tmp_path)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr.strip().splitlines()[-1].startswith("hf_fngd: there is no folder 'nothing'")
