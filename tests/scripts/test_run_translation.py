"""scripts/run_translation.py from files to translations, and its errors in one line each."""

import ast
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_fngd.report.hub
from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import use_as_the_card_says, write_metric

SCRIPT = ROOT / "scripts" / "run_translation.py"
SAMPLE = ROOT / "scripts" / "data" / "tatoeba"
TINY = {
    "vocab_size": 200,
    "d_model": 16,
    "ffn_dim": 32,
    "layers": 1,
    "attention_heads": 2,
    "max_source_length": 16,
    "max_target_length": 16,
    "num_beams": 1,
}


def pairs(count, start=0):
    lines = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[start : start + count]) + "\n"


@pytest.fixture
def files(tmp_path):
    """Training, validation and test files of a few sentences."""
    for name, count, start in (("train", 48, 0), ("validation", 6, 48), ("test", 6, 54)):
        (tmp_path / f"{name}.jsonl").write_text(pairs(count, start), encoding="utf-8")
    return tmp_path


def options(folder, **changes):
    settings = {
        "train_file": folder / "train.jsonl",
        "validation_file": folder / "validation.jsonl",
        "test_file": folder / "test.jsonl",
        "source_lang": "en",
        "target_lang": "de",
        "output_dir": folder / "out",
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "optim": "fngd",
        "optim_args": "damping=0.1,share=sample,update_scale=rms",
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **TINY,
        **changes,
    }
    flat = []
    for name, value in settings.items():
        if value is not None and value is not False:
            flat += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flat


def run(*arguments, cwd=ROOT, launcher=()):
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_whole_job_and_everything_it_leaves(files):
    # group_by_length sorts evaluation rows too, if it is let to.
    changes = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 2}
    out = run(*options(files, dataset_label="ten sentences", **changes))
    assert out.returncode == 0, out.stderr
    folder = files / "out"
    found = json.loads((folder / "metrics.json").read_text())
    assert 0 <= found["test"]["bleu"] <= 100
    assert found["test"]["bleu_signature"].startswith("nrefs:1|case:mixed")
    assert found["test"]["bleu_signature"] in out.stdout
    assert found["settings"]["training"]["optim"] == "fngd"
    assert found["optimizer"]["config"]["update_scale"] == "rms"
    assert str(SCRIPT) in found["environment"]["command"]
    losses = [e["loss"] for e in found["history"] if "loss" in e]
    assert len(losses) == 6
    rates = [e["fngd/reuse_rate"] for e in found["history"] if "fngd/reuse_rate" in e]
    assert rates and set(rates) == {1.0}
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["translation"] for line in pairs(6, 54).splitlines()]
    assert [(r["source"], r["reference"]) for r in rows] == [(e["en"], e["de"]) for e in expected]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    results = {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}
    assert results == {name: round(found["test"][name], 4) for name in ("bleu", "chrf")}
    assert "ten sentences" in card
    # Greedy during training; the final evaluation, with beams, is no point of the curve.
    steps = [e["step"] for e in found["history"] if "eval_bleu" in e]
    assert steps == [3, 6] and "eval_bleu" in found["validation"]
    for name in ("metrics.json", "predictions.jsonl", "curves.png", "README.md"):
        assert str(folder / name) in out.stdout
    # The saved model translates as the script did.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    sources = [r["source"] for r in rows]
    inputs = tokenizer(sources, return_tensors="pt", padding=True, max_length=16, truncation=True)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_length=16, num_beams=1)
    again = [t.strip() for t in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert again == [r["prediction"] for r in rows]
    said = ast.literal_eval(use_as_the_card_says(folder))
    assert len(said) == 1 and isinstance(said[0], str)


@pytest.mark.slow
def test_fine_tunes_what_it_saved_from_gz_with_a_baseline(files):
    first = run(*options(files, num_train_epochs=1, eval_strategy="no", do_predict=False))
    assert first.returncode == 0, first.stderr
    packed = files / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(pairs(32).encode()))
    shape = dict.fromkeys(["vocab_size", "d_model", "ffn_dim", "layers", "attention_heads"])
    length = "{'length': sum(map(len, predictions))}"
    changes = {
        "metrics": write_metric(files, "length", "string", "[string]", length),
        "extra_test_file": files / "validation.jsonl",
        "model_name_or_path": files / "out",
        "train_file": packed,
        "optim": "adamw_torch",
        "optim_args": None,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 2,
        "output_dir": files / "second",
    }
    second = run(*options(files, **shape, **changes))
    assert second.returncode == 0, second.stderr
    assert "MarianForCausalLM" not in second.stderr
    assert "ignores num_items_in_batch" in second.stderr
    card = (files / "second" / "README.md").read_text()
    assert "natural-gradient" not in card and "base_model" not in card
    assert "fine-tuned from a local model, `out`, on train.jsonl.gz (32 rows)" in card
    columns = ("bleu", "chrf", "length", "bleu_validation", "chrf_validation", "length_validation")
    assert f"| | {' | '.join(columns)} |" in card
    results = ModelCard(card).data.eval_results
    assert [result.metric_type for result in results] == ["bleu", "chrf", "length"]
    found = json.loads((files / "second" / "metrics.json").read_text())
    # The validation file is also a second test set; the first one's translations are reported.
    assert found["test"]["chrf_validation"] == pytest.approx(found["validation"]["eval_chrf"])
    rows = (files / "second" / "predictions.jsonl").read_text().splitlines()
    expected = [json.loads(line)["translation"]["en"] for line in pairs(6, 54).splitlines()]
    assert [json.loads(row)["source"] for row in rows] == expected


