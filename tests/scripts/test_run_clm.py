"""scripts/run_clm.py: texts in, perplexity and card out, whole models and adapters."""

import json
import math
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import flat, run_script, script

SAMPLE = ROOT / "scripts" / "data" / "tatoeba" / "train.jsonl"
TINY = {"vocab_size": 300, "d_model": 16, "layers": 1, "attention_heads": 2, "max_length": 16}
OPTIONS = {
    "text_column": "translation.de",
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "optim": "fngd",
    "optim_args": "damping=0.1,update_scale=rms",
    "learning_rate": 1e-2,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": "true",
    **TINY,
}


@pytest.fixture
def files(tmp_path):
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, first, last in (("train", 0, 32), ("validation", 32, 40), ("test", 40, 47)):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[first:last]), encoding="utf-8")
    return tmp_path


def options(folder, **changes):
    names = ("train", "validation", "test")
    places = {f"{name}_file": folder / f"{name}.jsonl" for name in names}
    return flat({**places, "output_dir": folder / "out", **OPTIONS, **changes})


def perplexity(folder, file, tokens):
    """Of the saved model, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["translation"]["de"]
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:tokens]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total -= sum(scores[i, token].item() for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
    return math.exp(total / count)


def test_whole_job_and_everything_it_leaves(files, capsys):
    assert run_script("run_clm", *options(files)) == 0
    out, folder = capsys.readouterr().out, files / "out"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["test"]["test_perplexity"] == pytest.approx(
        perplexity(folder, files / "test.jsonl", 16), rel=1e-4
    )
    curve = [entry["eval_perplexity"] for entry in found["history"] if "eval_perplexity" in entry]
    assert len(curve) == 3 and curve[-1] < 0.9 * curve[0]
    rates = [e["fngd/reuse_rate"] for e in found["history"] if "fngd/reuse_rate" in e]
    assert rates and set(rates) == {1.0}
    data = ModelCard.load(folder / "README.md").data
    assert data.pipeline_tag == "text-generation"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_name) == ("perplexity", "Perplexity")
    assert result.metric_value == round(found["test"]["test_perplexity"], 4)
    card = (folder / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)\n" in card
    assert "(coefficients.png)" in card and "same tokenizer" in card
    for name in ("metrics.json", "curves.png", "coefficients.png", "README.md"):
        assert f"written: {folder / name}" in out
    groups = found["optimizer"]["coefficients"]
    assert groups.keys() == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert all(group["count"] == 32 for group in groups.values())


# Both are peft's own doing.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out")
def test_adapters_of_what_it_saved_on_plain_text(files):
    short = {"num_train_epochs": 1, "do_eval": None, "do_predict": None, "eval_strategy": "no"}
    assert run_script("run_clm", *options(files, **short)) == 0
    (files / "train.txt").write_text("Ein Satz.\n\nNoch ein Satz.\n" * 4, encoding="utf-8")
    (files / "test.txt").write_text("Ein Satz.\n", encoding="utf-8")
    changes = {
        "train_file": files / "train.txt",
        "validation_file": None,
        "test_file": files / "test.txt",
        "text_column": None,
        "model_name_or_path": files / "out",
        "lora_rank": 2,
        "output_dir": files / "second",
        "num_train_epochs": 2,
        "do_eval": None,
        "eval_strategy": "no",
    }
    assert run_script("run_clm", *options(files, **changes)) == 0
    found = json.loads((files / "second" / "metrics.json").read_text())
    assert found["train"]["train_loss"] > 0 and found["test"]["test_perplexity"] > 1
    chosen = [path for path, *_, told in found["optimizer"]["layers"] if told == "chosen"]
    assert chosen and all(".lora_" in path for path in chosen)
    # Empty lines are no texts.
    assert {g["count"] % 8 for g in found["optimizer"]["coefficients"].values()} == {0}
    assert json.loads((files / "second" / "adapter_config.json").read_text())["r"] == 2
    assert "needs peft" in (files / "second" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(files / "second")
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().sum() > 0 for p in moved)


def test_baseline_has_no_picture_of_coefficients(files):
    changes = {"optim": "adamw_torch", "optim_args": None, "num_train_epochs": 1}
    assert run_script("run_clm", *options(files, **changes)) == 0
    names = {path.name for path in (files / "out").iterdir()}
    assert "curves.png" in names and "coefficients.png" not in names
    assert "Coefficients" not in (files / "out" / "README.md").read_text()


def test_perplexity_counts_every_token_once():
    with script(ROOT / "scripts" / "run_clm.py") as module:
        logits = torch.randn(3, 5, 7)
        labels = torch.randint(0, 7, (3, 5))
        labels[0, 2:], labels[2, 4:] = -100, -100
        kept = module.surprise((logits, None), labels)
        assert kept[:, 1].tolist() == [1, 4, 3]
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        prediction = type("Prediction", (), {"predictions": kept.numpy()})
        found = module.compute_metrics(prediction)["perplexity"]
        assert math.log(found) == pytest.approx(expected.item(), rel=1e-6)
        prediction.predictions = kept.numpy() * [1000, 1]
        assert module.compute_metrics(prediction)["perplexity"] == math.inf


BAD = {
    "no column": (lambda f: {"text_column": "words"}, "columns translation but no 'words'"),
    "no nested text": (
        lambda f: {"text_column": "translation.fr"},
        "row 0 of the train set has no text under 'translation.fr'",
    ),
    "no training data": (lambda f: {"train_file": None}, "--do_train needs training texts"),
    "other kind of file": (
        lambda f: {"train_file": SAMPLE.with_name("README.md")},
        "README.md' is no .json, .json.gz, .jsonl, .jsonl.gz or .txt file",
    ),
    "adapters on nothing": (lambda f: {"lora_rank": 2}, "--lora_rank adapts a trained model"),
    "no such model": (lambda f: {"model_name_or_path": f / "no"}, "cannot load --model_name"),
    "no data": (
        lambda f: {"train_file": None, "validation_file": None, "test_file": None},
        "no data: give --train_file",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_with_a_way_out(case, files, capsys):
    changes, message = BAD[case]
    assert run_script("run_clm", *options(files, **changes(files))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run_clm: error: ") and re.search(message, line), line


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_script("run_clm", "--help")
    out = capsys.readouterr().out
    for text in ("\n    python scripts/run_clm.py --train_file", "--text_column", "--lora_rank"):
        assert text in out
