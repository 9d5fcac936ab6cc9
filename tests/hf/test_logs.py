"""The `fngd/...` series reach `trainer_state.json`, TensorBoard, trackio and wandb."""

import contextlib
import json
import sqlite3
import sys

import pytest
from transformers import Seq2SeqTrainer

from hf_fngd import FNGDSeq2SeqTrainer
from tests.hf_utils import arguments, make_trainer, token_pairs

EXPECTED = {
    "fngd/reusing",
    "fngd/epoch",
    "fngd/damping",
    "fngd/layers",
    "fngd/layers_dropped",
    "fngd/gram_seconds",
    "fngd/clipped",
    "fngd/nonfinite",
    "fngd/fallbacks",
}
GAMMA = {"fngd/gamma_mean", "fngd/gamma_min", "fngd/gamma_max"}


@pytest.mark.feature(
    "`max_grad_norm`", "works", "clips the natural gradient; `fngd/clipped` says how often"
)
@pytest.mark.parametrize("cls", [FNGDSeq2SeqTrainer, Seq2SeqTrainer], ids=["ours", "stock"])
def test_series_in_state_and_tensorboard(cls, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args = arguments(
        tmp_path,
        num_train_epochs=2,
        report_to=["tensorboard"],
        eval_strategy="epoch",
        max_grad_norm=1e-3,
    )
    trainer = make_trainer(cls, args, eval_dataset=token_pairs(4, seed=1))
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    training = [entry for entry in history if "loss" in entry]
    assert len(training) == 8
    for entry in training:
        assert entry.keys() >= EXPECTED
        # coefficients are computed in the first epoch, looked up in the second
        assert (entry.keys() >= GAMMA) == (entry["epoch"] <= 1)
        assert ("fngd/reuse_rate" in entry) == (entry["epoch"] > 1)
        assert entry["fngd/clipped"] == 1.0
        assert all(isinstance(v, float) for k, v in entry.items() if k.startswith("fngd/"))
    assert all("fngd/epoch" not in entry for entry in history if "eval_loss" in entry)
    last_collected = training[3]["fngd/gram_seconds"]
    assert last_collected > 0
    assert training[-1]["fngd/gram_seconds"] == last_collected
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in EXPECTED | GAMMA} <= tags


def test_clipping_is_not_reported_where_it_does_not_happen(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, max_grad_norm=1e3))
    trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["fngd/clipped"] for entry in training} == {0.0}


def test_series_in_trackio_without_a_network(tmp_path, monkeypatch):
    # Read when trackio is imported, which trl does as well.
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    changes = {"report_to": ["trackio"], "project": "fngd-logs", "run_name": "one"}
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, num_train_epochs=2, **changes))
    trainer.train()
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "fngd-logs.db")) as database:
        rows = database.execute("SELECT metrics FROM metrics WHERE run_name = 'one'").fetchall()
    written = {}
    for row in (json.loads(text) for (text,) in rows):
        # The last step is written twice: as a step, and with the totals of the run.
        written.setdefault(row["train/global_step"], {}).update(row)
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        series = {name: value for name, value in entry.items() if name.startswith("fngd/")}
        found = {name: written[entry["step"]][f"train/{name}"] for name in series}
        assert series.keys() >= EXPECTED and found == pytest.approx(series)


def test_series_in_wandb_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    changes = {"report_to": ["wandb"], "project": "fngd-logs", "run_name": "one"}
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, num_train_epochs=2, **changes))
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    # A summary has the last value of each series, and those of gamma end with the first epoch.
    last = {}
    for entry in trainer.state.log_history:
        last |= {name: value for name, value in entry.items() if name.startswith("fngd/")}
    assert last.keys() >= EXPECTED | GAMMA
    assert {name: summary[f"train/{name}"] for name in last} == pytest.approx(last)
