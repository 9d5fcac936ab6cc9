"""What the tests that need a GPU share: the device, a small model of every layer type, its data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.methods import create_preconditioned_optimizer
from hf_fngd.optimizer import LayerOptimizer

# HF_FNGD_TEST_DEVICE=cpu runs what a CPU can run, to check the tests themselves.
DEVICE = torch.device(os.environ.get("HF_FNGD_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
# For `pytestmark`: every test of this folder has both.
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(),
        reason="needs a GPU that torch can use (HF_FNGD_TEST_DEVICE=cpu runs what a CPU can)",
    ),
]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing like it")

ROWS, BATCH, CLASSES = 12, 4, 3
# Optimizers by name; `method` and fields of its config.
VARIANTS: dict[str, dict[str, Any]] = {
    "fngd sgd": {"method": "fngd"},
    "fngd sgd unscaled": {"method": "fngd", "update_scale": "none"},
    "fngd adamw": {"method": "fngd", "update_rule": "adamw"},
    "fngd muon": {"method": "fngd", "update_rule": "muon"},
    "fngd layer": {"method": "fngd", "share": "layer"},
    "fngd none": {"method": "fngd", "share": "none"},
    "fngd leave one out": {"method": "fngd", "share": "none", "leave_one_out": True},
    "fngd absolute": {"method": "fngd", "damping_mode": "absolute", "damping": 0.1},
    "fngd refreshed": {"method": "fngd", "refresh_every": 2},
    "kfac expand eigen": {"method": "kfac"},
    "kfac reduce eigen": {"method": "kfac", "kfac_approx": "reduce"},
    "kfac expand inverse": {"method": "kfac", "kfac_solver": "inverse"},
    "kfac reduce inverse": {"method": "kfac", "kfac_approx": "reduce", "kfac_solver": "inverse"},
    "ekfac positions": {"method": "ekfac"},
    "ekfac samples": {"method": "ekfac", "second_moments": "samples"},
    "ekfac batch": {"method": "ekfac", "second_moments": "batch"},
    "eva": {"method": "eva"},
    "tengrad": {"method": "tengrad", "update_period": 2},
    "tengrad empirical": {"method": "tengrad", "fisher_labels": "empirical"},
    "seng": {"method": "seng", "update_period": 2, "sketch_size": 0},
    "seng sketched": {"method": "seng", "update_period": 2, "sketch_size": 6},
    "seng big": {"method": "seng", "big_layer_size": 0, "big_rank": 64, "sketch_size": 6},
    "seng low rank": {"method": "seng", "big_layer_size": 0, "big_rank": 4, "sketch_size": 6},
    "plain sgd": {"method": "plain"},
    "plain rms": {"method": "plain", "update_scale": "rms"},
    "plain adamw": {"method": "plain", "update_rule": "adamw"},
    "plain muon": {"method": "plain", "update_rule": "muon"},
}
# Sums of singular vectors, whose signs are any solver's own choice, and second moments along
# eigenvectors, which are where eigenvalues are equal (as where a factor has no rank).
AMBIGUOUS = ("seng low rank", "ekfac positions", "ekfac samples", "ekfac batch")


class Net(nn.Module):
    """Convolutions with and without groups, GPT-2's Conv1D, linear layers on positions and rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Conv2d(3, 6, 3, padding=1)
        self.groups = nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1, padding_mode="circular")
        self.mix = Conv1D(10, 8)
        self.hidden = nn.Linear(10, 12)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, CLASSES)
        # GPT-2 begins so small that nothing but the bias would count.
        nn.init.normal_(self.mix.weight, std=0.3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        x = torch.tanh(self.groups(torch.tanh(self.image(x))))
        x = torch.tanh(self.mix(x.flatten(2).transpose(1, 2).contiguous()))
        logits = self.last(self.norm(torch.tanh(self.hidden(x))).mean(1))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


LAYERS = ("image", "groups", "mix", "hidden", "last")


def images() -> tuple[Tensor, Tensor]:
    """Return images `[ROWS, 3, 6, 6]` in float64, which can be told apart, and their classes."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(ROWS) % CLASSES
    noise = torch.randn(ROWS, 3, 6, 6, generator=generator, dtype=torch.float64)
    return noise + 2 * torch.eye(3, dtype=torch.float64)[classes].view(ROWS, 3, 1, 1), classes


def data_set() -> list[dict[str, Tensor]]:
    """Return the images as a data set of `Net`, for a Trainer."""
    inputs, classes = images()
    return [{"x": x, "labels": y} for x, y in zip(inputs.float(), classes, strict=True)]


def texts(rows: int = 12) -> datasets.Dataset:
    """Return rows of 2 to 8 tokens for a tiny language model."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (rows,), generator=generator).tolist()
    tokens = [torch.randint(3, 24, (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": tokens})


def epochs(count: int, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield epoch, row numbers (on the CPU), images in float32 and classes on the device."""
    inputs, classes = images()
    inputs, labels = inputs.to(DEVICE, torch.float32), classes.to(DEVICE)
    for epoch in range(start, start + count):
        generator = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(ROWS, generator=generator).split(BATCH):
            chosen = rows.to(DEVICE)
            yield epoch, rows, inputs[chosen], labels[chosen]


def make(model: nn.Module, name: str, **changes: Any) -> LayerOptimizer:
    """Make the optimizer of a variant; FNGD knows how many rows there are."""
    settings = {"lr": 0.02, "weight_decay": 0.01, **VARIANTS[name], **changes}
    optimizer = create_preconditioned_optimizer(model, **settings)
    optimizer.bind_dataset(ROWS)
    return optimizer


def step(
    model: nn.Module, optimizer: LayerOptimizer, rows: Tensor, inputs: Tensor, labels: Tensor
) -> Tensor:
    """Take one step, and return the loss without waiting for it."""
    optimizer.set_batch(rows)
    # As a Trainer does; finding it out would wait for the device.
    optimizer.set_loss_scale()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def moved(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the way of each parameter from its start, in float64 on the CPU."""
    return {
        name: p.detach().cpu().double() - start[name].cpu().double()
        for name, p in model.named_parameters()
    }


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return copy.deepcopy(model.state_dict())


def relative_error(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> float:
    """Compare two runs by the ways of all weights together.

    The bias of an attention's keys is left out: its gradient is 0 but for rounding.
    """
    names = [name for name in start if not name.endswith("k_proj.bias")]
    flat = [
        torch.cat([(one[n].cpu().double() - start[n].cpu().double()).flatten() for n in names])
        for one in (found, expected)
    ]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def assert_same_way(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float
) -> float:
    """Compare two ways, parameter by parameter, relative to their length; return the worst."""
    worst = 0.0
    for name, way in expected.items():
        assert way.norm() > 0, f"{name} did not move"
        error = float((found[name] - way).norm() / way.norm())
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.0e}"
        worst = max(worst, error)
    return worst


@contextmanager
def waiting(mode: str) -> Iterator[None]:
    """Make torch warn, or fail, where the host waits for the GPU."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
