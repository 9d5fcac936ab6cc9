"""scripts/README.md says what the settings files and the committed runs say."""

import json
import re

import pytest

from tests.hf.test_runner import ROOT

PAGE = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
RUNS = sorted(path.parent.name for path in (ROOT / "model_cards").glob("*/metrics.json"))


@pytest.mark.parametrize("name", RUNS)
def test_row_of_a_committed_run(name):
    (row,) = (line for line in PAGE.splitlines() if f"[{name}]" in line)
    found = json.loads((ROOT / "model_cards" / name / "metrics.json").read_text())
    command = found["environment"]["command"]
    score = row.split("|")[4].strip()
    if "test" not in found:
        assert score == "no test set"
    elif "test_bleu" in found["test"]:
        assert score == f"{found['test']['test_bleu']:.2f} BLEU"
    else:
        assert score == f"{found['test']['test_accuracy']:.2f} accuracy"
    # The page's commands are in quotes and lines as people write them.
    plain = " ".join(re.sub(r'["\\]', "", PAGE).split())
    assert command in plain or command.endswith("scripts/demo.json")


def test_every_script_and_settings_file_is_named():
    folder = ROOT / "scripts"
    names = [path.name for kind in ("run_*.py", "*.json") for path in folder.glob(kind)]
    assert len(names) > 10
    assert [name for name in names if name not in PAGE] == []


def test_every_data_file_is_named():
    for path in (ROOT / "scripts").glob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        files = [settings.get(f"{split}_file") for split in ("train", "validation", "test")]
        for file in filter(None, [*files, *settings.get("extra_test_file", [])]):
            folder, _, name = file.rpartition("/")
            rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{folder}` |")]
            assert folder.startswith("scripts/data/") or f"`{name}`" in rows[0]
