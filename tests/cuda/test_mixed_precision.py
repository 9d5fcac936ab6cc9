"""bf16 and fp16 with the real GradScaler: the loss falls, overflow skips a step, epochs reuse."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

from hf_fngd import FNGDConfig, FNGDTrainer
from hf_fngd.hf.callback import unwrap_optimizer
from tests.cuda.common import (
    AMBIGUOUS,
    BATCH,
    CUDA,
    DEVICE,
    LAYERS,
    ON_GPU,
    ROWS,
    VARIANTS,
    Net,
    data_set,
    epochs,
    images,
    make,
    moved,
    only_on_gpu,
    state_of,
    step,
)
from tests.hf_utils import arguments

pytestmark = CUDA
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Muon orthogonalises: a small singular value of other rounding counts in full.
NOT_NEAR = ("fngd muon", "plain muon", *AMBIGUOUS)
# So large that the first gradients of the loss overflow in float16.
TOO_LARGE = 2.0**22


class Cast(Net):
    """Runs in low precision by itself, so that `step` needs no context."""

    dtype: torch.dtype

    def forward(self, x, labels=None):
        with torch.autocast(DEVICE.type, self.dtype):
            return super().forward(x, labels).float()


def build(dtype: str) -> Cast:
    model = Cast().to(DEVICE)
    model.dtype = DTYPES[dtype]
    return model


@pytest.mark.on_gpu("bf16 autocast")
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in NOT_NEAR])
def test_bf16_steps_are_near_those_of_float32(name):
    ways = []
    for model in (Net().to(DEVICE), build("bf16")):
        start = state_of(model)
        optimizer = make(model, name, lr=0.005)
        for epoch, *batch in epochs(2):
            optimizer.start_epoch(epoch)
            step(model, optimizer, *batch)
        ways.append(moved(model, start))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    flat = [torch.cat([w.flatten() for w in one.values()]) for one in ways]
    assert torch.cosine_similarity(*flat, dim=0) > 0.9


@pytest.mark.on_gpu("fp16 with a GradScaler")
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_loop_in_fp16_with_a_gradscaler(name):
    model = build("fp16")
    optimizer = make(model, name, lr=2e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=TOO_LARGE, growth_interval=10**6)
    losses, skipped = [], 0
    for epoch, rows, inputs, labels in epochs(8):
        optimizer.start_epoch(epoch)
        optimizer.set_batch(rows)
        if optimizer.needs_loss_scale:
            optimizer.set_loss_scale(1, scaler.get_scale())
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        before, scale = state_of(model), scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if scaler.get_scale() < scale:
            skipped += 1
            assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert 1 <= skipped <= 12
    assert all(p.isfinite().all() for p in model.parameters())
    losses = torch.stack(losses)
    assert losses[-3:].mean() < losses[:3].mean()
    if optimizer.needs_rows:
        # Rows whose first steps were skipped got their coefficients in a later epoch.
        assert optimizer.coefficients().isfinite().all()
        assert optimizer.reuse_rate == 1.0 or "refreshed" in name


def test_fp16_steps_are_near_those_of_float32():
    for name in ("fngd sgd", "fngd none", "kfac expand eigen", "eva", "seng"):
        ways = []
        for model in (Net().to(DEVICE), build("fp16")):
            start = state_of(model)
            optimizer = make(model, name, lr=0.005)
            low = isinstance(model, Cast)
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, enabled=low)
            for epoch, rows, inputs, labels in epochs(2):
                optimizer.start_epoch(epoch)
                optimizer.set_batch(rows)
                optimizer.set_loss_scale(1, scaler.get_scale())
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            ways.append(moved(model, start))
        flat = [torch.cat([w.flatten() for w in one.values()]) for one in ways]
        assert torch.cosine_similarity(*flat, dim=0) > 0.98, name


@pytest.fixture
def _own_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=only_on_gpu)])
def test_accelerate_loop(precision, _own_state):
    scaling = [GradScalerKwargs(init_scale=TOO_LARGE)] if precision == "fp16" else []
    accelerator = Accelerator(cpu=not ON_GPU, mixed_precision=precision, kwargs_handlers=scaling)
    inputs, classes = images()
    data = TensorDataset(torch.arange(ROWS), inputs.float(), classes)
    net = Net()
    fngd = make(net, "fngd sgd", lr=2e-3)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, fngd, loader)
    losses, skipped = [], 0
    for epoch in range(8):
        fngd.start_epoch(epoch)
        for rows, x, y in loader:
            fngd.set_batch(sample_ids=rows)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            skipped += optimizer.step_was_skipped
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert (skipped > 0) == (precision == "fp16") and skipped <= 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert fngd.coefficients().isfinite().all() and fngd.reuse_rate == 1.0


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_on_gpu)])
@pytest.mark.parametrize(
    "optim", ["fngd", "fngd_adamw", "fngd_muon", "kfac", "muon", "muon_soap", "config"]
)
@pytest.mark.parametrize("kind", [Trainer, FNGDTrainer], ids=["stock", "ours"])
def test_trainer(kind, optim, precision, tmp_path):
    given = {}
    if optim == "config":
        if kind is Trainer:
            pytest.skip("a stock Trainer takes no config")
        given = {"fngd_config": FNGDConfig(damping=0.5)}
    args = arguments(
        tmp_path,
        optim="adamw_torch" if optim == "config" else optim,
        optim_args=None,
        learning_rate=2e-3,
        num_train_epochs=8,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        use_cpu=not ON_GPU,
        **{precision: True},
    )
    trainer = kind(model=Net(), args=args, train_dataset=data_set(), **given)
    if precision == "fp16":
        scaler = trainer.accelerator.scaler
        trainer.accelerator.scaler = type(scaler)(init_scale=TOO_LARGE, growth_interval=10**6)
    trainer.train()
    assert all(
        p.isfinite().all() and p.device.type == DEVICE.type for p in trainer.model.parameters()
    )
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-3:]) < sum(losses[:3])
    if precision == "fp16":
        assert 2.0**10 <= trainer.accelerator.scaler.get_scale() < TOO_LARGE
    if optim.startswith("fngd") or optim == "config":
        assert [entry["fngd/reusing"] for entry in history] == [0.0] * 3 + [1.0] * 21
        assert history[-1]["fngd/reuse_rate"] == 1.0
        assert history[-1]["fngd/layers"] == len(LAYERS)
        assert (history[-1]["fngd/nonfinite"] > 0) == (precision == "fp16")
        assert unwrap_optimizer(trainer.optimizer).coefficients().isfinite().all()
