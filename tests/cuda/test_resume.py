"""A run that is stopped and resumed on a GPU goes on as if nothing had happened."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from hf_fngd import FNGDSeq2SeqTrainer
from tests.cuda.common import (
    CUDA,
    DEVICE,
    ON_GPU,
    VARIANTS,
    Net,
    epochs,
    make,
    relative_error,
    step,
)
from tests.hf_utils import arguments, make_trainer, same, tiny_marian, weights

pytestmark = CUDA


@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_loop_is_bit_identical(name, place, tmp_path):
    """Whatever the device to which the checkpoint was read."""
    batches = list(epochs(3))
    stop = 4
    model = Net().to(DEVICE)
    optimizer = make(model, name)
    for number, (epoch, *batch) in enumerate(batches):
        optimizer.start_epoch(epoch)
        step(model, optimizer, *batch)
        if number + 1 == stop:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, tmp_path / "state.pt")
    expected = copy.deepcopy(model.state_dict())
    optimizer.detach()

    again = Net().to(DEVICE)
    resumed = make(again, name)
    where = "cpu" if place == "cpu" else DEVICE
    saved = torch.load(tmp_path / "state.pt", map_location=where, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for epoch, *batch in batches[stop:]:
        resumed.start_epoch(epoch)
        step(again, resumed, *batch)
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 6:
            control.should_training_stop = control.should_save = True
        return control


@pytest.mark.on_gpu("Resume from a checkpoint")
@pytest.mark.parametrize(
    ("kind", "optim", "settings", "precision"),
    [
        (FNGDSeq2SeqTrainer, "fngd", "share=sample", "float32"),
        (FNGDSeq2SeqTrainer, "fngd", "share=sample", "bf16"),
        (Seq2SeqTrainer, "fngd", "share=sample", "float32"),
        (FNGDSeq2SeqTrainer, "fngd_adamw", "share=layer", "float32"),
        (FNGDSeq2SeqTrainer, "fngd_muon", "share=sample,store_dtype=float16", "float32"),
        (FNGDSeq2SeqTrainer, "muon_soap", None, "float32"),
        (FNGDSeq2SeqTrainer, "kfac", "update_scale=rms", "float32"),
        (FNGDSeq2SeqTrainer, "seng", "update_period=2,update_scale=rms", "bf16"),
    ],
)
def test_trainer(kind, optim, settings, precision, tmp_path):
    changes = {"optim": optim, "optim_args": settings, "seed": 7, "use_cpu": not ON_GPU}
    if precision == "bf16":
        changes["bf16"] = True

    def run(folder, resume=None, **options):
        trainer = make_trainer(kind, arguments(folder, **changes), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", callbacks=[StopAfter()])
    again = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-6"))
    assert again.state.global_step == whole.state.global_step == 12
    if not ON_GPU:
        assert same(weights(whole.model), weights(again.model))
        return
    # Attention and embeddings add up in any order there.
    assert all(p.device.type == "cuda" for p in again.model.parameters())
    bound = 0.05 if "muon" in optim or precision == "bf16" else 5e-3
    error = relative_error(weights(again.model), weights(whole.model), weights(tiny_marian()))
    assert error <= bound