@pytest.mark.slow
def test_adapters_on_misaligned_pairs(files):
    first = run(*options(files, num_train_epochs=1, eval_strategy="no", do_predict=False))
    assert first.returncode == 0, first.stderr
    shape = dict.fromkeys(["vocab_size", "d_model", "ffn_dim", "layers", "attention_heads"])
    changes = {
        "model_name_or_path": files / "out",
        "lora_rank": 2,
        "misaligned_fraction": 0.25,
        "output_dir": files / "second",
    }
    out = run(*options(files, **shape, **changes))
    assert out.returncode == 0, out.stderr
    found = json.loads((files / "second" / "metrics.json").read_text())
    assert found["misaligned"]["pairs"] == 12 and 0 <= found["misaligned"]["auc"] <= 1
    assert all(".lora_" in name for name in found["misaligned"]["auc_by_layer"])
    adapters = json.loads((files / "second" / "adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"]) == (2, 4)
    assert not (files / "second" / "model.safetensors").exists()


@pytest.mark.slow
def test_settings_from_a_json_file(files):
    settings = {"source_lang": "en", "target_lang": "de", "output_dir": str(files / "out")}
    test_only = {"test_file": str(files / "test.jsonl"), "do_predict": True, "report_to": "none"}
    path = files / "settings.json"
    path.write_text(json.dumps({**TINY, **settings, **test_only}))
    out = run(path)
    assert out.returncode == 0, out.stderr
    assert (files / "out" / "predictions.jsonl").exists()


def test_help_reads_well():
    out = run("--help")
    assert out.returncode == 0
    assert "\n    python scripts/run_translation.py --train_file" in out.stdout
    for text in ("--source_lang", "fngd_adamw", "Hub id or local folder", "metrics.json"):
        assert text in out.stdout


