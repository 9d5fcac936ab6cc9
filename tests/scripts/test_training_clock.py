"""The clock of the scripts counts steps and loading, and neither evaluations nor saves."""

import sys
import time

import pytest
from transformers import Seq2SeqTrainer

from tests.hf.test_runner import ROOT
from tests.hf_utils import arguments, make_trainer, token_pairs


@pytest.fixture(scope="module")
def clock():
    sys.path.insert(0, str(ROOT / "scripts"))
    from common.training import TrainingClock

    yield TrainingClock
    sys.path.remove(str(ROOT / "scripts"))


class Slow(Seq2SeqTrainer):
    """Half a second for every evaluation and save, a twentieth for every step."""

    def evaluation_loop(self, *args, **kwargs):
        time.sleep(0.5)
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        time.sleep(0.5)
        return super()._save_checkpoint(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        time.sleep(0.05)
        return super().training_step(*args, **kwargs)


@pytest.mark.slow
def test_only_training_counts_and_a_resumed_run_goes_on(tmp_path, clock):
    often = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "logging_steps": 1}
    saves = {"save_strategy": "steps", "save_steps": 3}
    rows = token_pairs(8)
    settings = arguments(tmp_path, max_steps=6, **often, **saves)
    first = make_trainer(Slow, settings, eval_dataset=rows)
    first.add_callback(clock())
    started = time.perf_counter()
    first.train()
    spent = time.perf_counter() - started
    history = first.state.log_history
    seconds = [entry["train_seconds"] for entry in history]
    assert seconds == sorted(seconds) and seconds[0] == 0 and "eval_loss" in history[0]
    # Four evaluations and two saves are left out, six steps are not.
    assert 0.3 < seconds[-1] < spent - 6 * 0.5
    pairs = zip(history, history[1:], strict=False)
    paused = [b["train_seconds"] - a["train_seconds"] for a, b in pairs if "eval_loss" in b]
    assert max(paused) < 0.04
    first.evaluate()
    assert first.state.log_history[-1]["train_seconds"] == seconds[-1]
    settings = arguments(tmp_path, max_steps=6, **often, save_strategy="no")
    second = make_trainer(Slow, settings, eval_dataset=rows)
    second.add_callback(clock())
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = [entry["train_seconds"] for entry in second.state.log_history]
    assert again == sorted(again) and again[-1] > seconds[-1] / 2 + 0.1
