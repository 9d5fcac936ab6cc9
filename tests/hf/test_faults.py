"""Runs that were killed, and files that are damaged: the same run goes on, or a clear refusal."""

import json
import logging
import os
import shutil

import pytest
import torch

from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from tests.hf.test_runner import ROOT, run
from tests.hf_utils import arguments, make_trainer, same, weights

KILLS = 12


@pytest.mark.feature(
    "Killed while training or saving",
    "works",
    "`resume_from_checkpoint=True` finds the last whole checkpoint",
)
@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    script = str(ROOT / "tests/hf/kill_runner.py")
    out = run(str(tmp_path), str(KILLS), str(seed), launcher=(script,))
    assert out.returncode == 0, out.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == KILLS
    wrong = [one for one in report if one["code"] or not one["same"]]
    assert not wrong, (seed, wrong)
    written = [one["left"].values() for one in report if one["saving"]]
    assert len(written) == KILLS // 4 and not any(all(wholes) for wholes in written), written


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with a checkpoint after each of the last ones, and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(folder, **settings))
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def resume(folder, checkpoint):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(folder))
    trainer.train(resume_from_checkpoint=checkpoint)
    return weights(trainer.model)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_unfinished_checkpoint_is_passed_over(damage, folder, finished, caplog):
    state = folder / "checkpoint-12" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        cut(state)
    else:
        state.write_text("")
    with pytest.raises(FNGDError, match="checkpoint-12' was not written to its end .*earlier one"):
        resume(folder, str(folder / "checkpoint-12"))
    with caplog.at_level(logging.WARNING):
        assert same(resume(folder, True), finished[1])
    assert "checkpoint-12 was not written to its end; skipping it" in caplog.text


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(FNGDError, match="there is no checkpoint in '.*': start without resume"):
        resume(tmp_path, True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(FNGDError, match="no checkpoint in '.*' but unfinished ones: start without"):
        resume(tmp_path, True)
    with pytest.raises(FNGDError, match="there is no checkpoint '.*checkpoint-4': check the path"):
        resume(tmp_path, str(tmp_path / "checkpoint-4"))


@pytest.mark.feature("Damaged checkpoint", "refused", "resume from another")
@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_damaged_file_is_refused(name, damage, folder):
    path = folder / "checkpoint-8" / name
    if damage == "cut":
        cut(path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"no such thing" * 99)
    with pytest.raises(FNGDError, match=r"checkpoint-8' cannot be read \(.+\): a file .* damaged"):
        resume(folder, str(folder / "checkpoint-8"))


def test_code_in_a_checkpoint_is_not_run(folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "trapped"),)

    state = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
    torch.save({**state, "fngd": Trap()}, folder / "checkpoint-8" / "optimizer.pt")
    with pytest.raises(FNGDError, match="cannot be read"):
        resume(folder, str(folder / "checkpoint-8"))
    assert not (folder / "trapped").exists()
