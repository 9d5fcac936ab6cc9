"""A card compares its run with those that differ in the optimizer alone."""

import copy
import json
import re
from pathlib import Path

import pytest

from tests.scripts.script_utils import script

ROOT = Path(__file__).parents[2]
DEMO = json.loads((ROOT / "model_cards/tatoeba-demo/metrics.json").read_text(encoding="utf-8"))


def save(folder, bleu=None, data=None, **training):
    found = copy.deepcopy(DEMO)
    found["settings"]["training"] |= training
    found["settings"]["data"] |= data or {}
    if bleu is None:
        del found["test"]
    else:
        found["test"]["bleu"] = bleu
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def write():
    with script(ROOT / "scripts/write_card.py") as module:
        yield lambda folder: module.main([str(folder)])


def test_runs_with_another_optimizer_are_named(tmp_path, write):
    mine = save(tmp_path / "mine", 5.0)
    save(tmp_path / "adamw", 7.25, optim="adamw_torch", optim_args=None, learning_rate=1e-3)
    save(tmp_path / "damped", 6.5, optim_args="damping=10")
    save(tmp_path / "muon", 8.5, optim="muon", optim_args="")
    assert write(mine) == 0
    text = (mine / "README.md").read_text()
    assert "| this model | 5.00 |" in text
    assert "| `--optim adamw_torch`, learning_rate 0.001 | 7.25 |" in text
    assert "| `--optim fngd`, optim_args damping=10 | 6.50 |" in text
    assert "| `--optim muon` | 8.50 |" in text
    # The metadata tell of this model alone.
    assert "7.25" not in text.split("---")[1]


def test_local_base_is_told_from_the_hub_where_its_folder_is_gone(tmp_path, write):
    mine = save(tmp_path / "mine", 5.0)
    found = json.loads((mine / "metrics.json").read_text())
    found["settings"]["model"]["model_name_or_path"] = "runs/first"
    found |= {"local_base": "first", "train_rows": 4000}
    found["test"] |= {"bleu_2017": 4.25, "bleu_2017_signature": "a"}
    (mine / "metrics.json").write_text(json.dumps(found))
    assert write(mine) == 0
    text = (mine / "README.md").read_text()
    assert "base_model" not in text and "from a local model, `first`, on Tatoeba sample" in text
    assert "| | bleu | chrf | bleu_2017 |" in text


def table_of_settings(folder):
    text = (folder / "README.md").read_text()
    return dict(
        re.findall(r"^\| (\w+) \| (\S*) \|$", text.split("differ from the defaults")[1], re.M)
    )


def test_settings_are_those_that_differ_from_their_defaults(tmp_path, write):
    words = "damping=0.1,share=sample,update_scale=rms,collect_every=4"
    mine = save(tmp_path / "mine", 5.0, optim_args=words)
    found = json.loads((mine / "metrics.json").read_text())
    found["optimizer"]["config"] |= {"collect_every": 4, "leave_one_out": True, "adam_beta2": 0.98}
    (mine / "metrics.json").write_text(json.dumps(found))
    assert write(mine) == 0
    # Of the settings that a later version does not know, those that the run named.
    assert table_of_settings(mine) == {
        "setting": "value",
        "learning_rate": "0.003",
        "warmup_steps": "100",
        "num_train_epochs": "12",
        "per_device_train_batch_size": "64",
        "damping": "0.1",
        "adam_beta2": "0.98",
        "collect_every": "4",
        "leave_one_out": "True",
    }


def test_settings_of_another_optimizer(tmp_path, write):
    mine = save(tmp_path / "mine", 5.0, optim="sgd", optim_args="momentum=0.9", adam_beta1=0.8)
    found = json.loads((mine / "metrics.json").read_text())
    del found["optimizer"]
    (mine / "metrics.json").write_text(json.dumps(found))
    assert write(mine) == 0
    shown = table_of_settings(mine)
    assert shown["optim_args"] == "momentum=0.9" and shown["adam_beta1"] == "0.8"
    assert not {"optim", "seed", "weight_decay", "optim_target_modules", "bf16"} & shown.keys()


def test_scores_of_any_metric_are_shown(tmp_path, write):
    mine = save(tmp_path / "mine", 5.0)
    found = json.loads((mine / "metrics.json").read_text())
    found["test"]["test_meteor"] = 0.25
    (mine / "metrics.json").write_text(json.dumps(found))
    assert write(mine) == 0
    assert "| | bleu | chrf | meteor |" in (mine / "README.md").read_text()


def test_folder_without_a_run_is_refused(tmp_path, write, capsys):
    with pytest.raises(SystemExit) as caught:
        write(tmp_path)
    assert caught.value.code == 2
    assert "write_card: error: " in capsys.readouterr().err.splitlines()[-1]


def test_other_runs_are_not(tmp_path, write):
    mine = save(tmp_path / "mine", 5.0)
    save(tmp_path / "epochs", 7.25, optim="adamw_torch", num_train_epochs=99)
    save(tmp_path / "seed", 7.25, optim="adamw_torch", seed=77)
    save(tmp_path / "rows", 7.25, optim="adamw_torch", data={"max_train_samples": 3})
    save(tmp_path / "untested", None, optim="adamw_torch")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    assert write(mine) == 0
    text = (mine / "README.md").read_text()
    assert "| this model | 5.00 |" in text and "adamw_torch" not in text and "7.25" not in text
