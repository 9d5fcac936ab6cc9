"""KFAC, Eva, TENGraD, SENG and the plain rules by one word, in both Trainers and a plain loop."""

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer

from hf_fngd import (
    EvaConfig,
    FNGDConfig,
    FNGDError,
    FNGDSeq2SeqTrainer,
    KFACConfig,
    create_preconditioned_optimizer,
)
from hf_fngd.hf import registry
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.methods import METHODS, OPTIMIZERS
from tests.hf.test_resume import StopAfter
from tests.hf_utils import (
    arguments,
    make_trainer,
    pad_collator,
    same,
    tiny_marian,
    token_pairs,
    weights,
)

# Settings with which each method learns the tiny task, and in which updates are not all alike.
SETTINGS = {
    "kfac": "inverse_period=3,update_period=2,other_lr=1e-2",
    "ekfac": "inverse_period=3,update_period=2,stat_samples=3,other_lr=1e-2",
    "eva": "other_lr=1e-2",
    "tengrad": "update_period=5,other_lr=1e-2",
    "seng": "update_period=5,sketch_size=8,big_layer_size=300,other_lr=1e-2",
    "plain": "other_lr=1e-2",
    "muon": "other_lr=1e-2",
    "muon_soap": "other_lr=3e-2",
}
RATES = {
    "kfac": 0.3,
    "ekfac": 0.3,
    "eva": 0.3,
    "tengrad": 0.1,
    "seng": 0.1,
    "plain": 0.1,
    "muon": 0.02,
    "muon_soap": 0.03,
}
NAMES = pytest.mark.parametrize("name", SETTINGS)
PRECONDITIONED = pytest.mark.parametrize("name", ["kfac", "ekfac", "eva", "tengrad", "seng"])
BOTH = pytest.mark.parametrize("cls", [FNGDSeq2SeqTrainer, Seq2SeqTrainer], ids=["ours", "stock"])


def run(cls, folder, name, *, stop=None, resume=None, settings=None, **changes):
    args = arguments(
        folder,
        optim=name,
        optim_args=settings or SETTINGS[name],
        learning_rate=RATES[name],
        seed=7,
        **changes,
    )
    trainer = make_trainer(cls, args, callbacks=[StopAfter(stop)] if stop else [])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@NAMES
@BOTH
def test_marian_learns_in_the_trainer(cls, name, tmp_path):
    trainer = run(cls, tmp_path, name, num_train_epochs=10)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    assert type(unwrap_optimizer(trainer.optimizer)) is OPTIMIZERS[name][0]


class SmallCNN(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, stride=2, groups=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(72, 4),
        )


