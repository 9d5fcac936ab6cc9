"""`python -m hf_fngd compare`: a table and a picture from what runs left behind."""

import json
import re
import shutil

import pytest
from matplotlib.image import imread

from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from hf_fngd.report import compare
from hf_fngd.report.plots import clock, points
from hf_fngd.report.runs import overfitting, read_run, scores
from tests.hf.test_runner import ROOT, run
from tests.hf_utils import arguments, make_trainer

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
    assert "different machines" not in out and "include evaluations" not in out
    assert drawn == {}


def test_picture_is_drawn_on_request(tmp_path, drawn, capsys):
    table(capsys, write(tmp_path / "a"), write(tmp_path / "b"), "--plot", tmp_path / "both.png")
    assert drawn["path"] == tmp_path / "both.png" and drawn["metric"] == "eval_accuracy"
    assert list(drawn["series"]) == ["a", "b"]


def test_validation_after_training_counts_more_than_during(tmp_path, capsys):
    folder = write(tmp_path / "a", validation={"eval_loss": 1.25})
    rows, _ = table(capsys, folder, "--metric", "eval_loss")
    assert rows["a"]["validation: eval_loss"] == "1.25"


def test_notes_on_seconds_that_do_not_compare(tmp_path, capsys):
    untimed = [{k: v for k, v in entry.items() if k != "train_seconds"} for entry in HISTORY]
    changes = {"history": untimed, "train": {"train_runtime": 30.0}}
    other = write(tmp_path / "b", environment={"device": "two"}, **changes)
    rows, out = table(capsys, write(tmp_path / "a"), other)
    assert rows["b"]["training s"] == "30" and rows["b"]["s / step"] == "1.5"
    assert "different machines" in out and "include evaluations" in out


def test_runs_of_the_same_name_are_told_apart(tmp_path, capsys):
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


def test_any_trainer_leaves_enough(tmp_path, capsys):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path / "own", max_steps=2))
    trainer.train()
    trainer.save_state()
    rows, out = table(capsys, tmp_path / "own")
    (row,) = rows.values()
    history = trainer.state.log_history
    assert row["steps"] == "2" and row["optimizer"] == "–" and row["run"] == "own"
    assert row["training loss"] == f"{history[1]['loss']:.4g}"
    assert row["training s"] == f"{history[-1]['train_runtime']:.4g}"
    assert "include evaluations" in out
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
    height, width, _ = imread(tmp_path / "short.png").shape
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
def test_folders_of_something_else(content, message, tmp_path):
    folder = tmp_path / "foreign"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(FNGDError, match=message) as caught:
        read_run(folder)
    assert "foreign" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "accuracy"], "no run has logged 'accuracy'.*did you mean 'eval_accuracy'"),
        (["--metric", "bleu"], "no run has logged 'bleu': choose from eval_accuracy, eval_loss"),
        (["--plot", "{folder}/no/such/place.png"], "--plot: cannot write .*No such file"),
        (["{folder}/nothing"], "there is no folder .*nothing"),
    ],
)
def test_errors_are_those_of_a_command_line(words, message, tmp_path, capsys):
    words = [word.format(folder=tmp_path) for word in words]
    with pytest.raises(SystemExit) as caught:
        compare.main([str(write(tmp_path / "a")), *words])
    usage, last = capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)
    assert caught.value.code == 2 and usage.startswith("usage: python -m hf_fngd compare")
    assert re.match(f"python -m hf_fngd compare: error: .*{message}", last)
    assert "did you mean" not in last or "eval_loss" not in last


def test_metric_of_runs_without_evaluations(tmp_path, capsys):
    folder = write(tmp_path / "a", history=[{"step": 1, "loss": 2.0}])
    with pytest.raises(SystemExit):
        compare.main([str(folder), "--metric", "eval_bleu"])
    assert "no run has logged a validation metric" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path):
    shutil.copytree(CARDS / "tatoeba-demo", tmp_path / "demo")
    out = run("compare", "demo", cwd=tmp_path)
    assert out.returncode == 0 and out.stdout.startswith("| run ")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    out = run("compare", "demo", "--plot", "both.png", cwd=tmp_path)
    assert "written: both.png" in out.stderr and (tmp_path / "both.png").exists()
    out = run("compare", "nothing", cwd=tmp_path)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert "error: there is no folder 'nothing'" in out.stderr.splitlines()[-1]


