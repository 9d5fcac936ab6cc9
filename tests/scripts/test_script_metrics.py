"""`--metrics` of the training scripts: metrics of `evaluate` beside those of the task."""

import json
import sys

import pytest

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import run_script, script, write_metric

SHARE = "{'share': sum(p in r for p, r in zip(predictions, references)) / len(predictions)}"


@pytest.fixture
def module():
    with script(ROOT / "scripts" / "run_image_classification.py"):
        from common import metrics

        yield metrics


def load(module, *words, kinds=("string",)):
    return module.load_metrics(module.MetricArguments([str(word) for word in words]), *kinds)


def test_references_are_lists_where_the_metric_declares_lists(module, tmp_path):
    (found,) = load(module, write_metric(tmp_path, "share", "string", "[string]", SHARE))
    assert found(["a", "b"], ["a", "ab"]) == {"share": 0.5}
    (tmp_path / "other").mkdir()
    (found,) = load(module, write_metric(tmp_path / "other", "share", "string", "string", SHARE))
    # In a text, and not in a list of texts.
    assert found(["a", "b"], ["a", "ab"]) == {"share": 1}


def test_only_numbers_stay_and_their_names_tell_the_metric(module, tmp_path):
    result = (
        "{'odd': 0.5, 'odd2': __import__('numpy').float32(0.25), 'count': 3, 'many': [1.0, 2.0],"
        " 'text': 'x', 'sure': True, 'none': None}"
    )
    (found,) = load(module, write_metric(tmp_path, "odd", "string", "string", result))
    scores = found(["a"], ["a"])
    assert scores == {"odd": 0.5, "odd2": 0.25, "odd_count": 3}
    assert {type(value) for value in scores.values()} == {float}


def test_a_number_for_each_prediction_becomes_their_mean(module, tmp_path):
    result = "{'f1': [0.5, 1.0, 0.0], 'precisions': [0.1, 0.2], 'words': ['a', 'b', 'c']}"
    (found,) = load(module, write_metric(tmp_path, "bert", "string", "string", result))
    assert found(["a", "b", "c"], ["a", "b", "c"]) == {"bert_f1": 0.5}


def test_the_type_is_that_which_the_metric_declares(module, tmp_path):
    numbers = write_metric(tmp_path, "mean", "int32", "int32", "{'mean': max(predictions)}")
    names = write_metric(tmp_path, "length", "string", "string", "{'length': len(predictions[0])}")
    found = load(module, numbers, names, kinds=("int", "string"))
    assert [metric.kind for metric in found] == ["int", "string"]
    values = {"int": [4, 7], "string": ["boot", "bag"]}
    assert module.score_all(found, values, values) == {"mean": 7, "length": 4}


def test_options_follow_a_colon(module, tmp_path):
    place = write_metric(tmp_path, "big", "string", "string", "{'big': scale}")
    (found,) = load(module, f"{place}:scale=2.5")
    assert found(["a"], ["a"]) == {"big": 2.5}
    (found,) = load(module, f"{place}:scale=no,other=true")
    assert found.options == {"scale": "no", "other": True}


def wrong(result, kinds=("string", "string"), more=""):
    return lambda folder: [f"{write_metric(folder, 'odd', *kinds, result)}{more}"]


BAD = {
    "no such name": (
        lambda f: ["no-such-metric"],
        "cannot load 'no-such-metric' (there is no such file, and the Hub",
    ),
    "no such user": (
        lambda f: ["nobody/nothing"],
        "cannot load 'nobody/nothing' (there is no such file, and the Hub",
    ),
    "no such file": (lambda f: [f / "none.py"], "none.py' (there is no such file"),
    "no metric": (wrong("1 +"), "odd' (invalid syntax"),
    "numbers": (wrong("{'odd': 1}", ("int32", "int32")), "odd' wants predictions: Value("),
    "fails": (wrong("{'odd': 1 / 0}"), "odd' fails (division by zero): give its options after"),
    "no number": (wrong("{'odd': [1]}"), "odd' computes no number: leave it out"),
    "unknown option": (wrong("{}", more=":x=1"), "unexpected keyword argument 'x'): give its"),
    "no option": (wrong("{}", more=":x"), "odd:x' must be NAME or NAME:option=value"),
    "twice": (
        lambda f: wrong("{'odd': 1}")(f) + [f / "odd"],
        "odd' and another metric both compute 'odd': leave one out",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_metric_that_cannot_be_used_is_refused_before_the_data_are_read(case, tmp_path, capsys):
    words, message = BAD[case]
    settings = {"source_lang": "en", "target_lang": "de", "train_file": "none.jsonl"}
    settings |= {"output_dir": str(tmp_path / "out"), "do_train": True, "report_to": "none"}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**settings, "metrics": [str(word) for word in words(tmp_path)]}))
    assert run_script("run_translation", path) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run_translation: error: --metrics: ") and message in line, line
    assert not (tmp_path / "out").exists()


def test_missing_package_is_said(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ValueError, match=r"--metrics needs evaluate: pip install"):
        load(module, "f1")