def broken(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def latin(folder: Path) -> Path:
    path = folder / "latin.jsonl"
    path.write_bytes('{"translation": {"en": "over", "de": "über"}}\n'.encode("latin-1"))
    return path


BAD = {
    "missing file": (
        lambda f: {"train_file": f / "none.jsonl"},
        "there is no file .*check the path",
    ),
    "empty file": (lambda f: {"train_file": broken(f, "e.jsonl", "")}, "is empty: give a file"),
    "no JSON": (lambda f: {"train_file": broken(f, "x.jsonl", "one\ntwo\n")}, "is not JSON lines"),
    "other kind of file": (lambda f: {"train_file": broken(f, "x.csv", "a,b\n")}, "is no .json"),
    "no translation column": (
        lambda f: {"train_file": broken(f, "x.jsonl", '{"en": "a", "de": "b"}\n')},
        "no `translation`: rows must look like",
    ),
    "wrong language": (
        lambda f: {"target_lang": "fr"},
        "row 0 of the train set has no 'fr' .it has: .*check --target_lang",
    ),
    "row without text": (
        lambda f: {
            "train_file": broken(
                f, "x.jsonl", pairs(3) + '{"translation": {"en": "a", "de": " "}}\n'
            )
        },
        "row 3 of the train set has no text under 'de'",
    ),
    "row with null": (
        lambda f: {
            "validation_file": broken(
                f, "x.jsonl", pairs(1) + '{"translation": {"en": null, "de": "b"}}\n'
            )
        },
        "row 1 of the validation set has no text under 'en'",
    ),
    "no rows left": (lambda f: {"max_train_samples": 0}, "the train set has no rows"),
    "no training data": (
        lambda f: {"train_file": None},
        "--do_train needs training pairs: give --train_file",
    ),
    "no such data set": (
        lambda f: {"dataset_name": "nobody/nothing", "train_file": None},
        "cannot load the data set 'nobody/nothing'",
    ),
    "adapters on nothing": (
        lambda f: {"lora_rank": 4},
        "--lora_rank adapts a trained model: give --model_name_or_path",
    ),
    "misaligned": (lambda f: {"misaligned_fraction": 2}, "must be in .0, 1., not 2"),
    "second test set": (
        lambda f: {"extra_test_file": f / "test.jsonl"},
        "--extra_test_file: a second test set is called 'test'",
    ),
    "no such model": (
        lambda f: {"model_name_or_path": f / "no-model"},
        "cannot load --model_name_or_path",
    ),
    "unknown optim_args": (lambda f: {"optim_args": "dampnig=1"}, "did you mean 'damping'"),
    "damping zero": (lambda f: {"optim_args": "damping=0"}, "damping must be .*above 0, not 0"),
    "damping no number": (lambda f: {"optim_args": "damping=x"}, "damping='x' must be a number"),
    "damaged gz": (lambda f: {"train_file": broken(f, "x.jsonl.gz", "no")}, "or a damaged .gz"),
    "not UTF-8": (lambda f: {"train_file": latin(f)}, "the train set is not UTF-8, convert it"),
    "output is a file": (lambda f: {"output_dir": broken(f, "o", "")}, "is a file: choose a"),
    "settings contradict": (
        lambda f: {"save_strategy": "epoch", "eval_strategy": "no", "load_best_model_at_end": True},
        "error: --load_best_model_at_end requires",
    ),
    "no layer": (lambda f: {"optim_target_modules": "none"}, "no layer matches .*can be chosen"),
}


@pytest.fixture(scope="module")
def script():
    """The script as a module, to spare a process for each mistake."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("run_translation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_with_a_way_out_and_nothing_is_lost(
    case, files, script, monkeypatch, capsys
):
    changes, message = BAD[case]
    kept = files / "out" / "metrics.json"
    kept.parent.mkdir()
    kept.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["run_translation.py", *options(files, **changes(files))])
    assert script.cli() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run_translation: error: ")
    assert re.search(message, line), line
    assert kept.read_text() == "mine"
    assert [p.name for p in kept.parent.iterdir()] == ["metrics.json"]


@pytest.mark.slow
def test_exit_code_of_the_process(files):
    out = run(*options(files, train_file=files / "none.jsonl"))
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr.startswith("run_translation: error: --train_file: there is")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{not json", "Expecting property name"),
        ('{"lerning_rate": 1}', "lerning_rate"),
        ("{}", "missing .* 'source_lang'"),
    ],
    ids=["missing", "broken", "unknown name", "incomplete"],
)
def test_settings_file_that_cannot_be_used(text, message, tmp_path, script, monkeypatch, capsys):
    path = tmp_path / "settings.json"
    if text is not None:
        full = {"source_lang": "en", "target_lang": "de", "output_dir": str(tmp_path / "out")}
        known = text if text[1] != '"' else json.dumps({**full, **json.loads(text)})
        path.write_text(known)
    monkeypatch.setattr(sys, "argv", ["run_translation.py", str(path)])
    assert script.cli() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"run_translation: error: cannot use '{path}': .*{message}", line), line
    assert not (tmp_path / "out").exists()


def test_flags_come_before_the_settings_file(tmp_path, script, monkeypatch):
    path = tmp_path / "settings.json"
    settings = {"source_lang": "en", "target_lang": "de", "do_train": True, "optim": "fngd"}
    path.write_text(json.dumps({**settings, "output_dir": "runs/a", "learning_rate": 2e-3}))
    words = [str(path), "--optim", "adamw_torch", "--output_dir", str(tmp_path), "--do_eval"]
    monkeypatch.setattr(sys, "argv", ["run_translation.py", *words, "--do_train", "False"])
    *_, args = script.parse([script.DataArguments, script.Seq2SeqTrainingArguments], None)
    assert (args.optim, args.output_dir, args.learning_rate) == ("adamw_torch", str(tmp_path), 2e-3)
    assert args.do_eval and not args.do_train
    monkeypatch.setattr(sys, "argv", ["run_translation.py", str(path), "--lerning_rate", "1"])
    with pytest.raises(SystemExit, match="2"):
        script.parse([script.DataArguments, script.Seq2SeqTrainingArguments], None)


@pytest.mark.slow
def test_what_a_trained_model_is_asked_for_later(files):
    """Longer sequences than it takes are refused; translating only leaves its card alone."""
    first = options(files, num_train_epochs=1, eval_strategy="no", test_file=None)
    assert run(*first).returncode == 0
    card = (files / "out" / "README.md").read_text()
    assert "On the validation set: validation.jsonl." in card and "train.jsonl" in card
    again = {"model_name_or_path": files / "out", "optim": "adamw_torch", "optim_args": None}
    out = run(*options(files, **again, max_target_length=17))
    assert out.returncode == 2 and "takes 16 tokens at most, not 17: lower" in out.stderr
    out = run(*options(files, **again, do_train=False, do_eval=False, eval_strategy="no"))
    assert out.returncode == 0, out.stderr
    assert (files / "out" / "predictions.jsonl").exists()
    assert (files / "out" / "README.md").read_text() == card


@pytest.mark.slow
def test_fine_tunes_another_architecture(files):
    folder = files / "byt5"
    ByT5Tokenizer().save_pretrained(folder)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=384, **size, **special)).save_pretrained(folder)
    out = run(*options(files, model_name_or_path=folder, source_prefix="translate: "))
    assert out.returncode == 0, out.stderr
    found = json.loads((files / "out" / "metrics.json").read_text())
    chosen = [row[0] for row in found["optimizer"]["layers"] if "chosen" in row]
    assert "decoder.block.0.layer.1.EncDecAttention.q" in chosen


def test_push_sends_the_card_with_the_results(files, script, monkeypatch):
    sent = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, folder_path, **_):
            sent.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(hf_fngd.report.hub, "_fetch_card", lambda *_: None)
    quick = {"num_train_epochs": 1, "eval_strategy": "no", "do_eval": False, "push_to_hub": True}
    monkeypatch.setattr(sys, "argv", ["run_translation.py", *options(files, **quick)])
    assert script.cli() == 0
    (card,) = sent
    assert "| this model |" in card and "unknown dataset" not in card


@pytest.mark.slow
def test_model_without_a_sequence_to_sequence_head(files):
    folder = files / "bert"
    first = options(files, num_train_epochs=1, eval_strategy="no", do_predict=False, do_eval=False)
    assert run(*first).returncode == 0
    # Its tokenizer, with an encoder beside it.
    AutoTokenizer.from_pretrained(files / "out").save_pretrained(folder)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=70, intermediate_size=8, **size)).save_pretrained(folder)
    out = run(*options(files, model_name_or_path=folder))
    assert out.returncode == 2
    assert "has no sequence-to-sequence head: choose" in out.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_resume_with_other_data_or_settings_is_refused(files):
    saving = {"save_strategy": "epoch", "do_predict": False, "do_eval": False}
    quiet = {"eval_strategy": "no", "num_train_epochs": 1, "model_name_or_path": None}
    first = run(*options(files, **saving, **quiet))
    assert first.returncode == 0, first.stderr
    again = {**saving, "eval_strategy": "no", "num_train_epochs": 2}
    checkpoint = {"resume_from_checkpoint": files / "out" / "checkpoint-3"}
    out = run(*options(files, **again, **checkpoint, optim_args="damping=0.5,update_scale=rms"))
    assert out.returncode == 2
    assert "was written with damping=0.1, this run has damping=0.5" in out.stderr
    other = broken(files, "other.jsonl", pairs(48, start=100))
    shared = {"vocab_size": 200}
    out = run(*options(files, **{**again, **checkpoint, **shared, "train_file": other}))
    assert out.returncode == 2, out.stderr
    assert (
        "run_translation: error: the checkpoint's coefficients belong to other data" in out.stderr
    )


@pytest.mark.feature("Scripts under `torchrun`", "works", "every row is scored once")
@pytest.mark.slow
def test_two_processes_score_every_row_once(files):
    """Seq2SeqTrainer leaves in the rows that fill up the last batch of a process."""
    words = options(files, average_start=0.5, per_device_eval_batch_size=4)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out = run(*words, launcher=launcher)
    assert out.returncode == 0, out.stderr
    folder = files / "out"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["averaging"]["points"] > 1
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 6
    # One process finds the same scores for the saved model, which is the average.
    again = options(files, output_dir=files / "again", eval_strategy="no", do_train=False)
    out = run(*again, "--model_name_or_path", folder)
    assert out.returncode == 0, out.stderr
    single = json.loads((files / "again/metrics.json").read_text())
    for split, name in (("validation", "eval_chrf"), ("test", "test_chrf")):
        assert single[split][name] == pytest.approx(found[split][name], rel=1e-6)