def course(training, validation):
    """A history with an evaluation every ten steps, and two logged losses before each."""
    history = [{"step": 0, "eval_loss": 9.0}]
    for index, (loss, eval_loss) in enumerate(zip(training, validation, strict=True), start=1):
        history += [
            {"step": index * 10 - 5, "loss": loss + 0.25},
            {"step": index * 10, "loss": loss - 0.25},
            {"step": index * 10, "eval_loss": eval_loss},
        ]
    return history


FALLING = [4.0, 3.0, 2.5, 2.2, 2.0, 1.8, 1.6, 1.4]


@pytest.mark.parametrize(
    ("validation", "told"),
    [
        # Flat, and flat with noise.
        ([4.0, 3.2, 2.9, 2.85, 2.75, 2.74, 2.73, 2.72], "step 50 to step 80 the training loss "
         "fell from 2 to 1.4, while the validation loss hardly fell, from 2.75 to 2.72."),
        ([4.0, 3.2, 2.9, 2.7, 2.72, 2.68, 2.71, 2.69], "step 40 .* fell, from 2.7 to 2.69"),
        ([4.0, 3.2, 3.0, 2.8, 2.8, 3.0, 3.2, 3.4], "step 40 .* rose, from 2.8 to 3.4"),
        # A fifth of the fall of the training loss is still a gain.
        ([4.0, 3.2, 2.9, 2.7, 2.6, 2.56, 2.52, 2.48], None),
        # Only the last evaluation is worse.
        ([4.0, 3.2, 2.9, 2.7, 2.5, 2.3, 2.1, 2.3], None),
        # A dip within a fall.
        ([4.0, 3.0, 3.3, 2.7, 2.5, 2.3, 2.1, 1.9], None),
        ([4.0, 3.2, 2.9, 2.7, float("nan"), float("nan"), float("nan"), float("nan")], None),
    ],
    ids=["flat", "noisy", "rising", "slow", "last", "dip", "nan"],
)  # fmt: skip
def test_overfitting_is_a_training_loss_that_falls_alone(validation, told):
    found = overfitting(course(FALLING, validation))
    assert (found is None) if told is None else re.search(told, found)


def test_no_overfitting_where_the_training_loss_is_flat_too_or_little_is_known():
    flat = [2.75] * 4
    both = course([*FALLING[:4], 2.2, 2.19, 2.18, 2.17], [4.0, 3.2, 2.9, 2.8, *flat])
    assert overfitting(both) is None
    alone = [4.0, 3.2, 2.9, 2.8, *flat]
    assert overfitting(course(FALLING, alone)) is not None
    assert overfitting(course(FALLING[:2], alone[-2:])) is None, "one later evaluation"
    assert overfitting([e for e in course(FALLING, alone) if "loss" not in e]) is None
    assert overfitting([]) is None
    # Only the last two of twenty evaluations: too short a part.
    long = [*(5 - 0.2 * i for i in range(18)), 1.4, 1.2]
    assert overfitting(course(long, [*long[:18], long[17], long[17]])) is None


def test_committed_cards_say_which_runs_began_to_overfit():
    steps = {
        "tatoeba-demo": "step 567 to step 756",
        "multi30k-finetune-muon": "step 64 to step",
    }
    for folder in CARDS.glob("*/"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        if folder.name in steps:
            sentence = f"- The model began to overfit: from {steps[folder.name]}"
            assert text.count(sentence) == 1
        else:
            assert "overfit" not in text


def test_scores_are_the_numbers_of_any_metric():
    metrics = {
        "test_loss": 1.0,
        "test_bleu": 12.5,
        "test_exact_match": 0.25,
        "test_runtime": 3.0,
        "test_steps_per_second": 2.0,
        "test_model_preparation_time": 0.1,
        "epoch": 2.0,
        "train_seconds": 9.0,
        "bleu": 12.5,
        "bleu_2017": 11.0,
        "bleu_signature": "nrefs:1",
        "test_precisions": [1.0, 2.0],
    }
    assert scores(metrics, "test") == {"bleu": 12.5, "exact_match": 0.25, "bleu_2017": 11.0}