@pytest.mark.parametrize("method", METHODS)
def test_cnn_learns_in_a_plain_loop(method):
    model = SmallCNN()
    inputs = torch.randn(64, 1, 8, 8)
    classes = (inputs[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (inputs[:, 0, 4:].mean((1, 2)) > 0)
    settings = {} if method == "plain" else {"damping": 1.0}
    optimizer = create_preconditioned_optimizer(
        model, method=method, lr=0.1, other_lr=1e-2, **settings
    )
    losses = []
    for epoch in range(12):
        optimizer.start_epoch(epoch)
        for rows in torch.randperm(64).split(16):
            optimizer.set_batch(sample_ids=rows)
            loss = nn.functional.cross_entropy(model(inputs[rows]), classes[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


@pytest.mark.parametrize("method", METHODS)
def test_marian_learns_in_a_plain_loop(method):
    model, rows = tiny_marian(), token_pairs(32)
    options = {"share": "none", "update_scale": "none"} if method == "fngd" else {}
    optimizer = create_preconditioned_optimizer(
        model, method=method, lr=0.1, other_lr=1e-2, **options
    )
    losses = []
    for step in range(40):
        batch = pad_collator([rows[i] for i in range(8 * (step % 4), 8 * (step % 4) + 8)])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@NAMES
@pytest.mark.slow
def test_resumed_run_is_bit_identical(name, tmp_path):
    whole = run(FNGDSeq2SeqTrainer, tmp_path / "whole", name)
    for stop in (1, 7):
        folder = tmp_path / f"cut{stop}"
        run(FNGDSeq2SeqTrainer, folder, name, stop=stop)
        checkpoint = str(folder / f"checkpoint-{stop}")
        again = run(FNGDSeq2SeqTrainer, folder, name, resume=checkpoint)
        assert same(weights(whole.model), weights(again.model)), f"stopped after step {stop}"


def test_another_method_does_not_resume(tmp_path):
    run(FNGDSeq2SeqTrainer, tmp_path, "kfac", stop=2)
    with pytest.raises(FNGDError, match="is not Eva's"):
        run(FNGDSeq2SeqTrainer, tmp_path, "eva", resume=str(tmp_path / "checkpoint-2"))
    with pytest.raises(FNGDError, match="inverse_period=3, this run has inverse_period=10"):
        run(
            FNGDSeq2SeqTrainer,
            tmp_path,
            "kfac",
            resume=str(tmp_path / "checkpoint-2"),
            settings="update_period=2",
        )


@PRECONDITIONED
def test_logs(name, tmp_path):
    trainer = run(FNGDSeq2SeqTrainer, tmp_path, name)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    updates = [entry[f"{name}/updates"] for entry in entries]
    period = {"kfac": 2, "ekfac": 2, "eva": 1, "tengrad": 5, "seng": 5}[name]
    assert updates == [1 + step // period for step in range(len(entries))]
    assert entries[-1][f"{name}/layers"] == 16 and entries[-1][f"{name}/nonfinite"] == 0
    assert (f"{name}/kl_scale" in entries[-1]) == (name in ("kfac", "eva"))
    assert not any(key.startswith("fngd/") for key in entries[-1])


@pytest.mark.parametrize("name", ["kfac", "ekfac", "eva"])
def test_accumulation_has_the_scale_of_one_batch(name, tmp_path):
    """Gradients of single samples are the same, however many micro-batches an update has."""
    seen = []
    for batch, steps in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path,
            optim=name,
            optim_args="damping_mode=absolute,damping=0.5",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        trainer = make_trainer(FNGDSeq2SeqTrainer, args, model=tiny_marian(dropout=0.0))
        trainer.train()
        seen.append([layer.state["g"] for layer in unwrap_optimizer(trainer.optimizer).layers])
    for whole, parts in zip(*seen, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-7)


def test_settings_by_config(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    trainer = make_trainer(FNGDSeq2SeqTrainer, args, fngd_config=KFACConfig(damping=0.3))
    optimizer = trainer.create_optimizer()
    assert optimizer.method == "kfac" and optimizer.config.damping == 0.3
    args = arguments(tmp_path, optim="kfac", optim_args=None)
    with pytest.raises(FNGDError, match="--optim kfac needs a KFACConfig, fngd_config is a FNGDC"):
        make_trainer(FNGDSeq2SeqTrainer, args, fngd_config=FNGDConfig())
    with pytest.raises(FNGDError, match="takes config=FNGDConfig.*, not a EvaConfig"):
        METHODS["fngd"]([], module=tiny_marian(), config=EvaConfig())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "kfac",
            "update_periods=3",
            "'update_periods' is not a setting of KFAC: did you mean 'update_period'",
        ),
        ("kfac", "update_period=0", "update_period must be a whole number at least 1"),
        ("kfac", "kfac_approx=extend", r"did you mean 'expand'"),
        ("eva", "share=sample", "'share' is not a setting of Eva"),
        ("eva", "stat_decay=1", "stat_decay must be a finite number at least 0 and below 1"),
        ("kfac", "kl_clip=0", "kl_clip must be a finite number above 0"),
        ("kfac", "kl_clip=norm", "kl_clip='norm' must be a number or none"),
        (
            "tengrad",
            "rank_threshold=0.5",
            "rank_threshold is not a setting of TENGraD: the inverse",
        ),
        ("tengrad", "fisher_labels=true", "choose from empirical, sampled"),
        ("seng", "sketch_size=1.5", "sketch_size='1.5' must be a whole number"),
        ("muon", "update_rule=sgd", "muon stands for update_rule=muon, and update_rule=sgd"),
    ],
)
def test_bad_settings_are_named(name, text, message, tmp_path):
    with pytest.raises(FNGDError, match=message):
        registry.config_from_args(arguments(tmp_path, optim=name, optim_args=text))


def test_unknown_method_is_named():
    with pytest.raises(FNGDError, match="method='adahess' is unknown: choose from fngd, kfac"):
        create_preconditioned_optimizer(tiny_marian(), method="adahess", lr=0.1)
    with pytest.raises(FNGDError, match="'shares' is not a setting of FNGD: did you mean 'share'"):
        create_preconditioned_optimizer(tiny_marian(), method="fngd", lr=0.1, shares="none")


def test_sketch_larger_than_layers_is_said_once(caplog):
    create_preconditioned_optimizer(SmallCNN(), method="seng", lr=0.1, sketch_size=15)
    lines = [r.getMessage() for r in caplog.records if "sketch_size" in r.getMessage()]
    assert lines == ["SENG: in 2 of 3 layers sketch_size=15 is no less than the layer: no sketch"]
