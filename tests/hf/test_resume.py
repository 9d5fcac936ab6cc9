"""A run stopped after any step and resumed ends with the uninterrupted run's bits."""

import pytest
import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from tests.hf_utils import arguments, make_trainer, same, token_pairs, weights

STEPS = 12  # 3 epochs of 4 steps
SETTINGS = [
    "share=sample",
    "share=sample,update_rule=adamw,store_dtype=float16",
    "share=layer,update_rule=muon",
    "share=layer,refresh_every=2",
    "share=none,momentum=0.5",
]


class StopAfter(TrainerCallback):
    """End a run with a checkpoint after some steps; the uninterrupted run writes none."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step >= self.step
        return control


def run(cls, folder, settings, *, stop=None, resume=None, **changes):
    args = arguments(
        folder,
        optim_args=f"update_scale=rms,{settings}",
        seed=7,
        **changes,
    )
    callbacks = [StopAfter(stop)] if stop else []
    trainer = make_trainer(cls, args, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.feature("Resume from a checkpoint", "works", "same bits on a CPU")
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        pytest.param(cls, settings, marks=[] if settings == SETTINGS[0] else pytest.mark.slow)
        for cls, settings in [
            *((FNGDSeq2SeqTrainer, one) for one in SETTINGS),
            (Seq2SeqTrainer, SETTINGS[0]),
        ]
    ],
    ids=[*SETTINGS, "stock-trainer"],
)
def test_resumed_run_is_bit_identical(cls, settings, tmp_path):
    whole = run(cls, tmp_path / "whole", settings)
    assert whole.state.global_step == STEPS
    # within the first epoch, at its end, within a later one
    for stop in (1, 4, 6):
        folder = tmp_path / f"cut{stop}"
        run(cls, folder, settings, stop=stop)
        again = run(cls, folder, settings, resume=str(folder / f"checkpoint-{stop}"))
        assert again.state.global_step == STEPS
        assert same(weights(whole.model), weights(again.model)), f"stopped after step {stop}"


@pytest.mark.feature("Coefficients in a file (`store_dir`)", "works", "nothing of it stays behind")
@pytest.mark.slow
def test_run_with_coefficients_in_a_file(tmp_path):
    whole = run(FNGDSeq2SeqTrainer, tmp_path / "whole", "share=sample")
    (tmp_path / "store").mkdir()
    places = ["share=sample", f"share=sample,store_dir={tmp_path / 'store'}"]
    for number, (first, second) in enumerate([places, places[::-1]]):
        folder = tmp_path / f"cut{number}"
        run(FNGDSeq2SeqTrainer, folder, first, stop=6)
        again = run(FNGDSeq2SeqTrainer, folder, second, resume=str(folder / "checkpoint-6"))
        assert same(weights(whole.model), weights(again.model))
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.feature(
    "Gradient accumulation, short last window", "works", "coefficients per micro-batch"
)
def test_accumulation_and_a_short_last_window(tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    whole = run(FNGDSeq2SeqTrainer, tmp_path / "whole", "share=sample", **options)
    run(FNGDSeq2SeqTrainer, tmp_path / "cut", "share=sample", stop=2, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    again = run(FNGDSeq2SeqTrainer, tmp_path / "cut", "share=sample", resume=checkpoint, **options)
    assert same(weights(whole.model), weights(again.model))


@pytest.mark.feature("Checkpoints without pickle (`weights_only=True`)", "works")
def test_checkpoint_is_readable_without_pickle(tmp_path):
    run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", stop=5)
    state = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert state["fngd"]["epoch"] == 1
    assert state["fngd"]["store"]["table"].shape == (30, 16)


@pytest.mark.feature("Resume with other data or settings", "refused")
def test_other_data_is_refused(tmp_path):
    run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", stop=5)
    checkpoint = str(tmp_path / "checkpoint-5")
    args = arguments(tmp_path, optim_args="update_scale=rms,share=sample")
    for data in (token_pairs(30, seed=5), token_pairs(29)):
        trainer = make_trainer(FNGDSeq2SeqTrainer, args, train_dataset=data)
        with pytest.raises(FNGDError, match="belong to other data.*resume with the same data"):
            trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("share=sample,damping=0.5", "damping=1.0, this run has damping=0.5"),
        ("share=layer", "share=sample, this run has share=layer"),
        ("share=sample,target_modules=fc1|fc2", "other selected layers"),
    ],
)
def test_other_settings_are_refused(settings, message, tmp_path):
    run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", stop=5)
    with pytest.raises(FNGDError, match=message):
        run(FNGDSeq2SeqTrainer, tmp_path, settings, resume=str(tmp_path / "checkpoint-5"))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    plain = {"optim": "adamw_torch", "optim_args": None, "save_strategy": "steps", "save_steps": 1}
    make_trainer(Seq2SeqTrainer, arguments(tmp_path, max_steps=2, **plain)).train()
    with pytest.raises(FNGDError, match="is not FNGD's"):
        run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.feature("`save_only_model`", "works", "coefficients are computed anew after a resume")
def test_save_only_model_recomputes_what_is_missing(tmp_path, caplog):
    run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", stop=5, save_only_model=True)
    checkpoint = str(tmp_path / "checkpoint-5")
    again = run(FNGDSeq2SeqTrainer, tmp_path, "share=sample", resume=checkpoint)
    assert again.state.global_step == STEPS
    rates = {
        e["step"]: e["fngd/reuse_rate"]
        for e in again.state.log_history
        if "loss" in e and e["step"] > 5
    }
    # Rows met after the checkpoint are known again in the next epoch, those before it are not.
    assert rates[6] == 0.0 and 0.7 < rates[STEPS] < 1.0
    assert "have stored coefficients" in caplog.text
