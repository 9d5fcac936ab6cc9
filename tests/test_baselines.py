"""A card compares its run with those that differ in the optimizer alone."""

import copy
import json
from pathlib import Path

import pytest

from tests.script_utils import script

ROOT = Path(__file__).parents[1]
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
