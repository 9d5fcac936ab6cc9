"""What the benchmark of a GPU trains: its shapes, its optimizers, and single steps of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from methods import every
from workload import Workload

from hf_fngd import FNGD, create_preconditioned_optimizer

_PAPER = Workload(d_model=512, ffn_dim=2048, layers=6, batch_size=128, length=25, bf16=True)
_SHAPES = {
    "marian_512_b128": _PAPER,
    "resnet18_b256": Workload(shapes="resnet18", batch_size=256, bf16=True),
    "gpt2_b16_t1024": replace(
        _PAPER,
        shapes="gpt2",
        d_model=768,
        ffn_dim=3072,
        layers=12,
        vocab_size=50257,
        batch_size=16,
        length=1024,
    ),
    "lora_7b_blocks_b8": replace(
        _PAPER, shapes="lora", d_model=4096, ffn_dim=11008, layers=2, batch_size=8, length=512
    ),
    "opus_mt_b64": replace(_PAPER, vocab_size=58101, batch_size=64),
    "resnet18_b128": Workload(shapes="resnet18", batch_size=128, bf16=True),
}
IMAGES = "resnet18_b128"


def shapes(tiny: bool) -> dict[str, Workload]:
    """Return the shapes, the most important first.

    Args:
        tiny: Whether to return models of the same kinds that train in milliseconds on a CPU.

    Returns:
        Workloads by name.
    """
    if not tiny:
        return dict(_SHAPES)
    small = {"width": 4, "ffn_dim": 32, "layers": 1, "vocab_size": 50, "batch_size": 4, "length": 5}
    small["threads"] = 1
    widths = {"marian": 16, "gpt2": 64, "lora": 128, "resnet18": 16}
    return {
        name: replace(one, **small, d_model=widths[one.shapes]) for name, one in _SHAPES.items()
    }


@dataclass(frozen=True)
class Method:
    """A method with its kinds of steps, which take turns.

    Attributes:
        settings: Settings of the optimizer, `method` among them.
        shares: How often each kind occurs in training, in the order in which they are run.
        seconds: Bound on the time of its measurement.
    """

    settings: dict[str, Any]
    shares: dict[str, float]
    seconds: float = 20.0


_KFAC = {"method": "kfac", "inverse_period": 2}
METHODS = {
    "kfac": Method({**_KFAC, "kfac_solver": "inverse"}, every(10, "inverse", "factors only")),
    "eva": Method({"method": "eva"}, {"step": 1.0}),
    "tengrad": Method(
        {"method": "tengrad", "update_period": 2}, every(100, "update", "between"), 25.0
    ),
    "seng": Method({"method": "seng", "update_period": 2}, every(200, "update", "between"), 25.0),
    # Decompositions of factors of 4608 rows take seconds.
    "kfac eigen": Method(
        {**_KFAC, "kfac_solver": "eigen"}, every(10, "inverse", "factors only"), 60.0
    ),
}
_PLAIN = {"method": "plain"}
RULES = {
    "sgd": {**_PLAIN, "update_rule": "sgd"},
    "sgd rms": {**_PLAIN, "update_rule": "sgd", "update_scale": "rms"},
    "rule adamw": {**_PLAIN, "update_rule": "adamw"},
    "rule muon": {**_PLAIN, "update_rule": "muon"},
}
OURS: dict[str, dict[str, Any]] = {
    "fngd": {"method": "fngd", "update_rule": "sgd"},
    "fngd_adamw": {"method": "fngd", "update_rule": "adamw"},
    **RULES,
    **{name: method.settings for name, method in METHODS.items()},
}
TORCH = ("adamw", "torch sgd", "torch muon")


class Trial:
    """A model with its optimizer, which trains on one batch.

    Args:
        name: A name in `OURS` or `TORCH`.
        workload: Model and batch.
        device: Where both are made.
    """

    def __init__(self, name: str, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        with device:
            self.model, self.batch = workload.model(), workload.batch()
        rate = workload.learning_rate
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer]
        if name in OURS:
            ours = create_preconditioned_optimizer(self.model, lr=rate, **OURS[name])
            # As a Trainer does.
            ours.set_loss_scale()
            if isinstance(ours, FNGD):
                ours.bind_dataset(workload.batch_size)
            self.optimizers = [ours]
        elif name == "torch sgd":
            self.optimizers = [torch.optim.SGD(trained, rate, momentum=0.9, fused=True)]
        elif name == "torch muon":
            # The same weights as ours, and AdamW for the others.
            ours = create_preconditioned_optimizer(self.model, lr=rate, **OURS["rule muon"])
            ours.detach()
            matrices, others = ([*group["params"]] for group in _by_rule(ours))
            self.optimizers = [
                torch.optim.Muon(matrices, rate, weight_decay=0.0, momentum=0.9),
                torch.optim.AdamW(others, rate, weight_decay=0.0, fused=True),
            ]
        else:
            self.optimizers = [torch.optim.AdamW(trained, rate, weight_decay=0.0, fused=True)]

    @property
    def fngd(self) -> FNGD | None:
        """The optimizer, if it is FNGD."""
        return self.optimizers[0] if isinstance(self.optimizers[0], FNGD) else None

    def enter(self, epoch: int | None = None, update_scale: str | None = None) -> None:
        """Make the next steps those of another epoch, or of another scale of updates.

        Args:
            epoch: 0: FNGD computes coefficients; 1: it looks them up. None: as it is.
            update_scale: That of FNGD's first groups. None: as it is.
        """
        if self.fngd is not None and epoch is not None:
            self.fngd.start_epoch(epoch)
        for group in self.optimizers[0].param_groups if update_scale else ():
            if group["rule"] == "sgd":
                group["update_scale"] = update_scale

    def backward(self) -> None:
        """Run the model forward and back."""
        if self.fngd is not None:
            self.fngd.set_batch(range(self.workload.batch_size))
        self.workload.loss(self.model, self.batch).backward()

    def update(self) -> None:
        """Take the optimizer's step and keep the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self) -> None:
        """Train one step."""
        self.backward()
        self.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def _by_rule(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    groups = {"muon": {"params": []}, "adamw": {"params": []}}
    for group in optimizer.param_groups:
        groups[group["rule"]]["params"] += group["params"]
    return groups["muon"], groups["adamw"]
