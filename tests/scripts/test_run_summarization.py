"""scripts/run_summarization.py: rows in, ROUGE, summaries and card out."""

import json
import re
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import flat, run_script, script, write_metric

WORDS = "the old man sold a red boat near some small harbour before winter came".split()
OPTIONS = {
    "text_column": "article",
    "summary_column": "highlights",
    "source_prefix": "summarize: ",
    "max_source_length": 48,
    "max_target_length": 12,
    "num_beams": 2,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "optim": "fngd",
    "optim_args": "damping=0.1,update_scale=rms",
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": "true",
}


def tiny_t5(folder):
    """A random T5 that reads bytes."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)
    )  # fmt: skip
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=125).save_pretrained(folder)
    return folder


def rows(count, start=0):
    found = []
    for i in range(start, start + count):
        text = " ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(9))
        found.append({"article": f"{text}.", "highlights": " ".join(text.split()[:2]), "id": i})
    return "".join(json.dumps(row) + "\n" for row in found)


@pytest.fixture
def files(tmp_path):
    tiny_t5(tmp_path / "t5")
    for name, count, start in (("train", 24, 0), ("validation", 5, 24), ("test", 6, 29)):
        (tmp_path / f"{name}.jsonl").write_text(rows(count, start), encoding="utf-8")
    return tmp_path


def options(folder, **changes):
    names = ("train", "validation", "test")
    places = {f"{name}_file": folder / f"{name}.jsonl" for name in names}
    more = {"model_name_or_path": folder / "t5", "output_dir": folder / "out"}
    return flat({**places, **more, **OPTIONS, **changes})


def test_whole_job_and_everything_it_leaves(files, capsys):
    metric = write_metric(files, "shared", "string", "string", "{'words': 3, 'best': [1]}")
    assert run_script("run_summarization", *options(files, metrics=metric)) == 0
    out, folder = capsys.readouterr().out, files / "out"
    found = json.loads((folder / "metrics.json").read_text())
    written = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in rows(6, 29).splitlines()]
    assert [(r["source"], r["reference"]) for r in written] == [
        (row["article"], row["highlights"]) for row in expected
    ]
    with script(ROOT / "scripts" / "run_summarization.py") as module:
        again = module.score([r["prediction"] for r in written], [r["reference"] for r in written])
    again["shared_words"] = 3
    assert {name: found["test"][f"test_{name}"] for name in again} == pytest.approx(again)
    assert [e["eval_shared_words"] for e in found["history"] if "eval_loss" in e] == [3, 3]
    data = ModelCard.load(folder / "README.md").data
    assert data.pipeline_tag == "summarization"
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        name: round(value, 4) for name, value in again.items()
    }
    assert "(coefficients.png)" in (folder / "README.md").read_text()
    assert re.search(r"epoch +training loss +validation loss +ROUGE-1\n", out)
    assert "test ROUGE-L: " in out and "\ntest shared_words: 3.00\n" in out


def test_rouge_is_that_of_shared_words():
    with script(ROOT / "scripts" / "run_summarization.py") as module:
        found = module.score(["a red boat", "boats sold"], ["a red boat", "boat sale"])
    # Of the second pair the stems agree in one word of two, and in no pair of words.
    assert found == pytest.approx({"rouge1": 75, "rouge2": 50, "rougeL": 75})


BAD = {
    "no model": (lambda f: {"model_name_or_path": None}, "summaries need a trained model"),
    "no column": (lambda f: {"summary_column": "short"}, "columns article, highlights, id but no"),
    "one column twice": (lambda f: {"summary_column": "article"}, "are both 'article'"),
    "number for text": (lambda f: {"text_column": "id"}, "row 0 of the train set has no text"),
    "no training data": (lambda f: {"train_file": None}, "--do_train needs training rows"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_with_a_way_out(case, files, capsys):
    changes, message = BAD[case]
    assert run_script("run_summarization", *options(files, **changes(files))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run_summarization: error: ") and re.search(message, line), line


def test_missing_rouge_is_said_before_anything_else(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert run_script("run_summarization", *options(files)) == 2
    assert capsys.readouterr().err == (
        "run_summarization: error: ROUGE needs rouge_score: pip install 'hf-fngd[scripts]'\n"
    )
