"""The command line that all training scripts share."""

import json
import re
import shlex
import sys

import pytest

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import flat, run_script, script

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("run_*.py"))
FILES = {"train_file": "a.jsonl", "dataset_label": "Sample", "dataset_id": "someone/sample"}


def parsed(monkeypatch, path, *words):
    """What a script makes of a command line: model, data and training arguments."""
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, words)])
    with script(path) as module:
        kinds = [module.ModelArguments, module.DataArguments]
        last = getattr(module, "Seq2SeqTrainingArguments", None) or module.TrainingArguments
        return module.parse([*kinds, last], module.__doc__)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_of_the_help_trains_and_scores(path, tmp_path, monkeypatch):
    text = re.search(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)[1]
    example = re.search(r"^    (python .*?[^\\])$", text, re.MULTILINE | re.DOTALL)[1]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["python", f"scripts/{path.name}"]
    monkeypatch.chdir(tmp_path)
    _, data, args = parsed(monkeypatch, path, *words[2:])
    assert args.do_train and args.do_predict and data.train_file and data.test_file
    assert args.optim == "fngd" and args.learning_rate != 5e-5, "the Trainer's default is AdamW's"


BAD_OPTIM_ARGS = {
    "dampnig=1": "did you mean 'damping'?",
    "damping=0": "damping must be a finite number above 0, not 0",
    "damping": "'damping' is not name=value",
    "nesterov=true": "nesterov",
}


@pytest.mark.parametrize("given_by", ["flags", "file"])
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_wrong_optim_args_are_refused_before_anything_is_loaded(path, given_by, tmp_path, capsys):
    settings = {"model_name_or_path": "no-model", "train_file": "none", "report_to": "none"}
    if path.stem == "run_translation":
        settings |= {"source_lang": "en", "target_lang": "de"}
    for text, message in BAD_OPTIM_ARGS.items():
        more = {"output_dir": "out", "do_train": True, "optim": "fngd", "optim_args": text}
        words, where = flat(settings | more), ""
        if given_by == "file":
            (tmp_path / "a.json").write_text(json.dumps(settings | more))
            words, where = ["a.json"], "cannot use 'a.json': "
        assert run_script(path.stem, *words, folder=tmp_path) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"{path.stem}: error: {where}") and message in line
    assert not (tmp_path / "out").exists()


def test_missing_argument_is_said_under_the_same_name(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script("run_translation", "--do_train", folder=tmp_path)
    usage, line = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: run_translation.py [SETTINGS.json]")
    assert line.startswith("run_translation: error: the following arguments are required: --")


def test_nothing_to_do_is_said(tmp_path, capsys):
    languages = ("--source_lang", "en", "--target_lang", "de")
    assert run_script("run_translation", *languages, "--output_dir", "out", folder=tmp_path) == 2
    assert "nothing to do: give --do_train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_an_optimizer_are_not_given_to_another(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    settings = {"output_dir": str(tmp_path), "do_train": True, "optim": "fngd"}
    path.write_text(json.dumps({**settings, "optim_args": "share=none", "learning_rate": 0.5}))
    images = ROOT / "scripts" / "run_image_classification.py"
    for words, expected in {
        ("--optim", "fngd"): "share=none",
        ("--optim", "adamw_torch"): None,
        ("--optim", "kfac", "--optim_args", "damping=2"): "damping=2",
    }.items():
        *_, args = parsed(monkeypatch, images, path, *words)
        assert (args.optim, args.optim_args, args.learning_rate) == (words[1], expected, 0.5)


@pytest.mark.parametrize("flag", ["--train_file", "--test_file", "--dataset_name", "--train_dir"])
def test_other_data_are_not_called_as_those_of_the_settings_file(flag, tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**FILES, "output_dir": str(tmp_path), "do_train": True}))
    images = ROOT / "scripts" / "run_image_classification.py"
    _, data, _ = parsed(monkeypatch, images, path, "--width", "4")
    assert (data.dataset_label, data.dataset_id) == ("Sample", "someone/sample")
    _, data, _ = parsed(monkeypatch, images, path, flag, "b.jsonl")
    assert (data.dataset_label, data.dataset_id) == (None, None)
    _, data, _ = parsed(monkeypatch, images, path, flag, "b.jsonl", "--dataset_label", "Mine")
    assert (data.dataset_label, data.dataset_id) == ("Mine", None)
