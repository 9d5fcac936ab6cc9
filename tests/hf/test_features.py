"""FNGD together with fp16 scaling, searches, several optimizers, averaged weights and 4 ranks."""

import copy
import json

import pytest
import torch
from torch import nn

from hf_fngd import FNGDSeq2SeqTrainer, create_fngd_optimizer
from tests.hf.test_ddp import LAUNCHERS
from tests.hf.test_runner import BATCHES, SCRIPT, SETTINGS, run
from tests.hf_utils import arguments, make_trainer, tiny_marian, weights

ROWS = 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(epochs):
    torch.manual_seed(1)
    inputs, classes = torch.randn(ROWS, 4), torch.arange(ROWS) % 3
    for epoch in range(epochs):
        for rows in torch.arange(ROWS).split(4):
            yield epoch, rows, inputs[rows], classes[rows]


def step(model, optimizer, scaler, epoch, rows, inputs, classes, factor=1.0):
    optimizer.start_epoch(epoch)
    optimizer.set_batch(rows)
    loss = nn.functional.cross_entropy(model(inputs * factor), classes)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def test_loss_scale_of_fp16_changes_nothing():
    found = []
    for enabled in (False, True):
        model = network()
        optimizer = create_fngd_optimizer(model, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        for batch in batches(3):
            step(model, optimizer, scaler, *batch)
        found.append(weights(model))
        assert optimizer.statistics()["nonfinite"] == 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.feature("fp16 with a GradScaler", "works")
def test_overflow_of_fp16_skips_the_step_and_spares_the_store():
    model = network()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    optimizer.bind_dataset(ROWS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for number, batch in enumerate(batches(1)):
        before = weights(model)
        step(model, optimizer, scaler, *batch, factor=float("inf") if number == 1 else 1.0)
        changed = any(not torch.equal(value, before[n]) for n, value in weights(model).items())
        assert changed == (number != 1)
    assert scaler.get_scale() == 2.0**11
    assert optimizer.statistics()["nonfinite"] == 2  # both layers, in one batch
    table = optimizer.coefficients()
    assert table[:4].isfinite().all() and table[8:].isfinite().all()
    assert table[4:8].isnan().all()  # nothing is kept of the batch that overflowed
    # Its rows get coefficients when they come again.
    for batch in batches(2):
        step(model, optimizer, scaler, *batch)
    assert optimizer.coefficients().isfinite().all()


@pytest.mark.feature("Hyper-parameter search (`model_init`)", "works")
def test_a_search_with_model_init_reads_the_settings_of_every_trial(tmp_path):
    trainer = FNGDSeq2SeqTrainer(
        model_init=lambda: tiny_marian(),
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path)).train_dataset,
        data_collator=make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path)).data_collator,
    )
    found = []
    for damping in (0.01, 1.0, 0.01):
        # What Trainer.hyperparameter_search does between trials.
        trainer.args.optim_args = f"update_scale=rms,damping={damping}"
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "fngd/damping" in e)
        assert entry["fngd/damping"] == damping
        found.append(weights(trainer.model))
    assert all(torch.equal(value, found[2][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.feature("Several optimizers in one process", "works")
def test_several_optimizers_in_one_process():
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def train(pairs):
        for batch in batches(2):
            for model, optimizer in pairs:
                step(model, optimizer, scaler, *batch)
        return [weights(model) for model, _ in pairs]

    def new(share, seed):
        model = network()
        torch.manual_seed(seed)
        nn.init.normal_(model[0].weight)
        return model, create_fngd_optimizer(model, lr=0.1, share=share)

    alone = [train([new("sample", 1)])[0], train([new("layer", 2)])[0]]
    together = train([new("sample", 1), new("layer", 2)])
    for mine, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.feature("EMA (`AveragedModel`)", "works")
def test_exponential_average_of_the_weights():
    model = network()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    expected = copy.deepcopy(weights(model))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for number, batch in enumerate(batches(2)):
        step(model, optimizer, scaler, *batch)
        average.update_parameters(model)
        for name, value in weights(model).items():
            expected[name] = value if number == 0 else expected[name].lerp(value, 0.5)
    for name, value in expected.items():
        torch.testing.assert_close(average.module.get_parameter(name), value)
    assert type(average.module[0]) is nn.Linear


@pytest.mark.feature("DDP, four processes, rows repeated by `even_batches`", "works")
@pytest.mark.slow
def test_four_ranks_agree(tmp_path):
    # 30 rows over 4 ranks of 4: the last round is short, and accelerate repeats rows to fill it.
    four = [*LAUNCHERS["torchrun"][:-1], "4"]
    options = ["--optim", "fngd", "--optim_args", "update_scale=rms", *SETTINGS, *BATCHES]
    out = run(SCRIPT, "--output_dir", str(tmp_path), *options, launcher=(*four, "-m", "hf_fngd"))
    assert out.returncode == 0, out.stderr
    ranks = [torch.load(tmp_path / f"weights{r}.pt", weights_only=True) for r in range(4)]
    assert all(torch.equal(v, other[n]) for other in ranks[1:] for n, v in ranks[0].items())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [e["fngd/reuse_rate"] for e in history if "fngd/reuse_rate" in e] == [1.0, 1.0]
