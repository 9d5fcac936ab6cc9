"""The methods of the comparison of step times, and the kinds of steps that each of them has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from workload import Workload

from hf_fngd import FNGD, create_preconditioned_optimizer
from hf_fngd.methods import PreconditionedOptimizer

NEVER = 10**9


@dataclass
class Variant:
    """A method as it is measured.

    Attributes:
        settings: Of our optimizer, `method` among them; None for others.
        schedules: By name of the schedule, how often each kind of step occurs in it.
        package: What must be importable.
    """

    settings: dict[str, Any] | None = None
    schedules: dict[str, dict[str, float]] = field(default_factory=lambda: {"": {"step": 1.0}})
    package: str | None = None

    @property
    def kinds(self) -> list[str]:
        """Kinds of steps, in the order in which they are run."""
        return list(dict.fromkeys(kind for kinds in self.schedules.values() for kind in kinds))


def every(period: int, update: str, between: str) -> dict[str, float]:
    """Gives the shares of two kinds of steps.

    Args:
        period: Steps from one update to the next.
        update: Name of the steps that update.
        between: Name of the others.

    Returns:
        Shares that add up to 1.
    """
    return {update: 1 / period, between: 1 - 1 / period}


_KFAC = {
    f"inverse every {period}": every(period, "inverse", "factors only") for period in (10, 100)
}
# The inverse solver: decompositions of factors of 4608 rows take minutes on a CPU.
VARIANTS: dict[str, Variant] = {
    "sgd": Variant(),
    "adamw": Variant(),
    "muon": Variant({"method": "plain", "update_rule": "muon"}),
    "sgd_rms": Variant({"method": "plain", "update_rule": "sgd", "update_scale": "rms"}),
    "fngd": Variant(
        {"method": "fngd", "update_scale": "none"},
        {"later epochs": {"reuse": 1.0}, "first epoch": {"collect": 1.0}},
    ),
    "kfac": Variant({"method": "kfac", "kfac_solver": "inverse"}, _KFAC),
    "kfac reduce": Variant(
        {"method": "kfac", "kfac_solver": "inverse", "kfac_approx": "reduce"}, _KFAC
    ),
    "kfac-pytorch": Variant(None, _KFAC, "kfac"),
    "eva": Variant({"method": "eva"}),
    "tengrad": Variant({"method": "tengrad"}, {"every 100": every(100, "update", "between")}),
    "seng": Variant({"method": "seng"}, {"every 200": every(200, "update", "between")}),
}


class Runner:
    """One method on its own copy of the model.

    Args:
        label: A name in `VARIANTS`.
        workload: Model and batch.
    """

    def __init__(self, label: str, workload: Workload) -> None:
        self.workload = workload
        self.model, self.batch = workload.model(), workload.batch()
        rate, settings = workload.learning_rate, VARIANTS[label].settings
        self.peer: Any = None
        self._peer_period = NEVER
        parameters = self.model.parameters()
        if settings is not None:
            self.optimizer: torch.optim.Optimizer = create_preconditioned_optimizer(
                self.model, lr=rate, **settings
            )
        elif label == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, fused=True)
        if label == "kfac-pytorch":
            from kfac.preconditioner import KFACPreconditioner

            self.peer = KFACPreconditioner(
                self.model,
                factor_update_steps=1,
                inv_update_steps=lambda _: self._peer_period,
                compute_method="inverse",
                damping=0.003,
                lr=rate,
                skip_layers=["lm_head"],
            )
            self._peer_period = 1
            self.step()

    def prepare(self, kind: str) -> None:
        """Makes the next step one of the given kind.

        Args:
            kind: One of the variant's kinds.
        """
        self._peer_period = 1 if kind == "inverse" else NEVER
        optimizer = self.optimizer
        if isinstance(optimizer, FNGD):
            # Epoch 1 knows all rows once epoch 0 has seen the batch.
            optimizer.start_epoch(0)
            if kind == "reuse":
                if optimizer.coefficients.store.count_known(self._rows()) < len(self._rows()):
                    self.step()
                optimizer.start_epoch(1)
        elif isinstance(optimizer, PreconditionedOptimizer):
            state = optimizer.tracker
            state.next_update = NEVER if kind == "between" else state.steps
            for layer in optimizer.layers:
                if "inverted_at" in layer.state:
                    at = -NEVER if kind == "inverse" else state.steps
                    layer.state["inverted_at"] = torch.tensor(at)

    def _rows(self) -> torch.Tensor:
        count = len(next(iter(self.batch.values())))
        return self.optimizer.coefficients.store.locate(range(count), create=False)  # type: ignore[attr-defined]

    def step(self) -> None:
        """Trains one step."""
        if isinstance(self.optimizer, FNGD):
            self.optimizer.set_batch(range(len(next(iter(self.batch.values())))))
        self.workload.loss(self.model, self.batch).backward()
        if self.peer is not None:
            self.peer.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
